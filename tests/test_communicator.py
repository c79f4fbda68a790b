"""Ranks that come to different collectives: an error that names them on every rank, never a hang."""

import functools
import time

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import run_gloo

import tp_runtime
from tp_runtime import comm as comm_module
from tp_runtime.comm import communicator

TP = 3
LARGE = 100_000  # floats: more than goes through shared memory
# What rank 1 does while the others do what they should, and what every rank is then told.
DIFFERENT = {
    "shape": (lambda c, other: c.all_reduce(torch.ones(2 + other, 3)), "float32 [2, 3]", "float32 [3, 3]"),
    "dtype": (
        lambda c, other: c.all_reduce(torch.ones(4, dtype=torch.bfloat16 if other else torch.float32)),
        "all_reduce float32 [4]",
        "all_reduce bfloat16 [4]",
    ),
    "collective": (
        lambda c, other: c.all_gather(torch.ones(1), [1] * TP) if other else c.all_reduce(torch.ones(1)),
        "all_reduce float32 [1]",
        "all_gather float32 [] (1, 1, 1)",
    ),
    "lengths": (
        lambda c, other: c.all_gather(torch.ones(c.rank), [0, 1, 3 if other else 2]),
        "all_gather float32 [] (0, 1, 2)",
        "all_gather float32 [] (0, 1, 3)",
    ),
    "source": (
        lambda c, other: c.broadcast(torch.ones(2), 1 if other else 0),
        "broadcast float32 [2] from rank 0",
        "broadcast float32 [2] from rank 1",
    ),
    "large": (lambda c, other: c.all_reduce(torch.ones(LARGE + other)), "float32 [100000]", "float32 [100001]"),
    "small and large": (lambda c, other: c.all_reduce(torch.ones(LARGE if other else 1)), "float32 [1]", "[100000]"),
    "nothing and large": (lambda c, other: c.all_reduce(torch.ones(LARGE if other else 0)), "[0]", "[100000]"),
    "large, one-shot": (lambda c, other: c.all_reduce_one_shot(torch.ones(LARGE + other)), "[100000]", "[100001]"),
    "one behind": (lambda c, other: two_at_once(c, other), "float32 [100002]", "float32 [100001]"),
}


def two_at_once(comm, other: bool) -> None:
    """Two that are under way together; rank 1 starts them the other way round."""
    handles = [comm.all_reduce_async(torch.ones(LARGE + n)) for n in ((1, 2) if other else (2, 1))]
    for handle in handles:
        handle.wait()


def differ(comm, name: str) -> str:
    """What a rank is told when rank 1 does something else."""
    try:
        DIFFERENT[name][0](comm, comm.rank == 1)
    except ValueError as error:
        return str(error)
    return "nothing was said"


def differ_in_groups(comm) -> dict:
    """Each in a group of its own, as a group whose ranks disagreed is of no use any more."""
    told = {}
    for name in DIFFERENT:
        ours = communicator(dist.new_group(list(range(TP))))
        comm.barrier()
        began = time.monotonic()
        told[name] = differ(ours, name)
        told["seconds", name] = time.monotonic() - began
    comm_module.orders_stores = lambda: False  # as between machines: there is the group alone
    for name in DIFFERENT:
        alone = communicator(dist.new_group(list(range(TP))))
        told["alone", name] = differ(alone, name)
        told["alone", name, "above"] = alone.one_shot_above
    return told


@functools.cache
def gloo_told() -> list[dict]:
    return run_gloo(differ_in_groups, TP, timeout_s=60)


@pytest.mark.parametrize("name", DIFFERENT)
def test_ranks_that_do_different_things_are_told(name):
    """Catches a hang, and sums of the wrong numbers, where ranks come to different collectives, shapes or dtypes."""
    _, right, wrong = DIFFERENT[name]
    told = [(rank[name], rank["alone", name]) for rank in gloo_told()]
    for text in {*tp_runtime.run_local(differ, TP, name), *(text for pair in told for text in pair)}:
        assert text.startswith("ranks disagree on collective (ranks 0, 2: "), text
        others, _, mine = text.partition("; rank 1: ")
        assert others.endswith(right) and wrong in mine, text
    assert all(rank["seconds", name] < 5 for rank in gloo_told())


def test_without_shared_memory_there_is_no_other_way():
    """Catches a one-shot schedule that is measured where it is the group's own all-reduce again."""
    assert {rank["alone", "shape", "above"] for rank in gloo_told()} == {None}

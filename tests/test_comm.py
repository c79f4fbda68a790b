"""Communicators: threads and gloo processes say the same to each other, and a failing rank ends all of them at once."""

import functools
import logging
import threading
import types

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import run_gloo

import tp_runtime
from tp_runtime import comm as comm_module
from tp_runtime.comm import TorchCommunicator, communicator
from tp_runtime.communicator import NullCommunicator
from tp_runtime.local import LocalCommunicator

TP = 3
LENGTHS = (3, 0, 2)


def values(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random numbers of very different size, another set for each rank."""
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(*shape, generator=generator) * torch.randn(*shape, generator=generator).exp()).to(dtype)


def test_nccl_is_asked_for_a_high_priority_stream_and_few_programs(monkeypatch):
    """Catches NCCL queued behind a GEMM's grid; and fewer programs where NVLink is not what saturates them."""

    class Options:
        def __init__(self, is_high_priority_stream=False):
            self.is_high_priority_stream, self.config = is_high_priority_stream, types.SimpleNamespace(max_ctas=None)

    monkeypatch.setattr(dist, "ProcessGroupNCCL", types.SimpleNamespace(Options=Options), raising=False)
    for capability, ctas in (((8, 0), None), ((9, 0), 16), ((10, 0), 16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, answer=capability: answer)
        options = comm_module._nccl_options(torch.device("cuda", 0))
        assert options.is_high_priority_stream and options.config.max_ctas == ctas


def disagreement(comm, fields: dict) -> str:
    try:
        comm.check_agreement(fields)
    except ValueError as error:
        return str(error)
    return "agreed"


def speak(comm) -> dict:
    """What one rank hears, by the name of the thing said."""
    r = comm.rank
    heard = {"rank": r, "size": comm.size, "device": comm.device_name()}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = values(r, 5, 101, dtype=dtype)
        heard[f"sum {dtype}"] = comm.all_reduce(x)
        heard[f"sum {dtype} is in place"] = heard[f"sum {dtype}"] is x
        wide = values(r, 3, 100_000, dtype=dtype)  # more than goes through shared memory
        heard[f"wide sum {dtype}"] = comm.all_reduce(wide)
    heard["sum of ids"] = comm.all_reduce(torch.tensor([r, 2**40]))
    heard["sum of nothing"] = comm.all_reduce(torch.empty(0, 4))
    heard["rows"] = comm.all_gather(torch.arange(2 * LENGTHS[r]).view(2, LENGTHS[r]) + 10 * r, LENGTHS)
    heard["strided"] = comm.all_gather(values(r, 4, 2, 3).transpose(0, 2), [4] * TP)
    wide = torch.arange(2 * 50_000 * LENGTHS[r]).view(2, 50_000 * LENGTHS[r]) + 10**6 * r
    heard["wide rows"] = comm.all_gather(wide, [50_000 * n for n in LENGTHS])
    heard["flat"] = comm.all_gather(torch.full((LENGTHS[r],), float(r)), LENGTHS)
    heard["no rows"] = comm.all_gather(torch.empty(0, LENGTHS[r]), LENGTHS)
    for source in range(TP):
        heard[f"broadcast {source}"] = comm.broadcast(values(r, 7, dtype=torch.bfloat16), source)
    heard["bytes"] = comm.broadcast(torch.full((9,), r, dtype=torch.uint8))
    heard["json"] = comm.gather_json({"rank": r, "text": "é" * r})
    heard["same"] = disagreement(comm, {"seed": 7, "prompt": [1] * 1000})
    heard["other seed"] = disagreement(comm, {"seed": 7 if r != 1 else 8, "top_k": None})
    heard["other prompt"] = disagreement(comm, {"prompt": [1] * 1000 + [r == 2], "seed": r})
    heard["other fields"] = disagreement(comm, {"seed": 7} if r else {"seed": 7, "top_p": 0.5})
    comm.barrier()
    return heard


def speak_in_groups(comm) -> dict:
    """`speak`, and what only processes have: groups, meshes, a clock."""
    from torch.distributed.device_mesh import init_device_mesh

    heard = speak(comm)
    comm.reset_clock()
    comm.barrier()
    heard["clock"] = comm.collective_s
    some = dist.new_group([0, 2])
    mesh = init_device_mesh("cpu", (1, TP), mesh_dim_names=("dp", "tp"))
    groups = {
        "default": None,
        "world": dist.group.WORLD,
        "mesh": mesh["tp"],
        **({"some": some} if comm.rank != 1 else {}),
    }
    for name, group in groups.items():
        ours = communicator(group)
        total, last = ours.all_reduce(torch.tensor([1 + comm.rank])), torch.tensor([comm.rank])
        heard[f"group {name}"] = (ours.rank, ours.size, total.item(), ours.broadcast(last, ours.size - 1).item())
    heard["ours"] = communicator(comm) is comm
    for name, group in {"2-D mesh": mesh, "no group": "tp", "not mine": some}.items():
        try:
            communicator(group)
            heard[name] = "taken"
        except ValueError as error:
            heard[name] = str(error)
    return heard


@pytest.fixture(scope="module", params=["local", "gloo"])
def heard(request) -> list[dict]:
    """What each of three ranks heard, as threads and as processes."""
    return tp_runtime.run_local(speak, TP) if request.param == "local" else gloo_heard()


@functools.cache
def gloo_heard() -> list[dict]:
    return run_gloo(speak_in_groups, TP)


def test_ranks_are_in_order(heard):
    """Catches results or ranks that are mixed up."""
    assert [(h["rank"], h["size"], h["device"]) for h in heard] == [(r, TP, "cpu") for r in range(TP)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sum_has_the_same_bits_on_every_rank(heard, dtype):
    """Catches sums in another order on another rank, and half precision that is rounded at every addition."""
    for name, shape in (("sum", (5, 101)), ("wide sum", (3, 100_000))):
        sums = [h[f"{name} {dtype}"] for h in heard]
        assert all(s.dtype == dtype and torch.equal(s, sums[0]) for s in sums)
        parts = torch.stack([values(r, *shape, dtype=dtype) for r in range(TP)])
        if dtype == torch.float32:  # each of the two additions rounds by eps / 2
            error = (sums[0].double() - parts.double().sum(0)).abs()
            assert (error <= torch.finfo(dtype).eps * parts.double().abs().sum(0)).all()
        else:
            assert torch.equal(sums[0], parts.float().sum(0).to(dtype))  # rounded once
    assert all(h[f"sum {dtype} is in place"] for h in heard)


def test_sums_of_whole_numbers_and_of_nothing(heard):
    """Catches integers that pass through floats, and a collective that waits for an empty tensor."""
    assert all(h["sum of ids"].tolist() == [3, 3 * 2**40] for h in heard)
    assert all(h["sum of nothing"].shape == (0, 4) for h in heard)


def test_gather_of_uneven_and_empty_parts(heard):
    """Catches padding left in the result, an empty part that shifts the others, strides taken for memory order."""
    rows = [[0, 1, 2, 20, 21], [3, 4, 5, 22, 23]]
    strided = torch.cat([values(r, 4, 2, 3).transpose(0, 2) for r in range(TP)], dim=-1)
    wide_parts = [torch.arange(100_000 * n).view(2, 50_000 * n) + 10**6 * r for r, n in enumerate(LENGTHS)]
    wide_rows = torch.cat(wide_parts, dim=1)
    for h in heard:
        assert h["rows"].tolist() == rows
        assert torch.equal(h["strided"], strided)
        assert torch.equal(h["wide rows"], wide_rows)
        assert h["flat"].tolist() == [0, 0, 0, 2, 2]
        assert h["no rows"].shape == (0, 5)


def test_broadcast_gives_the_source(heard):
    """Catches a source that is always rank 0, and dtypes that the backend does not carry."""
    for source in range(TP):
        assert all(torch.equal(h[f"broadcast {source}"], values(source, 7, dtype=torch.bfloat16)) for h in heard)
    assert all(h["bytes"].tolist() == [0] * 9 for h in heard)


def test_json_of_every_rank(heard):
    """Catches lengths counted in characters and not in bytes."""
    assert all(h["json"] == [{"rank": r, "text": "é" * r} for r in range(TP)] for h in heard)


def test_disagreement_names_fields_ranks_and_values(heard):
    """Catches a check that only some ranks fail, or that leaves the user to guess which rank was given what."""
    remedy = "; every rank must be given the same"
    for h in heard:
        assert h["same"] == "agreed"
        assert h["other seed"] == "ranks disagree on seed (ranks 0, 2: 7; rank 1: 8)" + remedy
        assert h["other fields"] == "ranks disagree on top_p (rank 0: 0.5; ranks 1, 2: nothing)" + remedy
        assert h["other prompt"].startswith("ranks disagree on prompt (ranks 0, 1: [1, 1, ")
        assert h["other prompt"].endswith(" and on seed (rank 0: 0; rank 1: 1; rank 2: 2)" + remedy)
        assert len(h["other prompt"]) < 400  # a long value is shown by its digest


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []
        logging.getLogger("tp_runtime").addHandler(self)

    def emit(self, record):
        self.lines.append(record.getMessage())


# The steps to memory of all GPUs, and the one that fails on rank 1 alone: stand-ins, as there is no GPU here.
STEPS = ("_reach", "_allocate", "_rendezvous")


def without_peer_access(comm) -> dict:
    """Of each failing step what comes of it: buffers, lines, and the steps that this rank took."""
    got = {}
    for failing in (*STEPS, None):
        heard, taken = Lines(), []
        for step in STEPS:
            setattr(comm_module, step, functools.partial(stand_in, step, comm.rank == 1 and step == failing, taken))
        buffers = comm._symmetric_memory(8)
        got[failing] = (buffers is not None, heard.lines, taken)
        logging.getLogger("tp_runtime").removeHandler(heard)
    return got


def stand_in(step: str, fails: bool, taken: list[str], comm, num_bytes: int, made):
    taken.append(step)
    if fails:
        raise RuntimeError(f"{step} is not to be\nmore lines")
    return [torch.zeros(num_bytes)] * comm.size if step == STEPS[-1] else None


def test_one_rank_without_peer_access_is_all_without():
    """Catches ranks that wait in the next step for one that has failed, and a slower path that is taken silently."""
    for rank, got in enumerate(run_gloo(without_peer_access, TP, timeout_s=60)):
        for number, failing in enumerate(STEPS):
            line = f"no GPU reads another's memory (rank 1: {failing} is not to be); NCCL sums all"
            assert got[failing] == (False, [line] if rank == 0 else [], list(STEPS[: number + 1]))
        assert got[None] == (True, [], list(STEPS))


def test_groups_of_processes():
    """Catches a communicator that takes the default group whatever it is given, or the wrong dimension of a mesh."""
    for r, h in enumerate(gloo_heard()):
        assert h["group default"] == h["group world"] == h["group mesh"] == (r, TP, 6, 2)
        if r != 1:
            assert h["group some"] == (r // 2, 2, 4, 2)
        assert h["ours"]
        assert h["2-D mesh"] == "the DeviceMesh has 2 dimensions; pass its tensor-parallel one, mesh['tp']"
        assert h["no group"] == "group is a str; pass a process group, a DeviceMesh or a Communicator"
        assert ("taken" if r != 1 else "this process is not in the group") in h["not mine"]
        assert 0 < h["clock"] < 10


def test_no_group_is_one_rank():
    """Catches a notebook user who is asked for a process group."""
    assert not dist.is_initialized()
    alone = communicator()
    assert (type(alone), alone.rank, alone.size) == (NullCommunicator, 0, 1)
    x = torch.ones(2, 3)
    assert alone.all_reduce(x) is x and alone.all_gather(x, [3]) is x and alone.broadcast(x) is x
    assert alone.gather_json({"a": 1}) == [{"a": 1}]
    alone.check_agreement({"a": object()})  # nobody to disagree with: nothing is even described


def test_null_rank_of_many_keeps_its_partial_results():
    """Catches a stand-in that sums or waits, or whose shapes are not those of the real thing."""
    comm = NullCommunicator(rank=2, size=4)
    x = torch.tensor([[1.0], [2.0]])
    assert comm.all_reduce(x) is x
    assert comm.all_gather(x, [3, 0, 1, 2]).tolist() == [[0, 0, 0, 1, 0, 0], [0, 0, 0, 2, 0, 0]]
    assert comm.gather_json(5) == [5] * 4


def test_run_local_returns_in_rank_order_and_passes_arguments():
    """Catches results in the order in which the threads end; threads or thread counts left behind."""
    before = threading.active_count(), torch.get_num_threads()
    results = tp_runtime.run_local(lambda comm, a, b: (type(comm), comm.rank, comm.size, a + b), 4, "x", "y")
    assert results == [(LocalCommunicator, r, 4, "xy") for r in range(4)]
    assert (threading.active_count(), torch.get_num_threads()) == before


def test_run_local_ranks_share_the_threads_of_the_caller():
    """Catches ranks that take all cores each, or more than the user gave torch."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        assert tp_runtime.run_local(lambda comm: torch.get_num_threads(), 2) == [2, 2]
        assert tp_runtime.run_local(lambda comm: torch.get_num_threads(), 1) == [5]
        torch.set_num_threads(1)
        assert tp_runtime.run_local(lambda comm: torch.get_num_threads(), 3) == [1, 1, 1]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("failing", range(3))
def test_run_local_raises_the_failing_ranks_own_error(failing):
    """Catches a hang of the others in their collective, and their BrokenBarrierError shown in place of the cause."""

    def run(comm):
        comm.barrier()
        if comm.rank == failing:
            raise KeyError(f"rank {comm.rank}")
        comm.all_gather(torch.ones(1), [1] * 3)

    with pytest.raises(KeyError, match=f"rank {failing}"):
        tp_runtime.run_local(run, 3)
    assert tp_runtime.run_local(lambda comm: comm.gather_json(comm.rank), 3)[0] == [0, 1, 2]  # the next run is whole


@pytest.mark.parametrize("leaving", range(3))
def test_run_local_ends_when_a_rank_leaves_early(leaving):
    """Catches ranks that wait forever for one that has returned."""

    def run(comm):
        comm.barrier()
        if comm.rank != leaving:
            comm.barrier()

    with pytest.raises(ValueError, match=f"rank {leaving} returned while rank . waits for it in a collective"):
        tp_runtime.run_local(run, 3)


def test_run_local_needs_a_rank():
    """Catches an empty list of results for tp_size 0."""
    with pytest.raises(ValueError, match="tp_size=0: at least one rank is needed"):
        tp_runtime.run_local(lambda comm: None, 0)


def test_torch_communicator_is_of_the_default_group():
    """Catches a single rank where somebody else than our launcher made the process group."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=1, world_size=64, store=FakeStore())
    try:
        comm = communicator()
        assert (type(comm), comm.rank, comm.size, comm.device.type) == (TorchCommunicator, 1, 64, "cpu")
        assert comm.all_gather(torch.ones(2, 3), [3] * 64).shape == (2, 192)
    finally:
        dist.destroy_process_group()

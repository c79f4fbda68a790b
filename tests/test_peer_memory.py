"""Collectives through shared memory: right, in order, whoever is late, and over when a peer is gone."""

import itertools
import os
import random
import signal
import time

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import end_of, run_gloo

from tp_runtime import peer_memory
from tp_runtime.comm import TorchCommunicator
from tp_runtime.kernels.all_reduce import all_reduce_ref
from tp_runtime.peer_memory import SLOT_BYTES, PeerKernels, PeerMemory


def a_thousand_calls(comm):
    """Random sizes and kinds, ranks delayed at random; returns what differed from the truth."""
    assert comm._peers is not None
    late, shared = random.Random(comm.rank), random.Random(0)
    wrong = []
    for call in range(1000):
        count = shared.choice([1, 3, 64, 1000, SLOT_BYTES // 4, SLOT_BYTES // 4 + 1])
        if late.random() < 0.02:
            time.sleep(late.random() * 0.004)
        x = torch.full((count,), float(comm.rank * 7 + call))
        if shared.random() < 0.5:
            comm.all_reduce(x)
            expected = float(sum(rank * 7 + call for rank in range(comm.size)))
            ok = bool((x == expected).all())
        else:
            lengths = [shared.choice([0, 1, 5]) for _ in range(comm.size)]
            whole = comm.all_gather(torch.full((2, lengths[comm.rank]), float(comm.rank)), lengths)
            ok = torch.equal(whole[1], torch.tensor([float(r) for r, n in enumerate(lengths) for _ in range(n)]))
        if not ok:
            wrong.append(call)
    return wrong


@pytest.mark.parametrize("size", [2, 3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_thousand_calls_with_late_ranks(size):
    """Catches a part that is read before it was written, or overwritten before everyone has read it."""
    assert run_gloo(a_thousand_calls, size) == [[]] * size


def sum_of_thirds(comm):
    x = torch.full((1000,), 1 / 3 + comm.rank, dtype=torch.bfloat16)
    return comm.all_reduce(x).float().tolist()


def test_sum_is_the_same_bits_on_every_rank_and_rounded_once():
    """Catches a sum in another order on each rank, and partial sums that are rounded to bfloat16."""
    ranks = run_gloo(sum_of_thirds, 5)
    parts = [torch.tensor(1 / 3 + rank, dtype=torch.bfloat16).float() for rank in range(5)]
    assert all(rank == [float(sum(parts).bfloat16())] * 1000 for rank in ranks)


def peer_leaves(comm):
    if comm.rank == 1:
        return None
    try:
        comm.all_reduce(torch.ones(4))
    except ConnectionError as error:
        return str(error)


def test_a_peer_that_is_gone_ends_the_wait():
    """Catches ranks that wait for a dead peer where no launcher of ours would end them: under mp.spawn, say."""
    assert run_gloo(peer_leaves, 2) == ["connection closed by rank 1: the process has ended", None]


def peer_leaves_within(comm):
    """Rank 1 ends in the middle of a one-shot sum of many pieces, without a word."""
    if comm.rank == 1:
        exchange, pieces = PeerMemory.exchange, iter(range(3))

        def exchange_or_leave(*args):
            next(pieces)
            return exchange(*args)

        PeerMemory.exchange = exchange_or_leave
    x, began = torch.ones(10 * SLOT_BYTES // 4), time.monotonic()
    try:
        comm.all_reduce_one_shot(x)
    except StopIteration:
        return None
    except ConnectionError as error:
        return str(error), time.monotonic() - began, x.unique(return_counts=True)[1].tolist()


def test_a_peer_that_dies_within_a_sum_ends_the_wait():
    """Catches ranks that wait for the next piece of a rank that is gone."""
    text, seconds, counts = run_gloo(peer_leaves_within, 2)[0]
    assert text == "connection closed by rank 1: the process has ended" and seconds < 5
    assert counts == [7 * SLOT_BYTES // 4, 3 * SLOT_BYTES // 4]  # three pieces were summed


def test_ranks_on_two_machines_use_their_group(monkeypatch):
    """Catches shared memory between ranks that do not share any."""
    everyone = {"place": "here", "name": "/dev/shm/x"}
    elsewhere = {"place": "there", "name": ""}
    monkeypatch.setattr(peer_memory, "place", lambda: "here")
    replies = iter([[everyone, elsewhere], [False, False]])
    assert peer_memory.open_shared_memory(1, 2, 4096, lambda value: next(replies)) is None


def test_nothing_is_left_in_dev_shm():
    """Catches a file that outlives its ranks."""
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("tp_runtime-")]


def killed_within_a_sum(comm):
    """A one-shot sum in three pieces, in whose second rank 1 dies: its part is written, its count is not."""
    x = torch.ones(3 * SLOT_BYTES // 4)
    comm.all_reduce_one_shot(x)
    if comm.rank == 1:
        meet, pieces = comm._peers._meet, itertools.count()

        def dying(label: bytes) -> None:
            if next(pieces) == 1:
                print(time.time(), flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            meet(label)

        comm._peers._meet = dying
    comm.all_reduce_one_shot(x)
    print("a rank went on", flush=True)


def test_a_rank_killed_within_a_one_shot_sum_ends_all(tmp_path):
    """Row R1. Catches peers that wait in shared memory for a part that never comes, sum what there is, or add a
    complaint of their own."""
    done = end_of(killed_within_a_sum, 3, tmp_path)
    ended = time.time()
    assert done.returncode == 1 and ended - float(done.stdout) < 3, done
    (said,) = done.stderr.splitlines()
    assert said.startswith("tp_runtime: rank 1 was killed by SIGKILL") and "last collective all_reduce" in said
    assert not list(tmp_path.iterdir())


def on_one_gpu(comm, group=None) -> str:
    """Ranks that share a GPU and sum through each other's memory there; what went wrong, empty if nothing did."""
    ours = TorchCommunicator(group, device="cuda:0")
    ours.open_one_shot()
    if ours.one_shot_above is None:
        return "no symmetric memory"
    for call in range(20):
        dtype = (torch.bfloat16, torch.float32)[call % 2]
        count = (70, 8192, PeerKernels.BUFFER_BYTES // dtype.itemsize)[call % 3]  # one shot, two, and in pieces
        torch.manual_seed(call)
        parts = [torch.randn(count).to(dtype) for _ in range(comm.size)]
        x = parts[comm.rank].cuda()
        if not torch.equal(ours.all_reduce_one_shot(x).cpu(), all_reduce_ref(parts)):
            return f"call {call}: {count} of {dtype} are not the sum in rank order"
    return ""


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 4])
def test_processes_on_one_gpu(size, monkeypatch):
    """Catches what threads and plain tensors do not show: memory of another process, mapped by torch."""
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    assert run_gloo(on_one_gpu, size) == [""] * size


def by_nccl_on_one_gpu(comm) -> str:
    torch.cuda.set_device(0)
    return on_one_gpu(comm, dist.new_group(backend="nccl"))


@pytest.mark.gpu
def test_nccl_ranks_on_one_gpu(monkeypatch):
    """Catches a group of NCCL's whose memory is not found by its name."""
    if (version := torch.cuda.nccl.version()) < (2, 30):
        pytest.skip(f"NCCL {'.'.join(map(str, version))}: several ranks on one GPU from 2.30 on")
    for name, value in {"MULTI_RANK_GPU_ENABLE": 1, "NVLS_ENABLE": 0, "MAX_CTAS": 4}.items():
        monkeypatch.setenv(f"NCCL_{name}", str(value))
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    assert run_gloo(by_nccl_on_one_gpu, 2) == [""] * 2

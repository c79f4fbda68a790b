"""Tests of bench/emulated_nccl.py: the kernel interpreted and compiled, its calibration, and who waits for it."""

from functools import partial

import pytest
import torch
from interpreted import interpreted

from bench import emulated_nccl
from bench.compile_cases import meta
from bench.compile_claims import Case
from bench.compiled import CHIPS, WARP_SIZE
from bench.emulated_nccl import NCCL, ONE_SHOT, EmulatedCommunicator, calibrate, published_us


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("peer", [NCCL, ONE_SHOT])
def test_published_times_are_met_and_grow(size, peer):
    """Catches an interpolation that misses the published points, or that is faster for more bytes."""
    published = {num: of[peer] for num, of in emulated_nccl.PUBLISHED_US[size].items() if peer in of}
    assert {num: published_us(size, num, peer) for num in published} == pytest.approx(published)
    least, most = min(published), max(published)
    assert published_us(size, 1, peer) == published[least]
    assert published_us(size, 3 * most, peer) == pytest.approx(3 * published[most])
    times = [published_us(size, 1 << bits, peer) for bits in range(10, 30)]
    assert times == sorted(times)
    between = published_us(size, 128 << 10, peer)  # half way from 16 KiB to 1 MiB, in logarithms
    assert between == pytest.approx((published[16 << 10] * published[1 << 20]) ** 0.5)


def test_ranks_that_nothing_is_published_for():
    """Catches an emulation with figures that nobody has published."""
    with pytest.raises(ValueError, match="tp_size=3.*2, 4, 8"):
        EmulatedCommunicator(3, "cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("n", [64, 70])
def test_kernel_moves_its_share_and_then_sums(dtype, n):
    """Catches bytes that are not moved, which would take no time, and an x that is left out or multiplied twice."""
    launch = interpreted("emulated_nccl").launch
    x, first, place = torch.arange(-n / 2, n / 2).to(dtype), torch.rand(n).to(dtype), torch.arange(n)
    shares = {0: place < 0, 8: (place % 16 < 8) & (place < 32), 16: place < 32, 48: place >= 0}  # of two programs
    for share, moved in shares.items():
        got, scratch = x.clone(), torch.stack([first, torch.full_like(first, float("nan"))])
        launch(got, scratch, share, 4, ctas=2, block_bytes=16 * dtype.itemsize)
        assert torch.equal(got, 4 * x)
        assert torch.equal(scratch[1][moved], first[moved]) and scratch[1][~moved].isnan().all()
        assert torch.equal(scratch[0], first)


@pytest.mark.parametrize("arch", CHIPS)
def test_kernel_fills_a_multiprocessor(arch):
    """Catches a spill, narrow loads, and a program so small that a GEMM's fits beside it, as it does not at NCCL's."""
    dtype = torch.bfloat16
    x = meta(8192, 8192, dtype=dtype)
    launch = partial(emulated_nccl.launch, x, meta(2, x.numel(), dtype=dtype), 1 << 20, 8)
    claims = {"has_wide_loads": True, "has_pdl": False}
    case = Case("emulated_nccl", "all_reduce", arch, dtype, "M=8192 N=8192", launch, **claims)
    kernel = case.compile()
    assert case.broken_claims(kernel) == []
    assert kernel.num_warps == 16 and kernel.occupancy == 1
    left = CHIPS[arch].registers - kernel.num_warps * WARP_SIZE * kernel.registers
    assert left < 64 * 4 * WARP_SIZE  # 64 registers for each thread of four warps: less than any GEMM of ours has


def test_calibration_finds_the_share_of_a_time():
    """Catches a kernel that takes another time than was published, and one that never ends."""
    times = []

    def alone_us(share: int) -> float:  # a launch, and then a curve: the more is moved, the faster each element
        times.append(share)
        return 3 + share**0.9 / 1000

    share, us = calibrate(alone_us, 250.0)
    assert us == pytest.approx(250, rel=0.01) and share % 16 == 0 and len(times) < 10
    assert calibrate(alone_us, 2.0) == (0, 3.0)  # less than the launch itself takes


def test_sum_is_late_and_in_order(monkeypatch):
    """Catches a sum that is there before anybody has waited for it, and messages that overtake each other."""
    us = {8: 50_000, 16: 20_000}
    monkeypatch.setattr(emulated_nccl, "published_us", lambda size, num_bytes, peer="": us.get(num_bytes, 0))
    comm, first, second = EmulatedCommunicator(2, "cpu"), torch.ones(2), torch.ones(4)
    handles = [comm.all_reduce_async(x) for x in (first, second)]
    assert torch.equal(first, torch.ones(2)) and torch.equal(second, torch.ones(4))
    handles[1].wait()
    assert torch.equal(first, torch.full((2,), 2.0)) and torch.equal(second, torch.full((4,), 2.0))
    assert torch.equal(comm.all_reduce(first), torch.full((2,), 4.0))
    assert torch.equal(comm.all_reduce_one_shot(first), torch.full((2,), 8.0))


@pytest.mark.gpu
@pytest.mark.parametrize("num_bytes", [1 << 20, 16 << 20, 64 << 20])
def test_emulation_takes_the_published_time_and_is_waited_for(num_bytes):
    """Catches a calibration that misses by more than a tenth, and a stream that does not wait for the other."""
    comm = EmulatedCommunicator(8, "cuda")
    for _ in range(3):
        x = torch.ones(num_bytes // 2, dtype=torch.bfloat16, device="cuda")
        handle = comm.all_reduce_async(x)
        handle.wait()
        assert (x == 8).all()
    assert comm.calibrated_us[NCCL, num_bytes] == pytest.approx(published_us(8, num_bytes), rel=0.1)

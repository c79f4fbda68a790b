"""The kernels of `all_reduce`: read that op's page first, it says what must hold between them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .all_reduce import Peers
from .rms_norm import AddNorm
from .rms_norm_kernel import prefetch_row, store_added_and_normed, warps_for
from .target import has_pdl, launch_options

_BARRIERS = 2  # numbers that one call uses up


@triton.jit
def _address(table_ptr, rank, offset_bytes, like_ptr):
    """A pointer to `like_ptr`'s type: `offset_bytes` into the memory at table[rank]."""
    address = tl.load(table_ptr + rank) + offset_bytes
    return tl.multiple_of(address.to(tl.pointer_type(like_ptr.dtype.element_ty)), 16)  # so loads are 16 bytes wide


@triton.jit
def _signal_and_wait(signals_ptr, number, rank, R: tl.constexpr, R_POW2: tl.constexpr):
    """Returns when the programs of this number have come to barrier `number` on every rank, their stores visible."""
    pid = tl.program_id(0)
    ranks = tl.arange(0, R_POW2)
    is_rank = ranks < R
    tl.debug_barrier()  # the stores of all threads come before the signals of a few
    tables = tl.load(signals_ptr + ranks, mask=is_rank, other=0).to(tl.pointer_type(tl.int32))
    tl.atomic_xchg(tables + pid * R + rank, number, mask=is_rank, sem="release", scope="sys")
    mine = tl.load(signals_ptr + rank).to(tl.pointer_type(tl.int32)) + pid * R
    behind = -1
    while behind < 0:  # differences, as numbers wrap around
        seen = tl.atomic_add(mine + ranks, 0, mask=is_rank, sem="acquire", scope="sys")
        behind = tl.min(tl.where(is_rank, seen - number, 0))
    tl.debug_barrier()  # the waits of a few come before the loads of all threads


@triton.jit
def _sum_in_rank_order(buffers_ptr, like_ptr, half, offs, mask, R: tl.constexpr, BLOCK: tl.constexpr):
    """fp32 [BLOCK]. Reads past L1, which may hold what a peer's memory was."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for r in tl.static_range(R):
        part_ptr = _address(buffers_ptr, r, half, like_ptr)
        total += tl.load(part_ptr + offs, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    return total


@triton.jit
def _all_reduce_one_shot_kernel(
    x_ptr, y_ptr, buffers_ptr, signals_ptr, calls_ptr, num_elements, chunk, half_bytes, rank,
    R: tl.constexpr, R_POW2: tl.constexpr, BARRIERS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pid, num_programs = tl.program_id(0), tl.num_programs(0)
    call = tl.load(calls_ptr + pid)
    half = (call & 1) * half_bytes
    mine_ptr = _address(buffers_ptr, rank, half, x_ptr)
    lane = tl.arange(0, BLOCK)
    if pid * chunk < num_elements:
        for first in range(pid * chunk, num_elements, num_programs * chunk):
            for start in range(0, chunk, BLOCK):
                at = first + start + lane
                mask = (start + lane < chunk) & (at < num_elements)
                tl.store(mine_ptr + at, tl.load(x_ptr + at, mask=mask), mask=mask)
        _signal_and_wait(signals_ptr, call * BARRIERS + 1, rank, R, R_POW2)
        for first in range(pid * chunk, num_elements, num_programs * chunk):
            for start in range(0, chunk, BLOCK):
                at = first + start + lane
                mask = (start + lane < chunk) & (at < num_elements)
                total = _sum_in_rank_order(buffers_ptr, x_ptr, half, at, mask, R, BLOCK)
                tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(calls_ptr + pid, call + 1)


@triton.jit
def _all_reduce_two_shot_kernel(
    x_ptr, y_ptr, buffers_ptr, signals_ptr, calls_ptr, num_elements, slice_elements, half_bytes, rank,
    R: tl.constexpr, R_POW2: tl.constexpr, BARRIERS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pid, num_programs = tl.program_id(0), tl.num_programs(0)
    call = tl.load(calls_ptr + pid)
    half = (call & 1) * half_bytes
    mine_ptr = _address(buffers_ptr, rank, half, x_ptr)
    lane = tl.arange(0, BLOCK)
    if pid * BLOCK < slice_elements:  # a slice is what one rank sums
        for s in range(R):
            for start in range(pid * BLOCK, slice_elements, num_programs * BLOCK):
                offs = start + lane
                at = s * slice_elements + offs
                mask = (offs < slice_elements) & (at < num_elements)
                tl.store(mine_ptr + at, tl.load(x_ptr + at, mask=mask), mask=mask)
        _signal_and_wait(signals_ptr, call * BARRIERS + 1, rank, R, R_POW2)
        for start in range(pid * BLOCK, slice_elements, num_programs * BLOCK):
            offs = start + lane
            at = rank * slice_elements + offs
            mask = (offs < slice_elements) & (at < num_elements)
            total = _sum_in_rank_order(buffers_ptr, x_ptr, half, at, mask, R, BLOCK)
            # In place: of this rank's buffer nobody else reads this slice before the next barrier.
            tl.store(mine_ptr + at, total.to(x_ptr.dtype.element_ty), mask=mask)
        _signal_and_wait(signals_ptr, call * BARRIERS + 2, rank, R, R_POW2)
        for s in range(R):
            owner_ptr = _address(buffers_ptr, s, half, x_ptr)
            for start in range(pid * BLOCK, slice_elements, num_programs * BLOCK):
                offs = start + lane
                at = s * slice_elements + offs
                mask = (offs < slice_elements) & (at < num_elements)
                tl.store(y_ptr + at, tl.load(owner_ptr + at, mask=mask, cache_modifier=".cg"), mask=mask)
    tl.store(calls_ptr + pid, call + 1)


@triton.jit
def _all_reduce_rms_norm_kernel(
    x_ptr, x_bias_ptr, residual_ptr, post_weight_ptr, weight_ptr, bias_ptr, h_ptr, y_ptr,
    buffers_ptr, signals_ptr, calls_ptr, M, half_bytes, rank, eps, residual_multiplier,
    N: tl.constexpr, UNIT_OFFSET: tl.constexpr, CENTERED: tl.constexpr, R: tl.constexpr, R_POW2: tl.constexpr,
    BARRIERS: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        prefetch_row(weight_ptr, N, BLOCK_N)
        prefetch_row(post_weight_ptr, N, BLOCK_N)
        prefetch_row(x_bias_ptr, N, BLOCK_N)
        tl.extra.cuda.gdc_wait()
    pid, num_programs = tl.program_id(0), tl.num_programs(0)
    call = tl.load(calls_ptr + pid)
    half = (call & 1) * half_bytes
    mine_ptr = _address(buffers_ptr, rank, half, x_ptr)
    offs_n = tl.arange(0, BLOCK_N)
    mask = offs_n < N
    if pid < M:
        for m in range(pid, M, num_programs):
            tl.store(mine_ptr + m * N + offs_n, tl.load(x_ptr + m * N + offs_n, mask=mask), mask=mask)
        _signal_and_wait(signals_ptr, call * BARRIERS + 1, rank, R, R_POW2)
        for m in range(pid, M, num_programs):
            at = m * N + offs_n
            x = _sum_in_rank_order(buffers_ptr, x_ptr, half, at, mask, R, BLOCK_N)
            x = x.to(x_ptr.dtype.element_ty).to(tl.float32)  # as the sum alone is rounded
            store_added_and_normed(
                x[None, :], at[None, :], mask[None, :], offs_n,
                x_bias_ptr, residual_ptr, post_weight_ptr, weight_ptr, bias_ptr, h_ptr, y_ptr, eps, residual_multiplier,
                N, UNIT_OFFSET, CENTERED,
            )  # fmt: skip
    tl.store(calls_ptr + pid, call + 1)


def launch_one_shot(x: torch.Tensor, y: torch.Tensor, peers: Peers, chunk: int, programs: int, block: int) -> None:
    """y = sum over ranks of x; both contiguous, not empty."""
    _launch_sum(_all_reduce_one_shot_kernel, x, y, peers, chunk, programs, block)


def launch_two_shot(
    x: torch.Tensor, y: torch.Tensor, peers: Peers, slice_elements: int, programs: int, block: int
) -> None:
    """y = sum over ranks of x; both contiguous, not empty. Of R slices the last may be short."""
    _launch_sum(_all_reduce_two_shot_kernel, x, y, peers, slice_elements, programs, block)


def _launch_sum(kernel, x: torch.Tensor, y: torch.Tensor, peers: Peers, elements: int, programs: int, block: int):
    kernel[(programs,)](
        x, y, peers.buffers, peers.signals, peers.calls, x.numel(), elements, peers.half_bytes, peers.rank,
        R=peers.size, R_POW2=triton.next_power_of_2(peers.size), BARRIERS=_BARRIERS, BLOCK=block, PDL=has_pdl(),
        num_warps=4, **launch_options(),
    )  # fmt: skip


def launch_all_reduce_rms_norm(
    x: torch.Tensor, then: AddNorm, y: torch.Tensor, h: torch.Tensor, peers: Peers, programs: int
) -> None:
    """y and h of `all_reduce_rms_norm`; x, y and h contiguous, not empty."""
    n = x.shape[-1]
    block_n = triton.next_power_of_2(n)
    residual = None if then.residual is None else then.residual.contiguous()
    _all_reduce_rms_norm_kernel[(programs,)](
        x, then.x_bias, residual, then.post_weight, then.weight, then.bias, h, y,
        peers.buffers, peers.signals, peers.calls, x.numel() // n, peers.half_bytes, peers.rank,
        then.eps, then.residual_multiplier, N=n, UNIT_OFFSET=then.unit_offset,
        CENTERED=then.centered or then.bias is not None, R=peers.size, R_POW2=triton.next_power_of_2(peers.size),
        BARRIERS=_BARRIERS, BLOCK_N=block_n, PDL=has_pdl(), num_warps=warps_for(block_n), **launch_options(),
    )  # fmt: skip

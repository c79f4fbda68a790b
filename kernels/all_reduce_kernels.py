"""The kernels of `all_reduce`: read that op's page first, it says what must hold between them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .all_reduce import Peers
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
def _all_reduce_kernel(
    x_ptr,
    y_ptr,
    buffers_ptr,
    signals_ptr,
    calls_ptr,
    num_elements,
    slice_elements,
    half_bytes,
    rank,
    R: tl.constexpr,
    R_POW2: tl.constexpr,
    TWO_SHOT: tl.constexpr,
    BARRIERS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pid, num_programs = tl.program_id(0), tl.num_programs(0)
    call = tl.load(calls_ptr + pid)
    half = (call & 1) * half_bytes
    mine_ptr = _address(buffers_ptr, rank, half, x_ptr)
    lane = tl.arange(0, BLOCK)
    # A slice is what one rank sums: in one-shot the only one, all of x, and every rank sums it.
    if pid * BLOCK < slice_elements:
        for s in range(R if TWO_SHOT else 1):
            for start in range(pid * BLOCK, slice_elements, num_programs * BLOCK):
                offs = start + lane
                at = s * slice_elements + offs
                mask = (offs < slice_elements) & (at < num_elements)
                tl.store(mine_ptr + at, tl.load(x_ptr + at, mask=mask), mask=mask)
        _signal_and_wait(signals_ptr, call * BARRIERS + 1, rank, R, R_POW2)
        if TWO_SHOT:
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
        else:
            for start in range(pid * BLOCK, slice_elements, num_programs * BLOCK):
                at = start + lane
                mask = at < num_elements
                total = _sum_in_rank_order(buffers_ptr, x_ptr, half, at, mask, R, BLOCK)
                tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(calls_ptr + pid, call + 1)


@triton.jit
def _all_reduce_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    bias_ptr,
    weight_ptr,
    z_ptr,
    h_ptr,
    buffers_ptr,
    signals_ptr,
    calls_ptr,
    M,
    H,
    eps,
    half_bytes,
    rank,
    R: tl.constexpr,
    R_POW2: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BARRIERS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    offs = tl.arange(0, BLOCK_H)
    mask = offs < H
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pid, num_programs = tl.program_id(0), tl.num_programs(0)
    call = tl.load(calls_ptr + pid)
    half = (call & 1) * half_bytes
    mine_ptr = _address(buffers_ptr, rank, half, x_ptr)
    if pid < M:
        for m in range(pid, M, num_programs):
            at = m * H + offs
            tl.store(mine_ptr + at, tl.load(x_ptr + at, mask=mask), mask=mask)
        _signal_and_wait(signals_ptr, call * BARRIERS + 1, rank, R, R_POW2)
        weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        for m in range(pid, M, num_programs):
            at = m * H + offs
            y = _sum_in_rank_order(buffers_ptr, x_ptr, half, at, mask, R, BLOCK_H).to(x_ptr.dtype.element_ty)
            if HAS_BIAS:
                bias = tl.load(bias_ptr + offs, mask=mask, other=0.0)
                y = (y.to(tl.float32) + bias.to(tl.float32)).to(x_ptr.dtype.element_ty)
            residual = tl.load(residual_ptr + at, mask=mask, other=0.0)
            h = (residual.to(tl.float32) + y.to(tl.float32)).to(x_ptr.dtype.element_ty)
            tl.store(h_ptr + at, h, mask=mask)
            h = h.to(tl.float32)
            z = h * tl.rsqrt(tl.sum(h * h) / H + eps) * weight
            tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=mask)
    tl.store(calls_ptr + pid, call + 1)


def launch_all_reduce(
    x: torch.Tensor, y: torch.Tensor, peers: Peers, slice_elements: int, two_shot: bool, programs: int, block: int
) -> None:
    """y = sum over ranks of x; both contiguous, not empty."""
    _all_reduce_kernel[(programs,)](
        x,
        y,
        peers.buffers,
        peers.signals,
        peers.calls,
        x.numel(),
        slice_elements,
        peers.half_bytes,
        peers.rank,
        R=peers.size,
        R_POW2=triton.next_power_of_2(peers.size),
        TWO_SHOT=two_shot,
        BARRIERS=_BARRIERS,
        BLOCK=block,
        PDL=has_pdl(),
        num_warps=4,
        **launch_options(),
    )


def launch_all_reduce_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    z: torch.Tensor,
    h: torch.Tensor,
    eps: float,
    peers: Peers,
    programs: int,
) -> None:
    """z and h of `all_reduce_rms_norm`; all contiguous, not empty."""
    features = x.shape[-1]
    block = triton.next_power_of_2(features)
    _all_reduce_rms_norm_kernel[(programs,)](
        x,
        residual,
        x if bias is None else bias,
        weight,
        z,
        h,
        peers.buffers,
        peers.signals,
        peers.calls,
        x.numel() // features,
        features,
        eps,
        peers.half_bytes,
        peers.rank,
        R=peers.size,
        R_POW2=triton.next_power_of_2(peers.size),
        HAS_BIAS=bias is not None,
        BARRIERS=_BARRIERS,
        BLOCK_H=block,
        PDL=has_pdl(),
        num_warps=min(16, max(4, block // 1024)),
        **launch_options(),
    )

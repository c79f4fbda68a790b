"""y = sum over ranks of x, through buffers that every rank can read: one launch, the same bits on every rank.

    one-shot   every rank reads all of everybody's x.              R messages of n, one barrier: for little data
    two-shot   rank r sums slice r, then everybody reads slices.   2 messages of n, two barriers: for more
    one-shot, fused with what follows in a decoder layer:
        h = residual + (y + bias);  z = h / sqrt(mean(h^2) + eps) * weight

Sums are taken in rank order in fp32 and rounded once, and so are the same on every rank. For large tensors NCCL wins;
where the limits lie has not been measured yet (bench/results/not_measured.md).

The barrier. A group launches every kernel with PROGRAMS programs and counts calls on the device, so that a CUDA graph
can repeat a call. Programs of one number meet across ranks; different numbers of one rank never do. `x` of each rank
goes into half `calls % 2` of its buffer:

    rank 0, program p   copy x to A0 | signal, wait | read A0 A1 || copy to B0 | signal, wait | read B0 B1 || ...
    rank 1, program p   copy x to A1 | signal, wait | read A0 A1 || copy to B1 | signal, wait | read B0 B1 || ...

Half A is written again at the third call. The writer has then passed the barrier of the second with at least program
0 of every peer, and a peer starts its second call when all programs of its first have ended (they are on one stream).
So a second barrier, for "all have read", is never needed, whatever part of the data a program had in each call.

What must hold:

  1. every rank makes the same calls in the same order, on one stream, with tensors of the same size;
  2. program 0 has a part in every call (`num_elements > 0`); programs without a part only count;
  3. a signal carries the number of its barrier and waiting is for "at least": an early peer is not lost;
  4. a program's stores come before its signal (release), its peers' stores after the wait (acquire), system-wide.

Sources: the two algorithms are those of the custom all-reduce of TensorRT-LLM and of vLLM, as are buffers used in
turn.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .target import has_pdl, launch_options

PROGRAMS = 32  # of every launch; few enough to run at once beside a GEMM that left them multiprocessors
BLOCK = 1024  # elements that a program moves at a time: 16 bytes a thread in half precision
_BARRIERS = 2  # numbers that one call uses up


class Peers(NamedTuple):
    """A group's buffers as one rank sees them.

    Args:
        buffers: int64 [R], the address of every rank's buffer: two halves of `half_bytes`, 16-byte aligned.
        signals: int64 [R], the address of every rank's signals: int32 [PROGRAMS, R], zero at first.
        calls: int32 [PROGRAMS], zero at first; this rank's own.
        half_bytes: the most that one call can reduce; below 2^31, so that offsets are 32-bit.
    """

    buffers: torch.Tensor
    signals: torch.Tensor
    calls: torch.Tensor
    half_bytes: int
    rank: int
    size: int


def all_reduce_ref(parts: list[torch.Tensor]) -> torch.Tensor:
    """What every rank gets: the sum in rank order, in fp32, rounded once."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


def all_reduce_rms_norm_ref(
    parts: list[torch.Tensor],
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(z, h). Rounds where the unfused sequence does: the sum, the sum with bias, h."""
    y = all_reduce_ref(parts)
    h = residual + (y if bias is None else y + bias)
    scale = torch.rsqrt(h.float().square().mean(-1, keepdim=True) + eps)
    return (h.float() * scale * weight.float()).to(h.dtype), h


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


def _check(x: torch.Tensor, peers: Peers) -> None:
    if not x.is_contiguous():
        raise ValueError(f"x of shape {tuple(x.shape)} and strides {x.stride()} is not contiguous: reduce a copy")
    if (num_bytes := x.numel() * x.element_size()) > peers.half_bytes:
        raise ValueError(f"x has {num_bytes} bytes, the peers' buffers hold {peers.half_bytes}: use NCCL")


def all_reduce(x: torch.Tensor, peers: Peers, two_shot: bool = False, out: torch.Tensor | None = None) -> torch.Tensor:
    """Sum over ranks of x.

    Args:
        x: contiguous, of the same shape and dtype on every rank; at most `peers.half_bytes`.
        two_shot: the algorithm, the same on every rank.
        out: like x, contiguous; may be x.

    Returns:
        `out`, the same bits on every rank.

    Raises:
        ValueError: x is not contiguous or too large.
    """
    _check(x, peers)
    y = torch.empty_like(x) if out is None else out
    if not (n := x.numel()):
        return y
    # A slice starts on 16 bytes.
    align = 16 // x.element_size()
    slice_elements = -(-n // (peers.size * align)) * align if two_shot else n
    _all_reduce_kernel[(PROGRAMS,)](
        x,
        y,
        peers.buffers,
        peers.signals,
        peers.calls,
        n,
        slice_elements,
        peers.half_bytes,
        peers.rank,
        R=peers.size,
        R_POW2=triton.next_power_of_2(peers.size),
        TWO_SHOT=two_shot,
        BARRIERS=_BARRIERS,
        BLOCK=BLOCK,
        PDL=has_pdl(),
        num_warps=4,
        **launch_options(),
    )
    return y


def all_reduce_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    peers: Peers,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(z, h): h = residual + (sum over ranks of x, + bias), z = RMSNorm(h) * weight.

    Args:
        x: [..., H], contiguous, this rank's partial sums; at most `peers.half_bytes`.
        residual: like x; the same on every rank.
        weight: [H].
        bias: [H].

    Returns:
        z and h like x, the same bits on every rank; h has the bits that the unfused sequence gives.

    Raises:
        ValueError: x is not contiguous or too large; shapes that do not fit.
    """
    _check(x, peers)
    features = x.shape[-1]
    if residual.shape != x.shape or not residual.is_contiguous():
        raise ValueError(f"residual is {tuple(residual.shape)}, strides {residual.stride()}; x is {tuple(x.shape)}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != (features,):
            raise ValueError(f"{name} is {tuple(vector.shape)}, x is {tuple(x.shape)}: it must be ({features},)")
    z, h = torch.empty_like(x), torch.empty_like(x)
    if not x.numel():
        return z, h
    block = triton.next_power_of_2(features)
    _all_reduce_rms_norm_kernel[(PROGRAMS,)](
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
    return z, h

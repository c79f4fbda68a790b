"""y = sum over ranks of x, through buffers that every rank can read: one launch, the same bits on every rank.

    one-shot   every rank reads all of everybody's x.              R messages of n, one barrier: for little data
    two-shot   rank r sums slice r, then everybody reads slices.   2 messages of n, two barriers: for more
    one-shot, and what follows in a decoder block (`AddNorm`, any form of it) in the same launch:
        h = residual + (y + x_bias);  z = norm(h)

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

A row that is normed is one program's. Where the plain sum is cut into rows as well (`chunk`), the two are the same call
to the peers: ranks need not agree on what they fuse, which a hook on one of them may forbid there.

Sources: the two algorithms are those of the custom all-reduce of TensorRT-LLM and of vLLM, as are buffers used in
turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .rms_norm import AddNorm, check, rmsnorm_ref

PROGRAMS = 32  # of every launch; few enough to run at once beside a GEMM that left them multiprocessors
BLOCK = 1024  # elements that a program moves at a time: 16 bytes a thread in half precision


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


def peers_over(memory: Sequence[torch.Tensor], rank: int) -> Peers:
    """The Peers of a rank, over a piece of memory of every rank.

        memory[r]   signals | half 0 | half 1       each on 16 bytes

    Args:
        memory: uint8 [n] of each rank, on 16 bytes, readable here, zero until every rank has called this. Keep it.
    """
    size = len(memory)
    signal_bytes = -(-PROGRAMS * size * 4 // 16) * 16
    half_bytes = (memory[rank].numel() - signal_bytes) // 32 * 16
    addresses = torch.tensor([part.data_ptr() for part in memory])
    device = memory[rank].device
    calls = torch.zeros(PROGRAMS, dtype=torch.int32, device=device)
    return Peers((addresses + signal_bytes).to(device), addresses.to(device), calls, half_bytes, rank, size)


def all_reduce_ref(parts: list[torch.Tensor]) -> torch.Tensor:
    """What every rank gets: the sum in rank order, in fp32, rounded once."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


def all_reduce_rms_norm_ref(parts: list[torch.Tensor], then: AddNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """(z, h): the unfused sequence."""
    return then.of(all_reduce_ref(parts), rmsnorm_ref)


def _check(x: torch.Tensor, peers: Peers) -> None:
    if not x.is_contiguous():
        raise ValueError(f"x of shape {tuple(x.shape)} and strides {x.stride()} is not contiguous: reduce a copy")
    if (num_bytes := x.numel() * x.element_size()) > peers.half_bytes:
        raise ValueError(f"x has {num_bytes} bytes, the peers' buffers hold {peers.half_bytes}: use NCCL")


def all_reduce(
    x: torch.Tensor, peers: Peers, two_shot: bool = False, out: torch.Tensor | None = None, chunk: int | None = None
) -> torch.Tensor:
    """Sum over ranks of x.

    Args:
        x: contiguous, of the same shape and dtype on every rank; at most `peers.half_bytes`.
        two_shot: the algorithm, the same on every rank.
        out: like x, contiguous; may be x.
        chunk: in one shot, elements that a program takes at a time, the same on every rank: of a sum that another rank
            may norm, a row's.

    Returns:
        `out`, the same bits on every rank.

    Raises:
        ValueError: x is not contiguous or too large.
    """
    _check(x, peers)
    y = torch.empty_like(x) if out is None else out
    if not (n := x.numel()):
        return y
    from .all_reduce_kernels import launch_one_shot, launch_two_shot

    if two_shot:
        align = 16 // x.element_size()  # a slice starts on 16 bytes
        launch_two_shot(x, y, peers, -(-n // (peers.size * align)) * align, PROGRAMS, BLOCK)
    else:
        launch_one_shot(x, y, peers, chunk or BLOCK, PROGRAMS, BLOCK)
    return y


def all_reduce_rms_norm(x: torch.Tensor, peers: Peers, then: AddNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """(z, h) = then.of(sum over ranks of x).

    Args:
        x: [..., N], contiguous, this rank's partial sums; at most `peers.half_bytes`, rows that `rms_norm.fits`.
        then: the same on every rank.

    Returns:
        z and h like x, the same bits on every rank; h has the bits that the unfused sequence gives.

    Raises:
        ValueError: x is not contiguous or too large; shapes or dtypes that do not fit.
    """
    _check(x, peers)
    check(x, then.weight, then.residual, then.unit_offset, then.post_weight, then.bias, then.centered, then.x_bias)
    h = torch.empty_like(x)
    z = h if then.weight is None else torch.empty_like(x)
    if not x.numel():
        return z, h
    from .all_reduce_kernels import launch_all_reduce_rms_norm

    launch_all_reduce_rms_norm(x, then, z, h, peers, PROGRAMS)
    return z, h

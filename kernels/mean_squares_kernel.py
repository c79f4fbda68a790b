"""The kernel of `mean_squares`, and what of it `rope_and_cache` shares: read that op's page first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .target import has_pdl, launch_options

_MAX_BLOCK = 4096  # elements that a program squares at a time, 32 a thread of 4 warps


def squares_block(width: int) -> int:
    """BLOCK for rows of `width` elements."""
    return min(_MAX_BLOCK, triton.next_power_of_2(max(width, 1)))


@triton.jit
def sum_of_squares(x_ptr, start, stop, BLOCK: tl.constexpr):
    """Of the elements from `start` to `stop`, fp32."""
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, stop, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < stop, other=0.0).to(tl.float32)
        total += x * x
    return tl.sum(total, 0)


@triton.jit
def _mean_squares_kernel(
    x_ptr, y_ptr, stride_xm, q_start, q_stop, k_start, k_stop, q_width, k_width,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    m, i = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    start, stop = tl.where(i == 0, q_start, k_start), tl.where(i == 0, q_stop, k_stop)
    total = sum_of_squares(x_ptr + m * stride_xm, start, stop, BLOCK)
    tl.store(y_ptr + 2 * m + i, total / tl.where(i == 0, q_width, k_width))


def run(x: torch.Tensor, bounds: Sequence[int], widths: Sequence[int]) -> torch.Tensor:
    """The launch; see `mean_squares`."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    y = torch.empty(*x.shape[:-1], 2, dtype=torch.float32, device=x.device)
    if y.numel():
        _mean_squares_kernel[(len(rows), 2)](
            rows, y, rows.stride(0), *bounds, *widths, BLOCK=squares_block(bounds[1] - bounds[0]), PDL=has_pdl(),
            num_warps=4, **launch_options(),
        )  # fmt: skip
    return y

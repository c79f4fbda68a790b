"""The kernel of `rms_norm`, and what of it `rope_and_cache` and `all_reduce` share: read that op's page first."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .target import has_pdl, launch_options, prefetch_l2


@triton.jit
def inverse_rms(x, eps, N: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps), [rows, 1], for x fp32 [rows, BLOCK_N], 0 beyond N."""
    return tl.rsqrt(tl.sum(x * x, 1) / N + eps)[:, None]


@triton.jit
def load_row(row_ptr, offs_n, N: tl.constexpr):
    """A vector [N] as fp32 [1, BLOCK_N], 0 beyond N."""
    return tl.load(row_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_factor(weight_ptr, offs_n, N: tl.constexpr, UNIT_OFFSET: tl.constexpr):
    """What a normed row is multiplied with, fp32 [1, BLOCK_N]."""
    weight = load_row(weight_ptr, offs_n, N)
    return weight + 1 if UNIT_OFFSET else weight


@triton.jit
def _centered(x, offs_n, N: tl.constexpr):
    """x - mean(x), 0 beyond N; the second time takes away what rounding has left of a large mean."""
    for _ in tl.static_range(2):
        x = tl.where((offs_n < N)[None, :], x - (tl.sum(x, 1) / N)[:, None], 0.0)
    return x


@triton.jit
def prefetch_row(row_ptr, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """A vector of weights, if there is one, into L2: what a kernel may read while the one before still runs."""
    if row_ptr is not None:
        if BLOCK_N >= 1024:  # a line of 128 bytes holds 64 weights of 16 bits
            prefetch_l2(row_ptr + tl.minimum(tl.arange(0, BLOCK_N // 64) * 64, N - 1))


@triton.jit
def store_added_and_normed(
    x, rows, mask, offs_n,
    x_bias_ptr, residual_ptr, post_weight_ptr, weight_ptr, bias_ptr, h_ptr, y_ptr, eps, residual_multiplier,
    N: tl.constexpr, UNIT_OFFSET: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    """h, where it is wanted, and y, where there is a weight, of x fp32 [rows, BLOCK_N], 0 beyond N, which go to `rows`
    of contiguous tensors."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    if h_ptr is not None:
        # Rounded where Hugging Face's separate ops round: h is the model's residual stream.
        if x_bias_ptr is not None:
            x = (x + load_row(x_bias_ptr, offs_n, N)).to(dtype).to(tl.float32)
        if post_weight_ptr is not None:
            x *= inverse_rms(x, eps, N) * load_factor(post_weight_ptr, offs_n, N, UNIT_OFFSET)
        else:
            x *= residual_multiplier
        h = x.to(dtype)
        if residual_ptr is not None:
            h = (h.to(tl.float32) + tl.load(residual_ptr + rows, mask=mask, other=0.0).to(tl.float32)).to(dtype)
        tl.store(h_ptr + rows, h, mask=mask)
        x = h.to(tl.float32)
    if weight_ptr is not None:
        if CENTERED:
            x = _centered(x, offs_n, N)
        y = x * inverse_rms(x, eps, N) * load_factor(weight_ptr, offs_n, N, UNIT_OFFSET)
        if bias_ptr is not None:
            y += load_row(bias_ptr, offs_n, N)
        tl.store(y_ptr + rows, y.to(dtype), mask=mask)


@triton.jit
def _rms_norm_kernel(
    x_ptr, x_bias_ptr, residual_ptr, post_weight_ptr, weight_ptr, bias_ptr, h_ptr, y_ptr,
    M, stride_xm, eps, residual_multiplier,
    N: tl.constexpr, UNIT_OFFSET: tl.constexpr, CENTERED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        prefetch_row(weight_ptr, N, BLOCK_N)
        prefetch_row(post_weight_ptr, N, BLOCK_N)
        prefetch_row(x_bias_ptr, N, BLOCK_N)
        tl.extra.cuda.gdc_wait()
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    x = tl.load(x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + offs_n[None, :], mask=mask, other=0.0)
    rows = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    store_added_and_normed(
        x.to(tl.float32), rows, mask, offs_n,
        x_bias_ptr, residual_ptr, post_weight_ptr, weight_ptr, bias_ptr, h_ptr, y_ptr, eps, residual_multiplier,
        N, UNIT_OFFSET, CENTERED,
    )  # fmt: skip


def warps_for(block_elements: int) -> int:
    """Of a program that holds so many elements in registers."""
    return min(32, max(4, block_elements // 512))


def run(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
    unit_offset: bool = False,
    residual_multiplier: float = 1.0,
    post_weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    centered: bool = False,
    x_bias: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """The launch: [y], or [y, h] with a residual, or [h] with a residual and no weight. Rows are at most MAX_WIDTH."""
    n = x.shape[-1]
    rows = x.reshape(-1, n)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = None if residual is None else torch.empty_like(y) if weight is not None else y
    if y.numel():
        block_n = triton.next_power_of_2(n)
        block_m = max(1, 2048 // block_n)  # of short rows a few to a program
        grid = (triton.cdiv(len(rows), block_m),)
        _rms_norm_kernel[grid](
            rows, x_bias, None if residual is None else residual.contiguous(), post_weight, weight, bias, h, y,
            len(rows), rows.stride(0), eps, residual_multiplier, N=n, UNIT_OFFSET=unit_offset,
            CENTERED=centered or bias is not None, BLOCK_M=block_m, BLOCK_N=block_n, PDL=has_pdl(),
            num_warps=warps_for(block_m * block_n), **launch_options(),
        )  # fmt: skip
    return [y] if h is None or h is y else [y, h]

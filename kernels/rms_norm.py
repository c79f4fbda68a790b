"""y = x / sqrt(mean(x^2) + eps) * weight, each row by itself, with the residual addition before it in the same pass.

    plain       y = norm(x) * weight
    residual    h = residual + residual_multiplier * x       y = norm(h) * weight
    post-norm   h = residual + norm(x) * post_weight         y = norm(h) * weight       (gemma2, gemma3; olmo2: y = h)

A row is read once. At decode the launch is what it costs, so the weights are fetched into L2 while the kernel before
still runs. The norm of q and k, head by head, is part of `rope_and_cache`.
"""

from __future__ import annotations

import functools
import logging

import torch
import triton
import triton.language as tl

from .target import has_pdl, launch_options, prefetch_l2

MAX_WIDTH = 32768  # a row lives in the registers of one program; torch norms wider ones

_log = logging.getLogger("tp_runtime")


def rmsnorm_ref(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
    unit_offset: bool = False,
    residual_multiplier: float = 1.0,
    post_weight: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` with torch's own norm: what runs on the CPU."""
    if residual is None:
        return norm_ref(x, weight, eps, unit_offset)
    if post_weight is not None:
        h = residual + norm_ref(x, post_weight, eps, unit_offset)
    else:
        h = residual + (x if residual_multiplier == 1 else x * residual_multiplier)
    return (h if weight is None else norm_ref(h, weight, eps, unit_offset)), h


def norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool) -> torch.Tensor:
    if not unit_offset:
        return torch.rms_norm(x, weight.shape, weight, eps)
    if x.dtype.itemsize >= 4:
        return torch.rms_norm(x, weight.shape, weight + 1, eps)
    return torch.rms_norm(x.float(), weight.shape, weight.float() + 1, eps).to(x.dtype)  # 1 + w takes more than 8 bits


@triton.jit
def inverse_rms(x, eps, N: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps), [rows, 1], for x fp32 [rows, BLOCK_N], 0 beyond N."""
    return tl.rsqrt(tl.sum(x * x, 1) / N + eps)[:, None]


@triton.jit
def load_factor(weight_ptr, offs_n, N: tl.constexpr, UNIT_OFFSET: tl.constexpr):
    """What a normed row is multiplied with, fp32 [1, BLOCK_N]."""
    weight = tl.load(weight_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    return weight + 1 if UNIT_OFFSET else weight


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, post_weight_ptr, weight_ptr, h_ptr, y_ptr, M, stride_xm, eps, residual_multiplier,
    N: tl.constexpr, UNIT_OFFSET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if BLOCK_N >= 1024:  # a line of 128 bytes holds 64 weights of 16 bits
            line = tl.minimum(tl.arange(0, BLOCK_N // 64) * 64, N - 1)
            if weight_ptr is not None:
                prefetch_l2(weight_ptr + line)
            if post_weight_ptr is not None:
                prefetch_l2(post_weight_ptr + line)
        tl.extra.cuda.gdc_wait()
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    x = tl.load(x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + offs_n[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    rows = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]  # of what is contiguous
    if residual_ptr is not None:
        # Rounded where Hugging Face's separate ops round: h is the model's residual stream.
        if post_weight_ptr is not None:
            x *= inverse_rms(x, eps, N) * load_factor(post_weight_ptr, offs_n, N, UNIT_OFFSET)
        else:
            x *= residual_multiplier
        x = x.to(dtype).to(tl.float32) + tl.load(residual_ptr + rows, mask=mask, other=0.0).to(tl.float32)
        h = x.to(dtype)
        tl.store(h_ptr + rows, h, mask=mask)
        x = h.to(tl.float32)
    if weight_ptr is not None:
        y = x * inverse_rms(x, eps, N) * load_factor(weight_ptr, offs_n, N, UNIT_OFFSET)
        tl.store(y_ptr + rows, y.to(dtype), mask=mask)


def run(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
    unit_offset: bool = False,
    residual_multiplier: float = 1.0,
    post_weight: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """The launch: [y], or [y, h] with a residual, or [h] with a residual and no weight."""
    n = x.shape[-1]
    if n > MAX_WIDTH:
        _tell_wide(n)
        return _run_ref(x, weight, eps, residual, unit_offset, residual_multiplier, post_weight)
    rows = x.reshape(-1, n)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = None if residual is None else torch.empty_like(y) if weight is not None else y
    if y.numel():
        block_n = triton.next_power_of_2(n)
        block_m = max(1, 2048 // block_n)  # of short rows a few to a program
        grid = (triton.cdiv(len(rows), block_m),)
        _rms_norm_kernel[grid](
            rows, None if residual is None else residual.contiguous(), post_weight, weight, h, y,
            len(rows), rows.stride(0), eps, residual_multiplier, N=n, UNIT_OFFSET=unit_offset,
            BLOCK_M=block_m, BLOCK_N=block_n, PDL=has_pdl(),
            num_warps=min(32, max(4, block_m * block_n // 512)), **launch_options(),
        )  # fmt: skip
    return [y] if h is None or h is y else [y, h]


@functools.cache
def _tell_wide(n: int) -> None:
    _log.warning("rms_norm: torch norms rows of %d elements; the kernel takes up to %d", n, MAX_WIDTH)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
    unit_offset: bool = False,
    residual_multiplier: float = 1.0,
    post_weight: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; with a residual, of the new residual stream h.

    Args:
        x: [..., N], rows anywhere, each contiguous.
        weight: [N]; None, with a residual only: y is h.
        eps: added to the mean square.
        residual: like x: h = residual + x is normed, and returned as well.
        unit_offset: factors are 1 + weight (Gemma).
        residual_multiplier: h = residual + residual_multiplier * x (Granite).
        post_weight: [N]: h = residual + norm(x) * post_weight; the multiplier does not apply.

    Returns:
        y like x; with a residual (y, h).

    Raises:
        ValueError: shapes or dtypes that do not fit, or nothing to do.

    Numerics: fp32 inside, one rounding for y; h and what is added to it are rounded as Hugging Face's separate ops do.
    """
    if torch.compiler.is_compiling():
        options = (eps, residual, unit_offset, residual_multiplier, post_weight)
        return _unpacked(torch.ops.tp_runtime.rms_norm(x, weight, *options), residual)
    if not x.is_cuda:
        return rmsnorm_ref(x, weight, eps, residual, unit_offset, residual_multiplier, post_weight)
    _check(x, weight, residual, post_weight)
    return _unpacked(run(x, weight, eps, residual, unit_offset, residual_multiplier, post_weight), residual)


def _unpacked(outputs: list[torch.Tensor], residual: torch.Tensor | None):
    return outputs[0] if residual is None else (outputs[0], outputs[-1])


def _check(
    x: torch.Tensor, weight: torch.Tensor | None, residual: torch.Tensor | None, post_weight: torch.Tensor | None
) -> None:
    if residual is None and (weight is None or post_weight is not None):
        raise ValueError("without a residual there is one norm: pass its weight, and no post_weight")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        theirs, ours = (f"{list(t.shape)} {t.dtype}" for t in (residual, x))
        raise ValueError(f"residual is {theirs}, x is {ours}: they must be alike")
    for name, vector in (("weight", weight), ("post_weight", post_weight)):
        if vector is not None and (vector.shape != x.shape[-1:] or not vector.is_contiguous()):
            raise ValueError(f"{name} is {list(vector.shape)}, strides {vector.stride()}; x is {list(x.shape)}: "
                             f"it must be a contiguous [{x.shape[-1]}]")  # fmt: skip


_library = torch.library.Library("tp_runtime", "FRAGMENT")
_library.define(
    "rms_norm(Tensor x, Tensor? weight, float eps, Tensor? residual=None, bool unit_offset=False, "
    "float residual_multiplier=1.0, Tensor? post_weight=None) -> Tensor[]"
)


def _op(x, weight, eps, residual=None, unit_offset=False, residual_multiplier=1.0, post_weight=None):
    _check(x, weight, residual, post_weight)
    launch = run if x.is_cuda else _run_ref
    return launch(x, weight, eps, residual, unit_offset, residual_multiplier, post_weight)


def _run_ref(x, weight, eps, residual, *options) -> list[torch.Tensor]:
    outputs = rmsnorm_ref(x, weight, eps, residual, *options)
    return [outputs] if residual is None else [outputs[1]] if weight is None else list(outputs)


@torch.library.register_fake("tp_runtime::rms_norm", lib=_library)
def _fake(x, weight, eps, residual=None, unit_offset=False, residual_multiplier=1.0, post_weight=None):
    count = 1 if residual is None or weight is None else 2
    return [x.new_empty(x.shape) for _ in range(count)]


_library.impl("rms_norm", _op, "CPU")
_library.impl("rms_norm", _op, "CUDA")

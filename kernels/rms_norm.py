"""y = x / sqrt(mean(x^2) + eps) * weight, each row by itself, with the residual addition before it in the same pass.

    plain       y = norm(x) * weight
    residual    h = residual + residual_multiplier * x       y = norm(h) * weight
    post-norm   h = residual + norm(x) * post_weight         y = norm(h) * weight       (gemma2, gemma3; olmo2: y = h)

With an `x_bias`, x stands for x + x_bias: that of the linear layer before, which could not add it to a part of a sum.
Centered, or with a bias, it is a layer norm (cohere; starcoder2): the row's mean is subtracted before, the bias added
behind.

A row is read once. At decode the launch is what it costs, so the weights are fetched into L2 while the kernel before
still runs. The norm of q and k, head by head, is part of `rope_and_cache`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch

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
    bias: torch.Tensor | None = None,
    centered: bool = False,
    x_bias: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` with torch's own norm: what runs on the CPU."""
    if residual is None:
        return norm_ref(x, weight, eps, unit_offset, bias, centered)
    if x_bias is not None:
        x = x + x_bias
    if post_weight is not None:
        h = residual + norm_ref(x, post_weight, eps, unit_offset)
    else:
        h = residual + (x if residual_multiplier == 1 else x * residual_multiplier)
    return (h if weight is None else norm_ref(h, weight, eps, unit_offset, bias, centered)), h


def norm_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    unit_offset: bool,
    bias: torch.Tensor | None = None,
    centered: bool = False,
) -> torch.Tensor:
    if centered or bias is not None:
        return torch.layer_norm(x, weight.shape, weight, bias, eps)
    if not unit_offset and x.dtype == torch.float32 and x.is_contiguous() and not x.is_cuda:
        # Fewer of torch's operations than torch.rms_norm makes: two thirds of its time for a row.
        length = torch.linalg.vector_norm(x, 2, -1, True)
        square = torch.addcmul(length.new_full((), eps), length, length, value=1 / x.shape[-1])
        return x * torch.rsqrt(square) * weight
    if not unit_offset:
        return torch.rms_norm(x, weight.shape, weight, eps)
    if x.dtype.itemsize >= 4:
        return torch.rms_norm(x, weight.shape, weight + 1, eps)
    return torch.rms_norm(x.float(), weight.shape, weight.float() + 1, eps).to(x.dtype)  # 1 + w takes more than 8 bits


@functools.cache
def fits(n: int) -> bool:
    """Whether the kernel takes rows of n elements; if not, one log line says so."""
    if n > MAX_WIDTH:
        _log.warning("rms_norm: torch norms rows of %d elements; the kernel takes up to %d", n, MAX_WIDTH)
    return n <= MAX_WIDTH


def rms_norm(
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
        bias: [N], of a layer norm: y = (h - mean(h)) / sqrt(variance(h) + eps) * weight + bias.
        centered: a layer norm, also where there is no bias.
        x_bias: [N], with a residual only: added to x before all else.

    Returns:
        y like x; with a residual (y, h).

    Raises:
        ValueError: shapes or dtypes that do not fit, or nothing to do.

    Numerics: fp32 inside, one rounding for y; h and what is added to it are rounded as Hugging Face's separate ops do,
    x + x_bias as a linear layer's output.
    """
    options = (eps, residual, unit_offset, residual_multiplier, post_weight, bias, centered, x_bias)
    if torch.compiler.is_compiling():
        return _unpacked(torch.ops.tp_runtime.rms_norm(x, weight, *options), residual)
    if not x.is_cuda:
        return rmsnorm_ref(x, weight, *options)
    return _unpacked(_op(x, weight, *options), residual)


def _unpacked(outputs: list[torch.Tensor], residual: torch.Tensor | None):
    return outputs[0] if residual is None else (outputs[0], outputs[-1])


class AddNorm(NamedTuple):
    """What a decoder block does with a sum over ranks, to be handed to who makes the sum: `rms_norm`'s arguments.

    Without a residual, as behind the embedding, h is residual_multiplier * x.
    """

    weight: torch.Tensor | None
    eps: float
    residual: torch.Tensor | None = None
    unit_offset: bool = False
    residual_multiplier: float = 1.0
    post_weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    centered: bool = False
    x_bias: torch.Tensor | None = None

    def of(self, x: torch.Tensor, norm: Callable = rms_norm) -> tuple[torch.Tensor, torch.Tensor]:
        """(y, h) for the sum x [..., N]."""
        if self.residual is not None:
            return norm(x, *self)
        h = x if self.residual_multiplier == 1 else x * self.residual_multiplier
        return norm(h, *self), h

    def with_x_bias(self, x_bias: torch.Tensor) -> AddNorm:
        return AddNorm(*self[:-1], x_bias)


def check(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    residual: torch.Tensor | None,
    unit_offset: bool,
    post_weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    centered: bool,
    x_bias: torch.Tensor | None,
) -> None:
    """ValueError for what does not fit, or nothing to do; arguments as of `rms_norm`."""
    if residual is None and (weight is None or post_weight is not None or x_bias is not None):
        raise ValueError("without a residual there is one norm: pass its weight, no post_weight and no x_bias")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        theirs, ours = (f"{list(t.shape)} {t.dtype}" for t in (residual, x))
        raise ValueError(f"residual is {theirs}, x is {ours}: they must be alike")
    if (centered or bias is not None) and (weight is None or post_weight is not None or unit_offset):
        raise ValueError("a layer norm, centered or with a bias, has a weight, no unit_offset and no post_weight")
    vectors = {"weight": weight, "post_weight": post_weight, "bias": bias, "x_bias": x_bias}
    for name, vector in vectors.items():
        if vector is not None and (vector.shape != x.shape[-1:] or not vector.is_contiguous()):
            raise ValueError(f"{name} is {list(vector.shape)}, strides {vector.stride()}; x is {list(x.shape)}: "
                             f"it must be a contiguous [{x.shape[-1]}]")  # fmt: skip


_library = torch.library.Library("tp_runtime", "FRAGMENT")
_library.define(
    "rms_norm(Tensor x, Tensor? weight, float eps, Tensor? residual=None, bool unit_offset=False, "
    "float residual_multiplier=1.0, Tensor? post_weight=None, Tensor? bias=None, bool centered=False, "
    "Tensor? x_bias=None) -> Tensor[]"
)


def _op(
    x, weight, eps,
    residual=None, unit_offset=False, residual_multiplier=1.0, post_weight=None, bias=None, centered=False, x_bias=None,
):  # fmt: skip
    check(x, weight, residual, unit_offset, post_weight, bias, centered, x_bias)
    options = (eps, residual, unit_offset, residual_multiplier, post_weight, bias, centered, x_bias)
    if not x.is_cuda or not fits(x.shape[-1]):
        return _run_ref(x, weight, *options)
    from .rms_norm_kernel import run

    return run(x, weight, *options)


def _run_ref(x, weight, eps, residual, *options) -> list[torch.Tensor]:
    outputs = rmsnorm_ref(x, weight, eps, residual, *options)
    return [outputs] if residual is None else [outputs[1]] if weight is None else list(outputs)


def _fake(x, weight, eps, residual=None, *options):
    count = 1 if residual is None or weight is None else 2
    return [x.new_empty(x.shape) for _ in range(count)]


_library.impl("rms_norm", _op, "CPU")
_library.impl("rms_norm", _op, "CUDA")
_library.impl("rms_norm", _fake, "Meta")

"""y[M, N] = act(x[M, K] @ w[N, K].T (+ bias[N])) (+ residual[M, N]), `w` as Hugging Face stores it; act may be none.

Every local shard of every linear layer goes through `gemm`. On CUDA, what runs a shape is what was measured to be the
fastest there (see `tuned`): one of the kernels of `gemm_kernels`, or torch's GEMM (cuBLAS), which also runs whatever
nobody has measured. Where the kernels win is not measured yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.compiler import is_dynamo_compiling

from .gemm_configs import Config, Decode, Prefill, Vector, chosen
from .tuned import TORCH

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def activation_named(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Torch's activation of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is none of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def gemm_ref(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`gemm` in torch's own operations: fp32 inside, but rounded also before the activation and before the residual."""
    y = F.linear(x, w, bias)
    if activation is not None:
        y = activation_named(activation)(y)
    if residual is not None:
        y += residual
    return y if out is None else out.copy_(y)


CANDIDATES: dict[str, tuple[Config, ...]] = {
    "vector": (
        Vector(block_n=4, block_k=1024, num_warps=4, num_stages=4),
        Vector(block_n=8, block_k=512, num_warps=4, num_stages=5),
        Vector(block_n=8, block_k=1024, num_warps=4, num_stages=3),
        Vector(block_n=8, block_k=1024, num_warps=4, num_stages=5),
        Vector(block_n=16, block_k=512, num_warps=4, num_stages=4),
    ),
    "decode": (
        Decode(block_n=32, block_k=128, programs_per_sm=2, num_warps=4, num_stages=5),
        Decode(block_n=32, block_k=128, programs_per_sm=4, num_warps=4, num_stages=4),
        Decode(block_n=64, block_k=64, programs_per_sm=2, num_warps=4, num_stages=6),
        Decode(block_n=64, block_k=128, programs_per_sm=0, num_warps=4, num_stages=5),
        Decode(block_n=64, block_k=128, programs_per_sm=1, num_warps=4, num_stages=5),
        Decode(block_n=64, block_k=128, programs_per_sm=2, num_warps=4, num_stages=3),
        Decode(block_n=64, block_k=128, programs_per_sm=2, num_warps=4, num_stages=5),
        Decode(block_n=64, block_k=128, programs_per_sm=3, num_warps=4, num_stages=3),
        Decode(block_n=64, block_k=256, programs_per_sm=1, num_warps=4, num_stages=3),
        Decode(block_n=128, block_k=64, programs_per_sm=1, num_warps=8, num_stages=5),
        Decode(block_n=128, block_k=64, programs_per_sm=2, num_warps=8, num_stages=4),
        Decode(block_n=128, block_k=128, programs_per_sm=1, num_warps=8, num_stages=3),
    ),
    "prefill": (
        Prefill(block_m=64, block_n=64, block_k=128, group_m=8, num_warps=4, num_stages=4),
        Prefill(block_m=64, block_n=128, block_k=64, group_m=8, num_warps=4, num_stages=5),
        Prefill(block_m=64, block_n=256, block_k=64, group_m=8, num_warps=4, num_stages=4),
        Prefill(block_m=128, block_n=128, block_k=64, group_m=8, num_warps=4, num_stages=4),
        Prefill(block_m=128, block_n=128, block_k=64, group_m=8, num_warps=8, num_stages=4),
        Prefill(block_m=128, block_n=128, block_k=64, group_m=8, num_warps=8, num_stages=4, flatten=True),
        Prefill(block_m=128, block_n=256, block_k=64, group_m=8, num_warps=8, num_stages=3),
        Prefill(block_m=128, block_n=256, block_k=64, group_m=8, num_warps=8, num_stages=3, flatten=True),
        Prefill(block_m=256, block_n=128, block_k=64, group_m=8, num_warps=8, num_stages=3),
        Prefill(block_m=128, block_n=128, block_k=64, group_m=8, num_warps=4, num_stages=4, specialize=True),
        Prefill(block_m=128, block_n=256, block_k=64, group_m=8, num_warps=4, num_stages=3, specialize=True),
        Prefill(block_m=256, block_n=128, block_k=64, group_m=8, num_warps=4, num_stages=3, specialize=True),
    ),
}


def candidates(m: int, n: int, k: int, dtype: torch.dtype) -> Iterator[tuple[str, Config]]:
    """(kernel, configuration) that may be the fastest for a shape on the architecture that is compiled for."""
    from .gemm_launch import candidates_for

    return candidates_for(m, k, CANDIDATES, gated=False)


def run(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    out: torch.Tensor | None = None,
    *,
    kernel: str,
    config: Config | None = None,
    num_sms: int | None = None,
) -> torch.Tensor:
    """`gemm` by the kernel of this name, or "torch", in this configuration, whatever was measured.

    Raises:
        ValueError: the operands do not fit together, or the kernel does not take such ones.
    """
    check(x, w, bias, residual, activation, num_sms, out)
    if kernel == TORCH:
        return gemm_ref(x, w, bias, residual, activation, out)
    return _launch(x, w, bias, residual, activation, num_sms, out, config)


def gemm(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    out: torch.Tensor | None = None,
    num_sms: int | None = None,
) -> torch.Tensor:
    """act(x @ w.T (+ bias)) (+ residual).

    Args:
        x: [..., K].
        w: [N, K]; any dimension may be 0 (a rank that holds no part of a layer).
        bias: [N].
        residual: [..., N].
        activation: silu, gelu (exact) or gelu_tanh; None: the identity.
        out: [..., N], where to write; may be a block of columns of a wider tensor.
        num_sms: multiprocessors that a GEMM of many tokens takes, so that communication keeps the others; None: all.
            cuBLAS takes all, and so do the kernels for few tokens, whose launches are short.

    Returns:
        [..., N] in x's dtype; `out` where that is given. The same bits at every call.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the activation is none of these. (On the CPU torch's own
            RuntimeError, for x, w and bias.)

    Numerics: the kernels accumulate in fp32 and round once, at the end; torch also before activation and residual.
    """
    if is_dynamo_compiling():
        y = torch.ops.tp_runtime.gemm(x, w, bias, residual, activation, num_sms)
        return y if out is None else out.copy_(y)
    if x.is_cuda:
        return _gemm_cuda(x, w, bias, residual, activation, num_sms, out)
    if residual is not None or out is not None:
        check(x, w, bias, residual, activation, num_sms, out)  # torch would broadcast
    elif activation is None:
        return F.linear(x, w, bias)
    return gemm_ref(x, w, bias, residual, activation, out)


def _gemm_cuda(x, w, bias=None, residual=None, activation=None, num_sms=None, out=None) -> torch.Tensor:
    check(x, w, bias, residual, activation, num_sms, out)
    config = chosen("gemm", CANDIDATES, len(w), x, w, residual, out)
    if config is None:
        return gemm_ref(x, w, bias, residual, activation, out)
    return _launch(x, w, bias, residual, activation, num_sms, out, config)


def _launch(x, w, bias, residual, activation, num_sms, out, config) -> torch.Tensor:
    from .gemm_launch import launch

    y = x.new_empty(*x.shape[:-1], len(w)) if out is None else out
    return launch(x, w, None, bias, residual, y, activation, config, num_sms)


def check(x, w, bias=None, residual=None, activation=None, num_sms=None, out=None) -> None:
    """Raise ValueError unless the operands of `gemm` fit together."""
    if activation is not None:
        activation_named(activation)
    if w.ndim != 2 or x.ndim == 0:
        raise ValueError(f"x is {list(x.shape)} and w is {list(w.shape)}, not [..., K] and [N, K]")
    rows, (n, k) = x.shape[:-1], w.shape
    operands = {"x": (x, (*rows, k)), "w": (w, (n, k)), "bias": (bias, (n,))}
    check_operands({**operands, "residual": (residual, (*rows, n)), "out": (out, (*rows, n))}, num_sms)


def check_operands(operands: dict[str, tuple[Any, tuple[int, ...]]], num_sms: int | None) -> None:
    """Raise ValueError unless each operand, name -> (tensor or None, wanted shape), fits, also x's dtype and device."""
    x = operands["x"][0]
    for name, (tensor, shape) in operands.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            shapes = ", ".join(f"{other} {list(t.shape)}" for other, (t, _) in operands.items() if t is not None)
            raise ValueError(f"{name} is not {list(shape)}: {shapes}")
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, but x {x.dtype} on {x.device}")
    if num_sms is not None and num_sms < 1:
        raise ValueError(f"num_sms={num_sms} leaves no multiprocessor to compute on")


_library = torch.library.Library("tp_runtime", "FRAGMENT")
_library.define(
    "gemm(Tensor x, Tensor w, Tensor? bias=None, Tensor? residual=None, str? activation=None, int? num_sms=None)"
    " -> Tensor"
)
_library.impl(
    "gemm",
    lambda x, w, bias=None, residual=None, activation=None, num_sms=None: gemm_ref(x, w, bias, residual, activation),
    "CPU",
)
_library.impl("gemm", _gemm_cuda, "CUDA")


def _gemm_fake(x, w, bias=None, residual=None, activation=None, num_sms=None):
    torch._check(x.shape[-1] == w.shape[1], lambda: f"x is {x.shape}, w is {w.shape}")
    return x.new_empty(*x.shape[:-1], w.shape[0])


_library.impl("gemm", _gemm_fake, "Meta")

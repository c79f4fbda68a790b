"""y[M, I] = act(x[M, K] @ w_gate[I, K].T + b_gate) * (x @ w_up[I, K].T + b_up): the first half of a gated FFN.

One pass over x, and the [M, 2 * I] between GEMM and product is never written. The kernels and their choice are those of
`gemm`, with two accumulators. Where they win over torch's GEMM and two more kernels is not measured yet.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.compiler import is_dynamo_compiling

from .gemm import activation_named, check_operands
from .gemm_configs import Config, Decode, Prefill, Vector, chosen
from .tuned import TORCH


def gated_gemm_ref(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation: str = "silu",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`gated_gemm` in torch's own operations: fp32 inside, but gate, up and act(gate) are each rounded as well."""
    if w_up is None:
        gate, up = F.linear(x, w_gate, bias).chunk(2, -1)
    else:
        b_gate, b_up = (None, None) if bias is None else bias.chunk(2)
        gate, up = F.linear(x, w_gate, b_gate), F.linear(x, w_up, b_up)
    y = activation_named(activation)(gate).mul_(up)
    return y if out is None else out.copy_(y)


CANDIDATES: dict[str, tuple[Config, ...]] = {
    "vector": (
        Vector(block_n=4, block_k=512, num_warps=4, num_stages=5),
        Vector(block_n=4, block_k=1024, num_warps=4, num_stages=4),
        Vector(block_n=8, block_k=512, num_warps=4, num_stages=4),
        Vector(block_n=8, block_k=1024, num_warps=4, num_stages=3),
    ),
    "decode": (
        Decode(block_n=32, block_k=128, programs_per_sm=2, num_warps=4, num_stages=4),
        Decode(block_n=64, block_k=64, programs_per_sm=0, num_warps=4, num_stages=5),
        Decode(block_n=64, block_k=64, programs_per_sm=2, num_warps=4, num_stages=4),
        Decode(block_n=64, block_k=128, programs_per_sm=0, num_warps=4, num_stages=3),
        Decode(block_n=64, block_k=128, programs_per_sm=1, num_warps=4, num_stages=4),
        Decode(block_n=64, block_k=128, programs_per_sm=2, num_warps=4, num_stages=3),
        Decode(block_n=128, block_k=64, programs_per_sm=1, num_warps=8, num_stages=4),
    ),
    "prefill": (
        Prefill(block_m=64, block_n=64, block_k=64, group_m=8, num_warps=4, num_stages=6),
        Prefill(block_m=64, block_n=128, block_k=64, group_m=8, num_warps=4, num_stages=4),
        Prefill(block_m=128, block_n=64, block_k=64, group_m=8, num_warps=4, num_stages=4),
        Prefill(block_m=128, block_n=128, block_k=64, group_m=8, num_warps=8, num_stages=3),
        Prefill(block_m=128, block_n=128, block_k=64, group_m=8, num_warps=8, num_stages=4),
        Prefill(block_m=128, block_n=128, block_k=64, group_m=8, num_warps=8, num_stages=3, flatten=True),
        Prefill(block_m=128, block_n=64, block_k=64, group_m=8, num_warps=4, num_stages=4, specialize=True),
        Prefill(block_m=128, block_n=128, block_k=64, group_m=8, num_warps=4, num_stages=3, specialize=True),
    ),
}


def candidates(m: int, n: int, k: int, dtype: torch.dtype) -> Iterator[tuple[str, Config]]:
    """(kernel, configuration) that may be the fastest, N being I, on the architecture that is compiled for."""
    from .gemm_launch import candidates_for

    return candidates_for(m, k, CANDIDATES, gated=True)


def run(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation: str = "silu",
    out: torch.Tensor | None = None,
    *,
    kernel: str,
    config: Config | None = None,
    num_sms: int | None = None,
) -> torch.Tensor:
    """`gated_gemm` by the kernel of this name, or "torch", in this configuration, whatever was measured.

    Raises:
        ValueError: the operands do not fit together, or the kernel does not take such ones.
    """
    check(x, w_gate, w_up, bias, activation, num_sms, out)
    if kernel == TORCH:
        return gated_gemm_ref(x, w_gate, w_up, bias, activation, out)
    return _launch(x, *_halves(w_gate, w_up), bias, activation, num_sms, out, config)


def gated_gemm(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation: str = "silu",
    out: torch.Tensor | None = None,
    num_sms: int | None = None,
) -> torch.Tensor:
    """act(x @ w_gate.T) * (x @ w_up.T).

    Args:
        x: [..., K].
        w_gate: [I, K]; or gate and up stacked, [2 * I, K], and `w_up` None.
        w_up: [I, K].
        bias: [2 * I], of gate and of up.
        activation: silu, gelu (exact) or gelu_tanh.
        out, num_sms: as in `gemm`.

    Returns:
        [..., I] in x's dtype; `out` where that is given. The same bits at every call.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the activation is none of these. (On the CPU torch's own
            RuntimeError, for x, w and bias.)

    Numerics: the kernels accumulate in fp32, and round once, after the product.
    """
    if is_dynamo_compiling():
        y = torch.ops.tp_runtime.gated_gemm(x, w_gate, w_up, bias, activation, num_sms)
        return y if out is None else out.copy_(y)
    if x.is_cuda:
        return _gated_gemm_cuda(x, w_gate, w_up, bias, activation, num_sms, out)
    if out is not None:
        check(x, w_gate, w_up, bias, activation, num_sms, out)
    return gated_gemm_ref(x, w_gate, w_up, bias, activation, out)


def _gated_gemm_cuda(x, w_gate, w_up=None, bias=None, activation="silu", num_sms=None, out=None) -> torch.Tensor:
    check(x, w_gate, w_up, bias, activation, num_sms, out)
    gate, up = _halves(w_gate, w_up)
    config = chosen("gated_gemm", CANDIDATES, len(gate), x, gate, up, out)
    if config is None:
        return gated_gemm_ref(x, w_gate, w_up, bias, activation, out)
    return _launch(x, gate, up, bias, activation, num_sms, out, config)


def _halves(w_gate: torch.Tensor, w_up: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    if w_up is not None:
        return w_gate, w_up
    width = len(w_gate) // 2
    return w_gate[:width], w_gate[width:]


def _launch(x, gate, up, bias, activation, num_sms, out, config) -> torch.Tensor:
    from .gemm_launch import launch

    y = x.new_empty(*x.shape[:-1], len(gate)) if out is None else out
    return launch(x, gate, up, bias, None, y, activation, config, num_sms)


def check(x, w_gate, w_up=None, bias=None, activation="silu", num_sms=None, out=None) -> None:
    """Raise ValueError unless the operands of `gated_gemm` fit together."""
    activation_named(activation)
    if w_gate.ndim != 2 or x.ndim == 0 or (w_up is None and len(w_gate) % 2):
        raise ValueError(f"x is {list(x.shape)} and w_gate {list(w_gate.shape)}, not [..., K] and [2 * I, K] or [I, K]")
    rows, (n, k) = x.shape[:-1], w_gate.shape
    width = n // 2 if w_up is None else n
    operands = {"x": (x, (*rows, k)), "w_gate": (w_gate, (n, k)), "w_up": (w_up, (n, k)), "bias": (bias, (2 * width,))}
    check_operands({**operands, "out": (out, (*rows, width))}, num_sms)


_library = torch.library.Library("tp_runtime", "FRAGMENT")
_library.define(
    "gated_gemm(Tensor x, Tensor w_gate, Tensor? w_up=None, Tensor? bias=None, str activation='silu',"
    " int? num_sms=None) -> Tensor"
)
_library.impl(
    "gated_gemm",
    lambda x, w_gate, w_up=None, bias=None, activation="silu", num_sms=None: gated_gemm_ref(
        x, w_gate, w_up, bias, activation
    ),
    "CPU",
)
_library.impl("gated_gemm", _gated_gemm_cuda, "CUDA")


def _gated_gemm_fake(x, w_gate, w_up=None, bias=None, activation="silu", num_sms=None):
    torch._check(x.shape[-1] == w_gate.shape[1], lambda: f"x is {x.shape}, w_gate is {w_gate.shape}")
    return x.new_empty(*x.shape[:-1], w_gate.shape[0] // 2 if w_up is None else w_gate.shape[0])


_library.impl("gated_gemm", _gated_gemm_fake, "Meta")

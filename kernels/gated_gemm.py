"""y[M, I] = act(x[M, K] @ w_gate[I, K].T) * (x @ w_up[I, K].T): the first half of a gated FFN, in one pass over x."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def gated_gemm(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation: str = "silu",
) -> torch.Tensor:
    """act(x @ w_gate.T) * (x @ w_up.T).

    Args:
        x: [..., K].
        w_gate: [I, K]; or gate and up stacked, [2 * I, K], and `w_up` None.
        w_up: [I, K].
        bias: [2 * I], of gate and of up.
        activation: silu, gelu (exact) or gelu_tanh.

    Returns:
        [..., I] in x's dtype.
    """
    gate, up = F.linear(x, w_gate if w_up is None else torch.cat((w_gate, w_up)), bias).chunk(2, -1)
    return ACTIVATIONS[activation](gate).mul_(up)

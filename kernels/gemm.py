"""y[M, N] = x[M, K] @ w[N, K].T (+ bias[N]), `w` as Hugging Face stores it.

Every local shard of every linear layer goes through this function. It is torch's GEMM today, on the CPU and on CUDA.
"""

import torch
import torch.nn.functional as F


def gemm(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ w.T + bias.

    Args:
        x: [..., K].
        w: [N, K]; N or K may be 0 (a rank that holds no part of the layer).
        bias: [N].

    Returns:
        [..., N] in x's dtype.
    """
    return F.linear(x, w, bias)

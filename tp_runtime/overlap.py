"""A row-parallel GEMM and the all-reduce of its partial sums.

The program, whatever the schedule:

    y = x_shard_k @ w_shard_k.T        [M, N], this rank's part of the sum over K
    y = sum of y over ranks            same bits on every rank
    y = y + bias

The one schedule of this file runs these lines in this order:

    compute   [ gemm ]
    comm               [ all-reduce ]
"""

from __future__ import annotations

import torch

from .comm import Communicator
from .kernels.gemm import gemm


def row_parallel(
    x_shard_k: torch.Tensor, w_shard_k: torch.Tensor, bias: torch.Tensor | None, comm: Communicator
) -> torch.Tensor:
    """sum over ranks of x_shard_k @ w_shard_k.T, plus bias once.

    Args:
        x_shard_k: [..., K_r], this rank's input features.
        w_shard_k: [N, K_r].
        bias: [N], the same on every rank.

    Returns:
        [..., N], the same bits on every rank.
    """
    y = comm.all_reduce(gemm(x_shard_k, w_shard_k))
    return y if bias is None else y.add_(bias)

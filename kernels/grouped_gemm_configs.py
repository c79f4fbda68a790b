"""How the kernels of `grouped_gemm_kernels` are configured."""

from __future__ import annotations

from typing import NamedTuple

import torch

DECODE_T = 64  # most tokens of the decode kernels


class Decode(NamedTuple):
    """Rows of gate, of up and of down in a tile, columns in a step. K is split so that there are at most
    `programs_per_sm` programs for each multiprocessor; 0: not split.
    """

    block_n: int
    block_k: int
    programs_per_sm: int
    num_warps: int
    num_stages: int


class Prefill(NamedTuple):
    """A tile of gate and of up, [block_m, block_n] each; down's is twice as wide. `swap`: weights are the left operand
    of the tensor cores, for few rows an expert. `tma`: weights, and the input of down, come by TMA.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    swap: bool
    tma: bool
    num_warps: int
    num_stages: int
    programs_per_sm: int = 1


Config = Decode | Prefill


def lie_on_16_bytes(hidden: int, gate_up_proj: torch.Tensor, down_proj: torch.Tensor) -> bool:
    """Whether rows of both weights and of h, [.., I], begin at multiples of 16 bytes, with nothing between them."""
    lane, width = 16 // down_proj.itemsize, down_proj[0].numel() // hidden
    is_even = hidden % lane == 0 == width % lane
    return is_even and all(w.is_contiguous() and w.data_ptr() % 16 == 0 for w in (gate_up_proj, down_proj))

"""How the kernels of `gemm_kernels` are configured, and which configuration a call takes."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from .tuned import TORCH, lookup

_log = logging.getLogger("tp_runtime")


class Vector(NamedTuple):
    """A program's rows of w, the columns that it takes a step, and how many steps it loads ahead."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class Decode(NamedTuple):
    """As Vector. K is split as long as there are at most `programs_per_sm` programs a multiprocessor; 0: not at all."""

    block_n: int
    block_k: int
    programs_per_sm: int
    num_warps: int
    num_stages: int


class Prefill(NamedTuple):
    """A tile of y, the columns of x and w in a step, and how the compiler pipelines the persistent loop."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    flatten: bool = False
    specialize: bool = False


Config = Vector | Decode | Prefill
Configs = Mapping[str, Sequence[Config]]  # by the kernel's name
MAX_STRIDE = 2**31 // 128  # 128: most rows of a tile whose offsets have 32 bits


def has_rows(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a matrix of contiguous rows, at equal distances, which 32 bits can multiply by a tile's."""
    outer = [(size, stride) for size, stride in zip(tensor.shape[:-1], tensor.stride()) if size > 1]
    if tensor.stride(-1) != 1 or (outer and outer[-1][1] >= MAX_STRIDE):
        return False
    return all(stride == size * inner for (_, stride), (size, inner) in zip(outer, outer[1:]))


def as_rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None:
        return None
    if not has_rows(tensor):
        raise ValueError(
            f"shape {list(tensor.shape)} in strides {list(tensor.stride())} is no matrix of contiguous rows"
        )
    return tensor.view(-1, tensor.shape[-1])


def has_tma_layout(*tensors: torch.Tensor | None) -> bool:
    """Whether TMA can describe these matrices: base and rows at multiples of 16 bytes."""
    return all(t is None or t.data_ptr() % 16 == t.stride(0) * t.itemsize % 16 == 0 for t in tensors)


def chosen(op: str, configs: Configs, n: int, x: torch.Tensor, *others: torch.Tensor | None) -> Config | None:
    """What was measured to be the fastest for y[..., N] on x's device; None: torch.

    Args:
        x: [..., K].
        others: w, up, residual, out, as far as there are any: with x, all that a kernel reads or writes by rows.
    """
    given = (x, *(tensor for tensor in others if tensor is not None))
    if x.dtype not in (torch.bfloat16, torch.float16) or n == 0 or x.numel() == 0 or _differentiated(*given):
        return None
    k = x.shape[-1]
    m = x.numel() // k
    row = lookup(op, x, n, k, m, configs)
    if row is None or row["kernel"] == TORCH:
        return None
    config = row["config"]
    if not all(map(has_rows, given)) or (isinstance(config, Prefill) and not has_tma_layout(*map(as_rows, given))):
        _say(f"{op} {m}x{n}x{k}: torch runs it, a tensor's rows do not lie as the {row['kernel']} kernel reads them")
        return None
    return config


def _differentiated(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


@functools.cache
def _say(message: str) -> None:
    _log.warning(message)

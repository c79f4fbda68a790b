"""How the kernel of `decode_attention` and `rope_decode_attention` is launched, and its configurations."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton

from . import target
from .decode_attention_kernel import _decode_attention_kernel
from .lost import lost_note
from .rope_kernel import wide_block

MAX_PARTS = 128
_MERGED = 4096  # elements that the last program merges at a time, in registers


class Config(NamedTuple):
    """One way to cut the work: tiles of tile_kib KiB of keys and of values, programs for each multiprocessor."""

    tile_kib: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


CANDIDATES = {
    "split": (
        Config(16, 4, 3, 2),
        Config(16, 4, 4, 1),
        Config(16, 4, 2, 3),
        Config(8, 4, 4, 3),
        Config(32, 8, 3, 1),
    )
}


class New(NamedTuple):
    """What q, k and v of one new token of each sequence are made of; see `rope_and_cache`."""

    cos: torch.Tensor | None
    signed_sin: torch.Tensor | None
    q_weight: torch.Tensor | None
    k_weight: torch.Tensor | None
    eps: float
    unit_offset: bool
    pairs: bool = False
    mean_squares: torch.Tensor | None = None


def run(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    kv_of_query: tuple[int, ...] | None = None,
    lengths: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    *,
    new: New | None = None,
    ahead: int | None = None,
    config: Config | None = None,
    num_sms: int | None = None,
) -> torch.Tensor:
    """The launch; see `decode_attention`.

    Args:
        q: with `new`: [B, H_q, 1, D], before norm and rotation, as a view of qkv, whose row goes on with k and v.
        lengths: [B], or one element for all. ahead: a sequence is that many tokens longer than it says there.
        num_sms: multiprocessors to fill; None: those of the device.
    """
    config = config or CANDIDATES["split"][0]
    batch, num_heads, length, head_dim = q.shape
    num_kv_heads, capacity = keys.shape[1:3]
    y = torch.empty(batch, length, num_heads * head_dim, dtype=q.dtype, device=q.device)
    if not y.numel():
        return y
    group = num_heads // num_kv_heads if kv_of_query is None else max(map(kv_of_query.count, kv_of_query))
    heads = None if kv_of_query is None else _heads_of_kv(kv_of_query, num_kv_heads, q.device)
    if ahead is None:
        ahead = capacity if lengths is None else 0
    rows, block_d = triton.next_power_of_2(group * length), triton.next_power_of_2(head_dim)
    block_s = max(16, config.tile_kib * 1024 // (block_d * q.element_size()))
    places = (num_sms or target.num_sms(q.device)) * config.programs_per_sm
    max_splits = min(max(1, places // (batch * num_kv_heads)), MAX_PARTS, 2048 // rows)
    most = triton.next_power_of_2(max_splits)
    splits = _parts(ahead if lengths is None else capacity, rows, length, block_s, window, max_splits)
    partials = arrived = None
    if max_splits > 1:
        floats = batch * num_kv_heads * splits * rows * (head_dim + 2)
        partials = torch.empty(floats, dtype=torch.float32, device=q.device)
        arrived = target.arrival_counters(q.device)
    is_bool = mask is not None and mask.dtype == torch.bool
    if mask is not None:
        mask = (mask.view(torch.uint8) if is_bool else mask).expand(batch, num_heads, length, -1)
    few = rows <= 16  # else as many as the tensor cores from sm_90 on take at a time
    note = None if new is None or lengths is None else lost_note(q.device, "position")
    cos, signed_sin, q_weight, k_weight, eps, unit_offset, pairs, means = new or New(None, None, None, None, 0.0, False)
    _decode_attention_kernel[(splits, num_kv_heads, batch)](
        q, keys, values, heads, lengths, mask, sinks, y, partials, arrived, note, cos, signed_sin, q_weight, k_weight,
        None if means is None else means.contiguous(), scale, window, softcap, eps, ahead, capacity, num_heads,
        0 if lengths is None or lengths.numel() == 1 else lengths.stride(0),
        0 if cos is None or cos.shape[0] == 1 else cos.stride(0),
        *q.stride()[:3], *keys.stride()[:3], *values.stride()[:3], *((0, 0, 0) if mask is None else mask.stride()[:3]),
        D=head_dim, GROUP=group, S_Q=length, ROWS=rows, MERGE=min(most, max(1, _MERGED // (rows * block_d))),
        MAX_SPLITS=most, IS_BOOL=is_bool, IS_NEW=new is not None, R=head_dim if cos is None else cos.shape[-1],
        PAIRS=pairs, UNIT_OFFSET=unit_offset, WIDE=wide_block(q_weight, num_heads, head_dim, means),
        BLOCK_M=16 if few else 64, BLOCK_S=block_s, BLOCK_D=block_d, PDL=target.has_pdl(),
        num_warps=config.num_warps if few else 8, num_stages=config.num_stages, **target.launch_options(),
    )  # fmt: skip
    return y


def _parts(reach: int, rows: int, length: int, block_s: int, window: int | None, most: int) -> int:
    """How many parts to cut `reach` keys into: as fill the GPU, but a tile each at least.

    And at most sqrt(reach / rows): then the last program, which reads all parts in fp32, reads as many bytes as any
    other read of the cache; beyond that it would be the slowest.
    """
    if window is not None:
        reach = min(reach, window + length - 1)
    return max(1, min(most, triton.cdiv(reach, block_s), math.isqrt(reach // rows)))


@functools.lru_cache(maxsize=64)
def _heads_of_kv(kv_of_query: tuple[int, ...], num_kv_heads: int, device: torch.device) -> torch.Tensor:
    """int32 [H_kv, most query heads of one]: the query heads that read each key/value head; -1 behind the last."""
    heads = [[i for i, kv in enumerate(kv_of_query) if kv == own] for own in range(num_kv_heads)]
    most = max(map(len, heads))
    return torch.tensor([own + [-1] * (most - len(own)) for own in heads], dtype=torch.int32, device=device)

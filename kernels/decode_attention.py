"""o = softmax(scale * q @ k.T) @ v for one or a few new tokens of each sequence, over all that its cache holds.

    scores = scale * q @ k.T;  scores = softcap * tanh(scores / softcap);  scores += mask;  softmax;  @ v

Bound by the bytes of the cache, which are read once: a program takes all query heads that read one key/value head, and
a part of the sequence. Parts are as many as fill the GPU at the cache's capacity; how long they are depends on the
sequence's length, which only the device knows, so a CUDA graph can replay the launch while sequences grow:

    length 1000, 4 parts       [0, 256) [256, 512) [512, 768) [768, 1000)       multiples of BLOCK_S
    length 100                 [0, 64) [64, 100)                                two programs end at once

Each part leaves its own maximum, sum and output; the last one to arrive merges them all, in the order of the sequence:
one launch, the same bits at each run.

Source of the split: Flash-Decoding. Nothing is measured yet on a GPU.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F

MAX_HEAD_SIZE = 256
MAX_ROWS = 64  # of a program: query heads of one key/value head times new tokens

_log = logging.getLogger("tp_runtime")


def decode_attention_ref(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    kv_of_query: Sequence[int] | None = None,
    lengths: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """`decode_attention` with torch's SDPA, or in plain torch where SDPA has no word for it."""
    batch, num_heads, length, head_dim = q.shape
    num_kv_heads, capacity = keys.shape[1:3]
    if kv_of_query is not None:
        keys, values = (_one_for_each_query(heads, kv_of_query) for heads in (keys, values))
    if lengths is not None or window is not None or (mask is None and length > 1):
        mask = _visible(length, capacity, lengths, mask, window, q.device)
    if softcap is None and sinks is None:
        is_grouped = kv_of_query is None and num_heads != num_kv_heads
        if is_grouped and mask is not None and length == 1:
            # Where heads are grouped, a mask keeps torch from its fast kernels: one's heads become rows.
            q = q.reshape(batch, num_kv_heads, -1, head_dim)
            if mask.shape[1] > 1:
                mask = mask.expand(batch, num_heads, 1, capacity).reshape(batch, num_kv_heads, -1, capacity)
            is_grouped = False
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale, enable_gqa=is_grouped)
        y = y.reshape(batch, num_heads, length, head_dim)
    else:
        y = _softmax_ref(q, keys, values, scale, mask, softcap, sinks)
    return y.transpose(1, 2).reshape(batch, length, num_heads * head_dim)


def _one_for_each_query(heads: torch.Tensor, kv_of_query: Sequence[int]) -> torch.Tensor:
    """[B, H_kv, S, D] -> [B, H_q, S, D], without an index tensor, which would have to travel to the GPU."""
    runs = ((kv, len(list(run))) for kv, run in itertools.groupby(kv_of_query))
    return torch.cat([heads.narrow(1, kv, 1).expand(-1, count, -1, -1) for kv, count in runs], dim=1)


def _visible(
    length: int,
    capacity: int,
    lengths: torch.Tensor | None,
    mask: torch.Tensor | None,
    window: int | None,
    device: torch.device,
) -> torch.Tensor:
    """What each new token may see, and `mask` with it: [B or 1, 1, S_q, S]."""
    end = torch.full((1,), capacity, device=device) if lengths is None else lengths.to(torch.int64)
    key = torch.arange(capacity, device=device)
    query = (end[:, None] - length + torch.arange(length, device=device))[:, None, :, None]
    visible = key < end[:, None, None, None]
    if mask is None:
        visible = visible & (key <= query)
    if window is not None:
        visible = visible & (key > query - window)
    if mask is None or mask.dtype == torch.bool:
        return visible if mask is None else visible & mask
    return torch.where(visible, mask, -torch.inf)


def _softmax_ref(q, keys, values, scale, mask, softcap, sinks) -> torch.Tensor:
    batch, num_heads, length, _ = q.shape
    groups = num_heads // keys.shape[1]
    keys, values = (heads.repeat_interleave(groups, 1) if groups > 1 else heads for heads in (keys, values))
    scores = (q @ keys.transpose(2, 3)).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(batch, -1, length, 1)
        scores = torch.cat((scores, sink), dim=-1)
    shares = torch.softmax(scores, dim=-1).nan_to_num(0.0)[..., : keys.shape[2]]  # NaN: a token that sees nothing
    return shares.to(values.dtype) @ values


def decode_attention(
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
) -> torch.Tensor:
    """softmax(scale * q @ keys.T) @ values, head by head.

    A new token sees key j of its sequence if j < lengths[b], j is inside the window, and `mask` says so; without a
    mask, if j is not behind the token itself. A token that sees nothing gets 0.

    Args:
        q: [B, H_q, S_q, D], the last S_q tokens of each sequence, any strides but the last.
        keys, values: [B, H_kv, S, D], the new tokens' included, any strides but the last.
        scale: of the scores.
        kv_of_query: the key/value head that each of the H_q query heads reads, in any order; None: H_q / H_kv each.
        lengths: int32 or int64 [B], how many tokens each sequence has, on the device; what the cache holds beyond that
            is not read. None: S. Left padding is a matter of the mask.
        mask: [B or 1, H_q or 1, S_q or 1, S], bool (True: sees) or float (added to scores), as Hugging Face passes it.
            It takes the place of causality, so it is honoured whatever it says.
        window: a token at slot p sees keys from p - window + 1 on; no others are read.
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: [H_q], a score of a key without value, in each row's softmax (gpt-oss).

    Returns:
        [B, S_q, H_q * D] in q's dtype. The same bits at each run: parts are merged in the order of the sequence.

    Raises:
        ValueError: shapes that do not fit; a head map out of range.

    Numerics: fp32 inside; shares are rounded to the values' dtype before they meet them, as everywhere. Head sizes that
    are no multiple of 16 or above 256, and more than 64 rows, go to torch, with one log line.
    """
    options = (scale, kv_of_query, lengths, mask, window, softcap, sinks)
    if torch.compiler.is_compiling():
        return torch.ops.tp_runtime.decode_attention(q, keys, values, *options)
    if not q.is_cuda:
        return decode_attention_ref(q, keys, values, *options)
    return _op(q, keys, values, *options)


def check_attention(q, keys, values, kv_of_query, lengths, mask, sinks) -> None:
    batch, num_heads, length, head_dim = q.shape
    num_kv_heads, capacity = keys.shape[1:3]
    if keys.shape != values.shape or (keys.shape[0], keys.shape[3]) != (batch, head_dim):
        raise ValueError(f"keys {[*keys.shape]} and values {[*values.shape]} do not fit q {[*q.shape]}")
    if not q.dtype == keys.dtype == values.dtype:
        raise ValueError(f"q, keys and values must be of one dtype: they are {q.dtype}, {keys.dtype}, {values.dtype}")
    if length > capacity > 0:
        raise ValueError(f"keys hold {capacity} tokens, fewer than the {length} new ones: write those there first")
    if kv_of_query is None and num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide by {num_kv_heads} key/value heads: pass kv_of_query")
    if kv_of_query is not None and (
        len(kv_of_query) != num_heads or not all(0 <= kv < num_kv_heads for kv in kv_of_query)
    ):
        raise ValueError(f"kv_of_query {kv_of_query} must name one of {num_kv_heads} kv heads for each of {num_heads}")
    full = (batch, num_heads, length, capacity)
    if mask is not None and (
        mask.dim() != 4 or mask.shape[3] != capacity or any(n not in (1, f) for n, f in zip(mask.shape, full))
    ):
        raise ValueError(f"mask {list(mask.shape)} is not [{batch} or 1, {num_heads} or 1, {length} or 1, {capacity}]")
    for name, vector, size in (("lengths", lengths, batch), ("sinks", sinks, num_heads)):
        if vector is not None and vector.shape != (size,):
            raise ValueError(f"{name} {list(vector.shape)} must be [{size}]")


@functools.cache
def _tell(reason: str) -> None:
    _log.warning("decode_attention: torch runs %s", reason)


def is_known(q: torch.Tensor, keys: torch.Tensor, kv_of_query: tuple[int, ...] | None) -> bool:
    """Whether the kernel takes these shapes; if not, one log line says why."""
    num_heads, length, head_dim = q.shape[1:]
    group = num_heads // keys.shape[1] if kv_of_query is None else max(map(kv_of_query.count, kv_of_query))
    if head_dim % 16 or head_dim > MAX_HEAD_SIZE:
        _tell(f"head size {head_dim}; the kernel takes multiples of 16 up to {MAX_HEAD_SIZE}")
        return False
    if group * length > MAX_ROWS:
        _tell(f"{group} query heads a key/value head with {length} new tokens; the kernel takes {MAX_ROWS} rows")
        return False
    return True


_library = torch.library.Library("tp_runtime", "FRAGMENT")
_library.define(
    "decode_attention(Tensor q, Tensor keys, Tensor values, float scale, int[]? kv_of_query=None, "
    "Tensor? lengths=None, Tensor? mask=None, int? window=None, float? softcap=None, Tensor? sinks=None) -> Tensor"
)


def _op(q, keys, values, scale, kv_of_query=None, lengths=None, mask=None, window=None, softcap=None, sinks=None):
    kv_of_query = None if kv_of_query is None else tuple(kv_of_query)
    check_attention(q, keys, values, kv_of_query, lengths, mask, sinks)
    options = (scale, kv_of_query, lengths, mask, window, softcap, sinks)
    if not q.is_cuda or not is_known(q, keys, kv_of_query):
        return decode_attention_ref(q, keys, values, *options)
    from .decode_attention_launch import run

    return run(q, keys, values, *options)


def _fake(q, keys, values, scale, *options, **named):
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1] * q.shape[3])


_library.impl("decode_attention", _op, "CPU")
_library.impl("decode_attention", _op, "CUDA")
_library.impl("decode_attention", _fake, "Meta")

"""Rotary embedding of q and k, their norm before it where a model has one, and k and v into the cache: one pass.

    q, k = rope(norm(q) * q_weight), rope(norm(k) * k_weight)      norms head by head (qwen3), or over all heads (olmo2)
    rope(x) = x * cos + roll(x, R / 2) * signed_sin                        on the first R of a head's D elements
    keys[:, :, positions], values[:, :, positions] = k, v

signed_sin is sin with its first half negated; where elements turn in pairs (cohere), neighbours change places instead
of halves, and every other sin is negated; cos and sin are Hugging Face's own, so every kind of scaling is (default,
llama3, linear, dynamic, yarn). One program takes a few heads of one token.
"""

from __future__ import annotations

import torch

from .lost import NO_SUCH_PLACE, raise_lost
from .rms_norm import norm_ref


def rope_and_cache_ref(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    signed_sin: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: int | torch.Tensor,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
    pairs: bool = False,
    mean_squares: torch.Tensor | None = None,
) -> torch.Tensor:
    """`rope_and_cache` in as few of torch's operations as there are: on a CPU each costs microseconds."""
    batch, length, width = qkv.shape
    num_kv_heads, head_dim = keys.shape[1], keys.shape[3]
    num_heads = width // head_dim - 2 * num_kv_heads
    heads = qkv.view(batch, length, num_heads + 2 * num_kv_heads, head_dim).transpose(1, 2)
    qk, v = torch.split_with_sizes(heads, [num_heads + num_kv_heads, num_kv_heads], 1)
    if q_weight is not None:
        q, k = torch.split_with_sizes(qk, [num_heads, num_kv_heads], 1)
        q_mean, k_mean = (None, None) if mean_squares is None else mean_squares.unbind(-1)
        pair = (_normed_ref(q, q_weight, q_mean, eps, unit_offset), _normed_ref(k, k_weight, k_mean, eps, unit_offset))
        qk = torch.cat(pair, dim=1)
    if cos is not None:
        qk = _rope_ref(qk, cos, signed_sin, pairs)
    q, k = torch.split_with_sizes(qk, [num_heads, num_kv_heads], 1)
    if isinstance(positions, int) or positions.numel() == 1:
        first = int(positions)
        check_place(first, length, keys.shape[2])
        keys.narrow(2, first, length).copy_(k)
        values.narrow(2, first, length).copy_(v)
    else:
        if not ((positions >= 0) & (positions < keys.shape[2])).all():
            raise ValueError(f"of positions {positions.tolist()} some are {NO_SUCH_PLACE.format(count=keys.shape[2])}")
        sequences = torch.arange(batch)[:, None]
        keys.transpose(1, 2)[sequences, positions] = k.transpose(1, 2)
        values.transpose(1, 2)[sequences, positions] = v.transpose(1, 2)
    return q


def _normed_ref(
    x: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor | None, eps: float, unit_offset: bool
) -> torch.Tensor:
    """x [B, H, S, D], each head normed; or, with a weight for each element of all heads, all of them as one row, whose
    mean square is `mean` [B, S] or its own; rounded once."""
    if mean is None and len(weight) == x.shape[3]:
        return norm_ref(x, weight, eps, unit_offset)
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.transpose(1, 2).flatten(2).to(wide)
    mean = rows.square().mean(-1) if mean is None else mean
    rows = rows * torch.rsqrt(mean + eps).unsqueeze(-1) * (weight.to(wide) + unit_offset)
    return rows.to(x.dtype).unflatten(2, (x.shape[1], -1)).transpose(1, 2)


def partners(x: torch.Tensor, pairs: bool) -> torch.Tensor:
    """For each element the one that it turns with: of its pair, or of the other half."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if pairs else x.roll(x.shape[-1] // 2, -1)


def _rope_ref(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor, pairs: bool) -> torch.Tensor:
    rotary_dim = cos.shape[-1]
    if rotary_dim < x.shape[-1]:
        return torch.cat((_rope_ref(x[..., :rotary_dim], cos, signed_sin, pairs), x[..., rotary_dim:]), dim=-1)
    if cos.dtype == x.dtype:
        return torch.addcmul(x * cos, partners(x, pairs), signed_sin)
    return (x * cos + partners(x, pairs) * signed_sin).to(x.dtype)  # olmo2 and cohere have both in float32


def rope_and_cache(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    signed_sin: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: int | torch.Tensor,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
    pairs: bool = False,
    mean_squares: torch.Tensor | None = None,
) -> torch.Tensor:
    """q, normed and rotated; k, likewise, and v are written into the cache.

    Args:
        qkv: [B, S, (H_q + 2 * H_kv) * D], tokens anywhere, each contiguous: query heads, key heads, value heads.
        cos: [B or 1, 1, S, R], R even and at most D; the rest of a head is not rotated. None: nothing is (NoPE layers).
        signed_sin: like cos, its first half negated; with pairs, every other element from the first on.
        keys, values: [B, H_kv, S_max, D], all of the cache and not only what it holds; any strides but the last.
        positions: where in the cache the tokens belong: the place of the first, and the others follow (an int, or a
            tensor of one element, int32 or int64, which a CUDA graph can replay); or [B, S], one by one.
        q_weight, k_weight: [D] each: every head is normed first; [H_q * D] and [H_kv * D]: all query heads as one row,
            all key heads as another (OLMo); or neither.
        eps: of that norm. unit_offset: its factors are 1 + weight (Gemma).
        pairs: elements 2i and 2i + 1 turn together, instead of i and i + R / 2.
        mean_squares: float32 [B, S, 2], for a norm over all heads: what the op of this name gives of q and k, summed
            over ranks; None: these are all heads.

    Returns:
        [B, H_q, S, D] in qkv's dtype, tokens apart by H_q * D.

    Raises:
        ValueError: shapes that do not fit; positions outside of the cache, where the host knows them. On a GPU it does
            not know a tensor's: such a token's k and v are not written anywhere, and a later call, or who samples the
            next token, raises (see `lost`).

    Numerics: on a GPU fp32 inside and one rounding, where Hugging Face rounds each product; on the CPU as Hugging Face.
    """
    options = (q_weight, k_weight, eps, unit_offset, pairs, mean_squares)
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and not qkv.is_cuda:
        return rope_and_cache_ref(qkv, cos, signed_sin, keys, values, positions, *options)
    launch = torch.ops.tp_runtime.rope_and_cache if is_compiling else _op
    if isinstance(positions, int):
        return launch(qkv, cos, signed_sin, keys, values, None, positions, *options).transpose(1, 2)
    return launch(qkv, cos, signed_sin, keys, values, positions, 0, *options).transpose(1, 2)


def check_place(first: int, length: int, capacity: int) -> None:
    if not 0 <= first <= capacity - length:
        raise ValueError(f"positions {first} to {first + length - 1} are {NO_SUCH_PLACE.format(count=capacity)}")


def check_rope(qkv, cos, signed_sin, keys, values, positions, first, q_weight, k_weight, mean_squares) -> None:
    batch, length, width = qkv.shape
    cached, num_kv_heads, capacity, head_dim = keys.shape
    if values.shape != keys.shape or cached != batch:
        raise ValueError(f"keys {[*keys.shape]} and values {[*values.shape]} are not the cache of {batch} sequences")
    if width % head_dim or width // head_dim < 2 * num_kv_heads:
        raise ValueError(f"qkv {[*qkv.shape]} is not query heads and 2 * {num_kv_heads} heads of {head_dim} elements")
    if {qkv.stride(2), keys.stride(3), values.stride(3)} != {1}:
        raise ValueError("qkv, keys and values must be contiguous in their last dimension")
    if cos is not None:
        rotary_dim = cos.shape[-1]
        theirs = None if signed_sin is None else [*signed_sin.shape]
        if theirs != [*cos.shape] or theirs not in ([1, 1, length, rotary_dim], [batch, 1, length, rotary_dim]):
            raise ValueError(f"cos {[*cos.shape]} and signed_sin {theirs} must both be [{batch} or 1, 1, {length}, R]")
        if rotary_dim % 2 or rotary_dim > head_dim:
            raise ValueError(f"cos rotates {rotary_dim} elements: must be even and at most the head size, {head_dim}")
    if positions is None:
        check_place(first, length, capacity)
    elif positions.numel() != 1 and positions.shape != (batch, length):
        raise ValueError(f"positions are {[*positions.shape]}: one element, or [{batch}, {length}]")
    else:
        raise_lost(qkv.device)  # by an earlier call, whose positions the host did not know
    shapes = [None if weight is None else [*weight.shape] for weight in (q_weight, k_weight)]
    each, all_heads = [[head_dim]] * 2, [[width - 2 * num_kv_heads * head_dim], [num_kv_heads * head_dim]]
    if shapes not in ([None] * 2, each, all_heads):
        given = "q_weight {} and k_weight {} are given both or neither".format(*shapes)
        raise ValueError(f"{given}, {each[0]} each, or over all heads {all_heads[0]} and {all_heads[1]}")
    if mean_squares is not None and ([*mean_squares.shape] != [batch, length, 2] or shapes != all_heads):
        raise ValueError(
            f"mean_squares {[*mean_squares.shape]} must be [{batch}, {length}, 2], of norms over all heads; "
            "q_weight is {} and k_weight {}".format(*shapes)
        )


_library = torch.library.Library("tp_runtime", "FRAGMENT")
_library.define(
    "rope_and_cache(Tensor qkv, Tensor? cos, Tensor? signed_sin, Tensor(a!) keys, Tensor(b!) values, "
    "Tensor? positions, SymInt first=0, Tensor? q_weight=None, Tensor? k_weight=None, float eps=1e-6, "
    "bool unit_offset=False, bool pairs=False, Tensor? mean_squares=None) -> Tensor"
)


def _op(
    qkv, cos, signed_sin, keys, values, positions, first=0,
    q_weight=None, k_weight=None, eps=1e-6, unit_offset=False, pairs=False, mean_squares=None,
):  # fmt: skip
    check_rope(qkv, cos, signed_sin, keys, values, positions, first, q_weight, k_weight, mean_squares)
    options = (q_weight, k_weight, eps, unit_offset, pairs, mean_squares)
    if qkv.is_cuda:
        from .rope_kernel import run

        return run(qkv, cos, signed_sin, keys, values, positions, first, *options)
    where = first if positions is None else positions
    q = rope_and_cache_ref(qkv, cos, signed_sin, keys, values, where, *options)
    return q.transpose(1, 2).clone(memory_format=torch.contiguous_format)  # it may be a view of qkv


def _fake(qkv, cos, signed_sin, keys, *options, **named):
    batch, length, width = qkv.shape
    return qkv.new_empty(batch, length, width // keys.shape[3] - 2 * keys.shape[1], keys.shape[3])


_library.impl("rope_and_cache", _op, "CPU")
_library.impl("rope_and_cache", _op, "CUDA")
_library.impl("rope_and_cache", _fake, "Meta")

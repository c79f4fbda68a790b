"""`rope_and_cache` and `decode_attention` for one new token of each sequence, in one launch: at decode, a launch less.

    q, k, v = heads of qkv;  q, k = rope(norm(q)), rope(norm(k));  k, v into the cache;  o = attention(q, keys, values)

Each program rotates the few query heads that it needs; the one with part 0 of a sequence also makes k and writes k and
v into the cache.

On CUDA the one launch runs where it was measured to be faster (see `tuned`) than `rope_and_cache` and torch's SDPA,
which run what nobody has measured.
"""

from __future__ import annotations

import torch

from .decode_attention import check_attention, decode_attention_ref, is_known
from .rope import check_rope, rope_and_cache, rope_and_cache_ref
from .tuned import TORCH, lookup


def rope_decode_attention_ref(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    signed_sin: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: int | torch.Tensor,
    scale: float,
    kv_of_query: tuple[int, ...] | None = None,
    mask: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
    pairs: bool = False,
    mean_squares: torch.Tensor | None = None,
) -> torch.Tensor:
    """`rope_decode_attention`, one after the other."""
    place = int(positions) if not isinstance(positions, int) and positions.numel() == 1 else positions
    of_rope = (q_weight, k_weight, eps, unit_offset, pairs, mean_squares)
    q = rope_and_cache_ref(qkv, cos, signed_sin, keys, values, place, *of_rope)
    return _attend(decode_attention_ref, q, keys, values, place, scale, kv_of_query, mask, window, softcap, sinks)


def _attend(attention, q, keys, values, positions, scale, kv_of_query, mask, window, *options) -> torch.Tensor:
    """Attention over a cache that holds the tokens up to `positions`, an int or a tensor."""
    if isinstance(positions, int):  # then what has left the window is cut off, not masked
        lengths, end = None, positions + 1
        first, window = 0 if window is None else max(0, end - window), None
    else:
        lengths, first, end = (positions.reshape(-1) + 1).expand(len(q)), 0, keys.shape[2]
    keys, values = keys[:, :, first:end], values[:, :, first:end]
    mask = None if mask is None else mask[..., first:end]
    return attention(q, keys, values, scale, kv_of_query, lengths, mask, window, *options)


def op_name(num_heads: int, num_kv_heads: int) -> str:
    """The op's name in the tables of `tuned`, where it stands with N = the next power of two of the cache's
    capacity, K = D and M = B."""
    return f"attention_{num_heads}_{num_kv_heads}"


def _chosen(q: torch.Tensor, keys: torch.Tensor):
    """The configuration that was measured to be the fastest for these shapes; None: torch."""
    from .decode_attention_launch import CANDIDATES

    batch, num_heads, _, head_dim = q.shape
    num_kv_heads, capacity = keys.shape[1:3]
    room = 1 << max(capacity - 1, 0).bit_length()  # a bucket, as those of M, without an end
    row = lookup(op_name(num_heads, num_kv_heads), q, room, head_dim, max(batch, 1), CANDIDATES)
    return None if row is None or row["kernel"] == TORCH else row["config"]


def run(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    signed_sin: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: int | torch.Tensor,
    scale: float,
    kv_of_query: tuple[int, ...] | None = None,
    mask: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
    pairs: bool = False,
    mean_squares: torch.Tensor | None = None,
    *,
    kernel: str = "split",
    config=None,
) -> torch.Tensor:
    """`rope_decode_attention` by the kernel of this name, or "torch", in this configuration, whatever was measured.

    Torch's way takes a mask for all that there is to say where positions are on the device: nothing combines the two.
    """
    of_rope = (q_weight, k_weight, eps, unit_offset, pairs, mean_squares)
    if kernel == TORCH:
        q = rope_and_cache(qkv, cos, signed_sin, keys, values, positions, *of_rope)
        place = positions if mask is None or isinstance(positions, int) else keys.shape[2] - 1
        return _attend(decode_attention_ref, q, keys, values, place, scale, kv_of_query, mask, window, softcap, sinks)
    from .decode_attention_launch import New, run

    q = _queries(qkv, keys)
    if cos is not None and signed_sin is not None:
        cos, signed_sin = cos.contiguous(), signed_sin.contiguous()
    lengths, ahead = (None, positions + 1) if isinstance(positions, int) else (positions, 1)
    options = (scale, kv_of_query, lengths, mask, window, softcap, sinks)
    return run(q, keys, values, *options, new=New(cos, signed_sin, *of_rope), ahead=ahead, config=config)


def _queries(qkv: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """q [B, H_q, 1, D] before norm and rotation, as a view of qkv."""
    return qkv.unflatten(2, (-1, keys.shape[3])).transpose(1, 2)[:, : -2 * keys.shape[1]]


def rope_decode_attention(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    signed_sin: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: int | torch.Tensor,
    scale: float,
    kv_of_query: tuple[int, ...] | None = None,
    mask: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
    pairs: bool = False,
    mean_squares: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one new token of each sequence over its cache, into which its k and v are written as well.

    Args:
        qkv, cos, signed_sin, q_weight, k_weight, eps, unit_offset, pairs, mean_squares: as `rope_and_cache` takes them,
            with S = 1.
        keys, values: [B, H_kv, S_max, D], all of the cache; any strides but the last.
        positions: each sequence's place of the new token, and so how many it holds: an int or a tensor of one element
            for all of them, or [B, 1].
        scale, kv_of_query, window, softcap, sinks: as `decode_attention` takes them.
        mask: [B or 1, H_q or 1, 1, S], bool or float, with S behind every position; as there.

    Returns:
        [B, 1, H_q * D] in qkv's dtype. The same bits at each run.

    Raises:
        ValueError: shapes that do not fit; a head map out of range; more than one token; positions outside of the cache
            or past the mask, where the host knows them. Else such a token attends, but is not written, and a later
            call, or who samples the next token, raises (see `lost`).

    Numerics: as the two ops, but the new token's own share is not rounded. What `decode_attention` leaves to torch goes
    there, after `rope_and_cache`.
    """
    is_compiling = torch.compiler.is_compiling()
    of_rope = (q_weight, k_weight, eps, unit_offset, pairs, mean_squares)
    options = (scale, kv_of_query, mask, window, softcap, sinks, *of_rope)
    if not is_compiling and not qkv.is_cuda:
        return rope_decode_attention_ref(qkv, cos, signed_sin, keys, values, positions, *options)
    launch = torch.ops.tp_runtime.rope_decode_attention if is_compiling else _op
    if isinstance(positions, int):
        return launch(qkv, cos, signed_sin, keys, values, None, positions, *options)
    return launch(qkv, cos, signed_sin, keys, values, positions, 0, *options)


_library = torch.library.Library("tp_runtime", "FRAGMENT")
_library.define(
    "rope_decode_attention(Tensor qkv, Tensor? cos, Tensor? signed_sin, Tensor(a!) keys, Tensor(b!) values, "
    "Tensor? positions, SymInt first, float scale, int[]? kv_of_query=None, Tensor? mask=None, int? window=None, "
    "float? softcap=None, Tensor? sinks=None, Tensor? q_weight=None, Tensor? k_weight=None, float eps=1e-6, "
    "bool unit_offset=False, bool pairs=False, Tensor? mean_squares=None) -> Tensor"
)


def _op(
    qkv, cos, signed_sin, keys, values, positions, first, scale,
    kv_of_query=None, mask=None, window=None, softcap=None, sinks=None,
    q_weight=None, k_weight=None, eps=1e-6, unit_offset=False, pairs=False, mean_squares=None,
):  # fmt: skip
    if qkv.shape[1] != 1:
        raise ValueError(f"qkv {[*qkv.shape]} holds {qkv.shape[1]} tokens a sequence: use rope_and_cache for several")
    check_rope(qkv, cos, signed_sin, keys, values, positions, first, q_weight, k_weight, mean_squares)
    batch, num_kv_heads, capacity, head_dim = keys.shape
    needed = first + 1 if positions is None else capacity
    if mask is not None and mask.shape[-1] < needed:
        raise ValueError(f"mask {[*mask.shape]} does not reach the token at {needed - 1}")
    kv_of_query = None if kv_of_query is None else tuple(kv_of_query)
    q = _queries(qkv, keys)
    of_cache = None if mask is None else mask[..., :1].expand(*mask.shape[:3], capacity)
    check_attention(q, keys, values, kv_of_query, None, of_cache, sinks)
    where = first if positions is None else positions
    of_rope = (q_weight, k_weight, eps, unit_offset, pairs, mean_squares)
    options = (scale, kv_of_query, mask, window, softcap, sinks, *of_rope)
    if not qkv.is_cuda:
        return rope_decode_attention_ref(qkv, cos, signed_sin, keys, values, where, *options)
    config = _chosen(q, keys) if is_known(q, keys, kv_of_query) else None
    kernel = TORCH if config is None else "split"
    return run(qkv, cos, signed_sin, keys, values, where, *options, kernel=kernel, config=config)


def _fake(qkv, cos, signed_sin, keys, *options, **named):
    return qkv.new_empty(len(qkv), 1, qkv.shape[2] - 2 * keys.shape[1] * keys.shape[3])


_library.impl("rope_decode_attention", _op, "CPU")
_library.impl("rope_decode_attention", _op, "CUDA")
_library.impl("rope_decode_attention", _fake, "Meta")

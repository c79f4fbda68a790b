"""The k largest logits of each sequence in this rank's part of the vocabulary, and their token ids, in one launch.

Ranks then exchange k candidates each instead of the vocabulary. Larger ones come first, of equal ones the lower id: so
the candidates of all ranks, joined in rank order and sorted stably, are in that order again, and the choice is the same
at every tp_size.

A logit and its id become one integer that is ordered as they are, so that top-k is a search for the largest integers:

    key = order(logit) << 32 | (2^31 - 1 - id)

A program finds the k largest of a chunk of the vocabulary; the last one to arrive finds the k largest of all theirs.
"""

from __future__ import annotations

import functools
import logging

import torch
import triton
import triton.language as tl

from . import target

MAX_K = 64
BLOCK = 2048  # logits that a program looks at a time
_CANDIDATES = 4096  # of all programs of a sequence

_log = logging.getLogger("tp_runtime")


def vocab_top_k_ref(logits_shard_v: torch.Tensor, k: int, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """`vocab_top_k` in plain torch."""
    logits = logits_shard_v.float()
    if k == 1:  # of equal ones max takes the first
        values, places = logits.max(-1, keepdim=True)
        return values, places + offset
    top = logits.topk(k).values
    place = torch.arange(logits.shape[-1], dtype=torch.int32, device=logits.device)
    # Of those that equal the k-th the first ones: topk alone would take any.
    turn = torch.where(logits > top[:, -1:], -1, torch.where(logits == top[:, -1:], place, len(place)))
    places = turn.topk(k, largest=False).indices.sort(-1).values
    values = logits.gather(1, places)
    order = values.argsort(dim=-1, descending=True, stable=True)
    values = torch.where(top[:, :1].isnan(), torch.nan, values.gather(1, order))
    return values, places.gather(1, order) + offset


@triton.jit
def _keys(logits, places):
    """int64, ordered as the logits are, and of equal ones the first is the largest. NaN is above all."""
    logits = tl.where(logits == 0, 0.0, logits)  # -0 equals 0
    bits = logits.to(tl.int32, bitcast=True)
    order = tl.where(logits == logits, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - places).to(tl.int64)


@triton.jit
def _vocab_top_k_kernel(
    logits_ptr, values_ptr, ids_ptr, candidates_ptr, arrived_ptr, V, chunk, stride_b, offset, k,
    K: tl.constexpr, MERGE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    NONE: tl.constexpr = -(2**63)
    program, programs, b = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    offs_k = tl.arange(0, K)
    best = tl.full((K,), NONE, tl.int64)
    for start in range(program * chunk, tl.minimum(program * chunk + chunk, V), BLOCK):
        places = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + b * stride_b + places, mask=places < V, other=0.0).to(tl.float32)
        keys = tl.where(places < V, _keys(logits, places), NONE)
        best = _largest(best, keys, K)
    if programs > 1:
        tl.store(candidates_ptr + (b * programs + program) * K + offs_k, best)
        tl.debug_barrier()  # every thread has stored before one of them says so
        if tl.atomic_add(arrived_ptr + b, 1, sem="acq_rel", scope="gpu") < programs - 1:
            return
        tl.store(arrived_ptr + b, 0)
        offs = tl.arange(0, MERGE)
        from_all = candidates_ptr + b * programs * K + offs
        of_all = tl.load(from_all, mask=offs < programs * K, other=NONE, cache_modifier=".cg")
        best = _largest(tl.full((K,), NONE, tl.int64), of_all, K)
    order = (best >> 32).to(tl.int32)
    values = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    is_nan = tl.max(order) == 0x7FFFFFFF
    values = tl.where(is_nan, float("nan"), values)
    tl.store(values_ptr + b * k + offs_k, values, mask=offs_k < k)
    tl.store(ids_ptr + b * k + offs_k, 0x7FFFFFFF - (best & 0xFFFFFFFF) + offset, mask=offs_k < k)


@triton.jit
def _largest(best, keys, K: tl.constexpr):
    """The K largest of both, largest first."""
    if K == 1:
        return tl.maximum(best, tl.max(keys, 0))
    else:
        return tl.topk(tl.reshape(tl.join(best, tl.topk(keys, K)), (2 * K,)), K)


def run(logits: torch.Tensor, k: int, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The launch; see `vocab_top_k`."""
    batch, v = logits.shape
    values = torch.empty(batch, k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(batch, k, dtype=torch.int64, device=logits.device)
    if not values.numel():
        return values, ids
    k_pow2 = triton.next_power_of_2(k)
    tiles = triton.cdiv(v, BLOCK)
    per_program = triton.cdiv(tiles, _CANDIDATES // max(k_pow2, 32))
    programs = triton.cdiv(tiles, per_program)
    candidates = torch.empty(batch * programs * k_pow2, dtype=torch.int64, device=logits.device)
    _vocab_top_k_kernel[(programs, batch)](
        logits, values, ids, candidates, target.arrival_counters(logits.device),
        v, per_program * BLOCK, logits.stride(0), offset, k,
        K=k_pow2, MERGE=max(k_pow2, triton.next_power_of_2(programs * k_pow2)), BLOCK=BLOCK,
        PDL=target.has_pdl(), num_warps=8, **target.launch_options(),
    )  # fmt: skip
    return values, ids


def vocab_top_k(logits_shard_v: torch.Tensor, k: int, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest logits of each sequence and their token ids; larger first, of equal ones the lower id first.

    Args:
        logits_shard_v: [B, V_r], this rank's; any strides but the last.
        k: 1 to V_r; 1 is argmax. Above 64 torch runs it, with one log line.
        offset: the token id of the shard's first column.

    Returns:
        values float32 [B, k], all NaN in a row that holds a NaN (with k = 1 it is the NaN's own id that stands beside
        it, else any); ids int64 [B, k].

    Raises:
        ValueError: k is not in 1 to V_r; logits_shard_v is not a matrix.
    """
    if torch.compiler.is_compiling():
        return torch.ops.tp_runtime.vocab_top_k(logits_shard_v, k, offset)
    return _op(logits_shard_v, k, offset)


@functools.cache
def _tell(k: int, batch: int) -> None:
    text = "vocab_top_k: torch runs k=%d for %d sequences; the kernel takes k up to %d, sequences up to %d"
    _log.warning(text, k, batch, MAX_K, target.COUNTERS)


_library = torch.library.Library("tp_runtime", "FRAGMENT")
_library.define("vocab_top_k(Tensor logits_shard_v, int k, int offset=0) -> (Tensor, Tensor)")


def _op(logits_shard_v: torch.Tensor, k: int, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    if logits_shard_v.dim() != 2 or not 1 <= k <= logits_shard_v.shape[1]:
        raise ValueError(f"k={k} of logits {list(logits_shard_v.shape)}: they must be [B, V_r], and k 1 to V_r")
    if not logits_shard_v.is_cuda:
        return vocab_top_k_ref(logits_shard_v, k, offset)
    if k > MAX_K or len(logits_shard_v) > target.COUNTERS:
        _tell(k, len(logits_shard_v))
        return vocab_top_k_ref(logits_shard_v, k, offset)
    return run(logits_shard_v if logits_shard_v.stride(1) == 1 else logits_shard_v.contiguous(), k, offset)


@torch.library.register_fake("tp_runtime::vocab_top_k", lib=_library)
def _fake(logits_shard_v: torch.Tensor, k: int, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    shape = logits_shard_v.shape[0], k
    return logits_shard_v.new_empty(shape, dtype=torch.float32), logits_shard_v.new_empty(shape, dtype=torch.int64)


_library.impl("vocab_top_k", _op, "CPU")
_library.impl("vocab_top_k", _op, "CUDA")

"""The k largest logits of each sequence in this rank's part of the vocabulary, and their token ids, in one launch.

Ranks then exchange k candidates each instead of the vocabulary. Larger ones come first, of equal ones the lower id: so
the candidates of all ranks, joined in rank order and sorted stably, are in that order again, and the choice is the same
at every tp_size.

A logit and its id become one integer that is ordered as they are, so that top-k is a search for the largest integers:

    key = order(logit) << 32 | (2^31 - 1 - id)

A program finds the k largest of a chunk of the vocabulary; the last one to arrive finds the k largest of all theirs.
On CUDA it runs where it was measured to be faster than torch (see `tuned`), which runs what nobody has measured.
"""

from __future__ import annotations

import functools
import logging

import torch

from .tuned import TORCH, lookup

MAX_K = 64
MAX_BATCH = 4096  # of one launch: a counter for each sequence

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
    _log.warning(text, k, batch, MAX_K, MAX_BATCH)


_library = torch.library.Library("tp_runtime", "FRAGMENT")
_library.define("vocab_top_k(Tensor logits_shard_v, int k, int offset=0) -> (Tensor, Tensor)")


def _op(logits_shard_v: torch.Tensor, k: int, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    if logits_shard_v.dim() != 2 or not 1 <= k <= logits_shard_v.shape[1]:
        raise ValueError(f"k={k} of logits {list(logits_shard_v.shape)}: they must be [B, V_r], and k 1 to V_r")
    if not logits_shard_v.is_cuda:
        return vocab_top_k_ref(logits_shard_v, k, offset)
    if k > MAX_K or len(logits_shard_v) > MAX_BATCH:
        _tell(k, len(logits_shard_v))
        return vocab_top_k_ref(logits_shard_v, k, offset)
    from .vocab_top_k_kernel import CANDIDATES, run

    batch, v = logits_shard_v.shape
    row = lookup("vocab_top_k", logits_shard_v, v, k, max(batch, 1), CANDIDATES)
    if row is None or row["kernel"] == TORCH:
        return vocab_top_k_ref(logits_shard_v, k, offset)
    logits_shard_v = logits_shard_v if logits_shard_v.stride(1) == 1 else logits_shard_v.contiguous()
    return run(logits_shard_v, k, offset, row["config"])


def _fake(logits_shard_v: torch.Tensor, k: int, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    shape = logits_shard_v.shape[0], k
    return logits_shard_v.new_empty(shape, dtype=torch.float32), logits_shard_v.new_empty(shape, dtype=torch.int64)


_library.impl("vocab_top_k", _op, "CPU")
_library.impl("vocab_top_k", _op, "CUDA")
_library.impl("vocab_top_k", _fake, "Meta")

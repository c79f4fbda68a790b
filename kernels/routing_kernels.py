"""The kernels of routing, and their launches: read `routing` first."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .lost import lost_note
from .lost_kernel import is_read, note
from .routing import Sorted
from .target import has_pdl, launch_options


@triton.jit
def _route_kernel(
    logits_ptr, index_ptr, weights_ptr, num_tokens, num_experts, stride_lt, stride_le,
    TOP_K: tl.constexpr, SIGMOID: tl.constexpr, OVER_CHOSEN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A warp a token: k times the largest logit that is left, of equal ones the first."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)[None, :]
    choice = tl.arange(0, BLOCK_K)[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    is_left = (token < num_tokens)[:, None] & (expert < num_experts)
    offs = token.to(tl.int64)[:, None] * stride_lt + expert * stride_le
    logits = tl.load(logits_ptr + offs, mask=is_left, other=float("-inf")).to(tl.float32)
    has_nan = tl.max((logits != logits).to(tl.int32), axis=1) != 0
    logits = tl.where(logits != logits, float("-inf"), logits)

    chosen = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    top = tl.full((BLOCK_T, BLOCK_K), float("-inf"), tl.float32)
    for j in range(TOP_K):
        largest = tl.max(tl.where(is_left, logits, float("-inf")), axis=1)[:, None]
        first = tl.min(tl.where(is_left & (logits == largest), expert, BLOCK_E), axis=1)[:, None]
        chosen = tl.where(choice == j, first, chosen)
        top = tl.where(choice == j, largest, top)
        is_left = is_left & (expert != first)

    if SIGMOID:
        weights = 1 / (1 + tl.exp(-top))
    else:
        largest = tl.max(top, axis=1)[:, None]
        weights = tl.exp(top - largest)
        every = weights if OVER_CHOSEN else tl.exp(logits - largest)
        weights = weights / tl.sum(every, axis=1)[:, None]
    weights = tl.where(has_nan[:, None], float("nan"), weights)
    offs = token.to(tl.int64)[:, None] * TOP_K + choice
    mask = (token < num_tokens)[:, None] & (choice < TOP_K)
    tl.store(index_ptr + offs, chosen.to(tl.int64), mask=mask)
    tl.store(weights_ptr + offs, weights.to(weights_ptr.dtype.element_ty), mask=mask)


def run_route(
    router_logits: torch.Tensor, top_k: int, scoring: str, renormalise: bool, dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`route` in one launch."""
    num_tokens, num_experts = router_logits.shape
    index = router_logits.new_empty(num_tokens, top_k, dtype=torch.int64)
    weights = router_logits.new_empty(num_tokens, top_k, dtype=dtype or router_logits.dtype)
    if num_tokens:
        block_t = 4
        _route_kernel[(triton.cdiv(num_tokens, block_t),)](
            router_logits, index, weights, num_tokens, num_experts, *router_logits.stride(),
            TOP_K=top_k, SIGMOID=scoring == "sigmoid", OVER_CHOSEN=renormalise or scoring == "softmax_top_k",
            BLOCK_T=block_t, BLOCK_E=triton.next_power_of_2(num_experts), BLOCK_K=triton.next_power_of_2(top_k),
            PDL=has_pdl(), num_warps=block_t, **launch_options(),
        )  # fmt: skip
    return index, weights


@triton.jit
def experts_of(index_ptr, slot, stop, num_experts):
    """The expert of each slot before `stop`; num_experts for those behind it and where there is no such expert."""
    expert = tl.load(index_ptr + slot, mask=slot < stop, other=-1, cache_modifier=".cg")
    return tl.where((expert >= 0) & (expert < num_experts), expert, num_experts).to(tl.int32)


@triton.jit
def note_lost(note_ptr, index_ptr, num_slots, top_k, num_experts, CHUNK: tl.constexpr):
    """For `lost_note`, by one program that knows that there is one: the first token whose expert does not exist."""
    if is_read(note_ptr):
        first = tl.zeros((), tl.int32) + num_slots
        for start in range(0, num_slots, CHUNK):
            slot = start + tl.arange(0, CHUNK)
            is_lost = (slot < num_slots) & (experts_of(index_ptr, slot, num_slots, num_experts) == num_experts)
            first = tl.minimum(first, tl.min(tl.where(is_lost, slot, num_slots), axis=0))
        note(note_ptr, first // top_k, tl.load(index_ptr + first), num_experts)


@triton.jit
def _sort_kernel(
    index_ptr, slots_ptr, offsets_ptr, note_ptr, num_slots, top_k, num_experts,
    BLOCK_S: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Counting sort: each program counts all slots, so that it need not wait for others, and places BLOCK_S of them."""
    first = tl.program_id(0) * BLOCK_S
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # Slots of each expert that stand before this program's; column num_experts also counts those behind the end.
    before = tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, first, CHUNK):
        before += tl.histogram(experts_of(index_ptr, start + tl.arange(0, CHUNK), first, num_experts), BLOCK_E)
    counts = before
    for start in range(first, num_slots, CHUNK):
        counts += tl.histogram(experts_of(index_ptr, start + tl.arange(0, CHUNK), num_slots, num_experts), BLOCK_E)
    column = tl.arange(0, BLOCK_E)
    counts = tl.where(column < num_experts, counts, 0)
    before = tl.where(column < num_experts, before, first - tl.sum(tl.where(column < num_experts, before, 0), axis=0))
    start_of = tl.cumsum(counts, axis=0) - counts
    if first == 0:
        tl.store(offsets_ptr + column, start_of, mask=column <= num_experts)
    is_noted = (first == 0) & (tl.sum(counts, axis=0) < num_slots)

    slot = first + tl.arange(0, BLOCK_S)
    expert = experts_of(index_ptr, slot, num_slots, num_experts)
    is_earlier = (expert[None, :] == expert[:, None]) & (slot[None, :] < slot[:, None])
    place = tl.gather(start_of + before, expert, axis=0) + tl.sum(is_earlier.to(tl.int32), axis=1)
    tl.store(slots_ptr + place, slot, mask=slot < num_slots)
    if is_noted:  # last, when registers are free
        note_lost(note_ptr, index_ptr, num_slots, top_k, num_experts, CHUNK)


def run_sort(top_k_index: torch.Tensor, num_experts: int, block_s: int = 128, chunk: int = 2048) -> Sorted:
    """`sort_by_expert_ref` in one launch."""
    top_k_index = top_k_index.contiguous()
    num_slots = top_k_index.numel()
    slots = top_k_index.new_empty(num_slots, dtype=torch.int32)
    offsets = top_k_index.new_empty(num_experts + 1, dtype=torch.int32)
    _sort_kernel[(triton.cdiv(num_slots, block_s),)](
        top_k_index, slots, offsets, lost_note(top_k_index.device, "expert"), num_slots, top_k_index.shape[1],
        num_experts,
        BLOCK_S=block_s, CHUNK=chunk, BLOCK_E=triton.next_power_of_2(num_experts + 1),
        PDL=has_pdl(), num_warps=8, **launch_options(),
    )  # fmt: skip
    return Sorted(slots, offsets)

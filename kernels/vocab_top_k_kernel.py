"""The kernel of `vocab_top_k`: read the op's page first."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import target

BLOCK = 2048  # logits that a program looks at a time
_CANDIDATES = 4096  # of all programs of a sequence


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


class Config(NamedTuple):
    num_warps: int


CANDIDATES = {"top_k": (Config(8), Config(4), Config(16))}


def run(
    logits: torch.Tensor, k: int, offset: int = 0, config: Config = CANDIDATES["top_k"][0]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The launch; see `vocab_top_k`."""
    batch, v = logits.shape
    values = torch.empty(batch, k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(batch, k, dtype=torch.int64, device=logits.device)
    if not values.numel():
        return values, ids
    assert batch <= target.COUNTERS
    k_pow2 = triton.next_power_of_2(k)
    tiles = triton.cdiv(v, BLOCK)
    per_program = triton.cdiv(tiles, _CANDIDATES // max(k_pow2, 32))
    programs = triton.cdiv(tiles, per_program)
    candidates = torch.empty(batch * programs * k_pow2, dtype=torch.int64, device=logits.device)
    _vocab_top_k_kernel[(programs, batch)](
        logits, values, ids, candidates, target.arrival_counters(logits.device),
        v, per_program * BLOCK, logits.stride(0), offset, k,
        K=k_pow2, MERGE=max(k_pow2, triton.next_power_of_2(programs * k_pow2)), BLOCK=BLOCK,
        PDL=target.has_pdl(), num_warps=config.num_warps, **target.launch_options(),
    )  # fmt: skip
    return values, ids

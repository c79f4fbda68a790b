"""The kernels of `experts`: h = weight * act(x @ gate.T) * (x @ up.T) of each slot; y = sum of h @ down.T of its slots.

    decode   T <= 64: two launches. Every program finds out by itself which experts are hit. All tokens are the right
             operand of the tensor cores and the expert's weights the left one, so the weights of each hit expert are
             read once and those of others never. gate_up: a program is (hit expert, tile of I); columns of tokens
             that are not the expert's are not stored. down: a program is a tile of H and goes through all hit experts,
             whose h it sums in the accumulator: as much work for every program, whatever the routing.
    prefill  Four launches: sort (see `routing`), gate_up, down, combine. Rows of one expert lie side by side, and a
             tile is of one expert: no row is padding but in the last tile of an expert. Persistent: each program
             counts the tiles of each expert and takes every num_programs-th.

How many experts are hit is known to the device alone. A launch has the programs that the worst case needs; those
without work end at once, and nothing waits for the device: all of it can be captured in a CUDA graph.

Routing weights are multiplied in before h is rounded, so y needs no other factor. All accumulate in fp32. Sums are in
a fixed order: decode in the order of experts and within one of K, its splits summed by the last program to arrive;
prefill in the order of the token's choices. Source: the order of tiles is that of Triton's tutorials 03 and 08. vLLM's
and SGLang's fused_moe pad each expert's rows on the device, which the offsets make unnecessary.

A token that is given an expert that is not there gets a row of NaN, is noted for the host (see `lost`), and
no other row is touched. No configuration has met a GPU yet.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gemm_kernels import activate
from .routing_kernels import experts_of, note_lost
from .target import prefetch_l2


@triton.jit
def _matrix(ptr, first_n, offs_n, offs_k, N, K, stride_wn, stride_wk, TRANSPOSED: tl.constexpr, EVICT: tl.constexpr):
    """w[first_n + offs_n, offs_k], read along whichever of the two is contiguous; 0 beyond N and K."""
    rows = (first_n + offs_n).to(tl.int64)
    if TRANSPOSED:
        mask = (offs_k < K)[:, None] & (offs_n < N)[None, :]
        w_ptrs = ptr + offs_k.to(tl.int64)[:, None] * stride_wk + rows[None, :]
        return tl.load(w_ptrs, mask=mask, other=0.0, eviction_policy=EVICT).T
    else:
        mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
        w_ptrs = ptr + rows[:, None] * stride_wn + offs_k[None, :]
        return tl.load(w_ptrs, mask=mask, other=0.0, eviction_policy=EVICT)


@triton.jit
def _add_product(acc, x, w, SWAP: tl.constexpr):
    """acc + x @ w.T, or, if SWAP, its transpose acc + w @ x.T."""
    if SWAP:
        return tl.dot(w, x.T, acc, input_precision="ieee")
    else:
        return tl.dot(x, w.T, acc, input_precision="ieee")


@triton.jit
def _hits(index_ptr, num_slots, num_experts, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr):
    """How often each expert is hit; whether it is; how many before it are; how many are in all."""
    counts = tl.histogram(experts_of(index_ptr, tl.arange(0, BLOCK_S), num_slots, num_experts), BLOCK_E)
    counts = tl.where(tl.arange(0, BLOCK_E) < num_experts, counts, 0)
    is_hit = (counts > 0).to(tl.int32)
    return counts, is_hit, tl.cumsum(is_hit, axis=0) - is_hit, tl.sum(is_hit, axis=0)


@triton.jit
def _nth(is_hit, place, n, BLOCK_E: tl.constexpr):
    """The n-th hit expert."""
    return tl.sum(tl.where((is_hit != 0) & (place == n), tl.arange(0, BLOCK_E), 0), axis=0)


@triton.jit
def _is_last(arrived_ptr, SPLITS: tl.constexpr):
    """Whether this program arrives last of SPLITS; what the others have stored is then there to be read."""
    tl.debug_barrier()  # every thread has stored before one of them says so
    is_last = tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if is_last:
        tl.store(arrived_ptr, 0)
    return is_last


@triton.jit
def _sum_parts(parts, stride, SPLITS: tl.constexpr):
    total = tl.load(parts, cache_modifier=".cg")  # from L2, where the other programs' are
    for s in tl.static_range(1, SPLITS):
        total += tl.load(parts + s * stride, cache_modifier=".cg")
    return total


@triton.jit
def _decode_gate_up_kernel(
    x_ptr, w_ptr, index_ptr, weights_ptr, h_ptr, hits_ptr, slots_ptr, note_ptr, parts_ptr, arrived_ptr,
    T, WIDTH, HIDDEN, num_experts, stride_xt, stride_we, stride_wn, stride_wk,
    TOP_K: tl.constexpr, ACTIVATION: tl.constexpr, TRANSPOSED: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h[slot, I] of one expert and tile. Leaves for `down`: the hit experts, and each one's slot of every token."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    unit, split = tl.program_id(0), tl.program_id(1)
    tiles = tl.cdiv(WIDTH, BLOCK_N)
    hit, tile = unit // tiles, unit % tiles
    counts, is_hit, place, num_hits = _hits(index_ptr, T * TOP_K, num_experts, BLOCK_S, BLOCK_E)
    if unit + split == 0:
        if tl.sum(counts, axis=0) < T * TOP_K:
            note_lost(note_ptr, index_ptr, T * TOP_K, TOP_K, num_experts, BLOCK_S)
        tl.store(hits_ptr, num_hits)
        tl.store(hits_ptr + 1 + place, tl.arange(0, BLOCK_E), mask=is_hit != 0)
    if hit >= num_hits:
        return
    expert = _nth(is_hit, place, hit, BLOCK_E)

    offs_t, choice = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_C)[None, :]
    slot = offs_t[:, None] * TOP_K + choice
    is_slot = (offs_t < T)[:, None] & (choice < TOP_K)
    is_its = (tl.load(index_ptr + slot, mask=is_slot, other=-1) == expert) & is_slot
    slot = tl.min(tl.where(is_its, slot, T * TOP_K), axis=1)  # one column a token, even if it chose an expert twice
    if tile + split == 0:
        tl.store(slots_ptr + hit * BLOCK_T + offs_t, slot)

    x_rows = x_ptr + offs_t.to(tl.int64)[:, None] * stride_xt
    w_ptr += expert.to(tl.int64) * stride_we
    offs_n, offs_k = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    steps = tl.cdiv(HIDDEN, BLOCK_K)
    gate = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    up = gate
    for k in range(split * steps // SPLITS * BLOCK_K, (split + 1) * steps // SPLITS * BLOCK_K, BLOCK_K):
        is_in = (offs_t < T)[:, None] & (k + offs_k < HIDDEN)[None, :]
        x = tl.load(x_rows + k + offs_k[None, :], mask=is_in, other=0.0)
        w = _matrix(w_ptr, 0, offs_n, k + offs_k, WIDTH, HIDDEN, stride_wn, stride_wk, TRANSPOSED, "evict_first")
        gate = _add_product(gate, x, w, True)
        w = _matrix(w_ptr, WIDTH, offs_n, k + offs_k, WIDTH, HIDDEN, stride_wn, stride_wk, TRANSPOSED, "evict_first")
        up = _add_product(up, x, w, True)

    if SPLITS > 1:
        SIZE: tl.constexpr = BLOCK_N * BLOCK_T
        parts = parts_ptr + unit.to(tl.int64) * (2 * SPLITS * SIZE) + tl.arange(0, BLOCK_N)[:, None] * BLOCK_T + offs_t
        tl.store(parts + split * 2 * SIZE, gate)
        tl.store(parts + split * 2 * SIZE + SIZE, up)
        if not _is_last(arrived_ptr + unit, SPLITS):
            return
        gate, up = _sum_parts(parts, 2 * SIZE, SPLITS), _sum_parts(parts + SIZE, 2 * SIZE, SPLITS)
    h = activate(gate, ACTIVATION) * up
    if weights_ptr is not None:
        of_slot = tl.load(weights_ptr + offs_t[:, None] * TOP_K + choice, mask=is_its, other=0.0).to(tl.float32)
        h *= tl.sum(of_slot, axis=1)[None, :]
    mask = (offs_n < WIDTH)[:, None] & (slot < T * TOP_K)[None, :]
    tl.store(h_ptr + slot.to(tl.int64)[None, :] * WIDTH + offs_n[:, None], h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _decode_down_kernel(
    h_ptr, w_ptr, index_ptr, hits_ptr, slots_ptr, y_ptr, parts_ptr, arrived_ptr,
    T, HIDDEN, WIDTH, num_experts, stride_we, stride_wn, stride_wk,
    TOP_K: tl.constexpr, TRANSPOSED: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[T, H]: a tile of H, all hit experts one after the other, their widths cut in steps of BLOCK_K."""
    tile, split = tl.program_id(0), tl.program_id(1)
    offs_n, offs_k = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    steps_k = tl.cdiv(WIDTH, BLOCK_K)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH:
            # What this reads may be too early and so wrong, but it is always an address within the weights.
            _, is_hit, place, num_hits = _hits(index_ptr, T * TOP_K, num_experts, BLOCK_S, BLOCK_E)
            step = split * (num_hits * steps_k) // SPLITS
            expert = tl.minimum(_nth(is_hit, place, step // steps_k, BLOCK_E), num_experts - 1).to(tl.int64)
            offs = tl.minimum(step % steps_k * BLOCK_K + tl.arange(0, PREFETCH) * 64, WIDTH - 1)  # lines of 128 bytes
            rows = tl.minimum(offs_n, HIDDEN - 1).to(tl.int64)[:, None] * stride_wn
            prefetch_l2(w_ptr + expert * stride_we + rows + offs[None, :])
        tl.extra.cuda.gdc_wait()
    steps = tl.load(hits_ptr) * steps_k
    offs_t = tl.arange(0, BLOCK_T)
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for step in range(split * steps // SPLITS, (split + 1) * steps // SPLITS):
        hit, k = step // steps_k, step % steps_k * BLOCK_K
        expert = tl.load(hits_ptr + 1 + hit).to(tl.int64)
        slot = tl.load(slots_ptr + hit * BLOCK_T + offs_t)
        h_ptrs = h_ptr + slot.to(tl.int64)[:, None] * WIDTH + k + offs_k[None, :]
        h = tl.load(h_ptrs, mask=(slot < T * TOP_K)[:, None] & (k + offs_k < WIDTH)[None, :], other=0.0)
        w_matrix = w_ptr + expert * stride_we
        w = _matrix(w_matrix, 0, offs_n, k + offs_k, HIDDEN, WIDTH, stride_wn, stride_wk, TRANSPOSED, "evict_first")
        acc = _add_product(acc, h, w, True)

    if SPLITS > 1:
        SIZE: tl.constexpr = BLOCK_N * BLOCK_T
        parts = parts_ptr + tile * (SPLITS * SIZE) + tl.arange(0, BLOCK_N)[:, None] * BLOCK_T + offs_t[None, :]
        tl.store(parts + split * SIZE, acc)
        if not _is_last(arrived_ptr + tile, SPLITS):
            return
        acc = _sum_parts(parts, SIZE, SPLITS)
    choice = tl.arange(0, BLOCK_C)[None, :]
    is_slot = (offs_t < T)[:, None] & (choice < TOP_K)
    expert = tl.load(index_ptr + offs_t[:, None] * TOP_K + choice, mask=is_slot, other=0)
    is_lost = tl.max(((expert < 0) | (expert >= num_experts)).to(tl.int32), axis=1) != 0
    y = tl.where(is_lost[None, :], float("nan"), acc)
    y_ptrs = y_ptr + offs_t.to(tl.int64)[None, :] * HIDDEN + offs_n[:, None]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(offs_t < T)[None, :] & (offs_n < HIDDEN)[:, None])


@triton.jit
def _prefill_kernel(
    x, w, y_ptr, slots_ptr, offsets_ptr, weights_ptr,
    num_experts, N, K, stride_x, stride_we, stride_wn, stride_wk,
    SLOTS_PER_ROW: tl.constexpr, ACTIVATION: tl.constexpr, TRANSPOSED: tl.constexpr, TMA: tl.constexpr,
    SWAP: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """gate_up, where there is an ACTIVATION: y[sorted row] = act(..) * .. of x[slot // SLOTS_PER_ROW];
    down, where there is none: y[slot] = x[sorted row] @ w.T. `w`, and in down `x`, are descriptors if TMA.
    """
    GATED: tl.constexpr = ACTIVATION is not None
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    column = tl.arange(0, BLOCK_E)
    begin = tl.load(offsets_ptr + column, mask=column < num_experts, other=0)
    end = tl.load(offsets_ptr + column + 1, mask=column < num_experts, other=0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_until = tl.cumsum(tl.cdiv(end - begin, BLOCK_M), axis=0) * tiles_n  # of this expert and those before it
    for tile in range(tl.program_id(0), tl.max(tiles_until, axis=0), tl.num_programs(0)):
        is_before = tiles_until <= tile
        expert = tl.sum(is_before.to(tl.int32), axis=0)
        row, row_end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
        # Tiles that run at the same time form blocks of GROUP_M rows of tiles: L2 serves x and w to all of them.
        tile -= tl.max(tl.where(is_before, tiles_until, 0), axis=0)
        first_m = tile // (GROUP_M * tiles_n) * GROUP_M
        rows = tl.minimum(tl.cdiv(row_end - row, BLOCK_M) - first_m, GROUP_M)
        row += (first_m + tile % (GROUP_M * tiles_n) % rows) * BLOCK_M
        n = tile % (GROUP_M * tiles_n) // rows * BLOCK_N

        offs_m, offs_n = row + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        if GATED:
            slot = tl.load(slots_ptr + tl.minimum(offs_m, row_end - 1))  # rows past the end repeat the last one
            x_rows = x + (slot // SLOTS_PER_ROW).to(tl.int64)[:, None] * stride_x
        elif not TMA:
            x_rows = x + tl.minimum(offs_m, row_end - 1).to(tl.int64)[:, None] * stride_x
        if not TMA:
            w_matrix = w + expert.to(tl.int64) * stride_we
        SHAPE: tl.constexpr = (BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N)
        acc = tl.zeros(SHAPE, tl.float32)
        up = acc
        for k in range(0, K, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            if GATED or not TMA:
                a = tl.load(x_rows + offs_k[None, :], mask=(offs_k < K)[None, :], other=0.0)
            else:
                a = x.load([row, k])
            for half in tl.static_range(2 if GATED else 1):
                if not TMA:
                    b = _matrix(w_matrix, half * N, offs_n, offs_k, N, K, stride_wn, stride_wk, TRANSPOSED, "")
                elif TRANSPOSED:
                    b = w.load([expert, k, half * N + n]).reshape(BLOCK_K, BLOCK_N).T
                else:
                    b = w.load([expert, half * N + n, k]).reshape(BLOCK_N, BLOCK_K)
                if half == 0:
                    acc = _add_product(acc, a, b, SWAP)
                else:
                    up = _add_product(up, a, b, SWAP)

        y = activate(acc, ACTIVATION) * up if GATED else acc
        if SWAP:
            y = y.T
        mask = (offs_m < row_end)[:, None] & (offs_n < N)[None, :]
        slot = tl.load(slots_ptr + offs_m, mask=offs_m < row_end, other=0)  # again: registers are short in the loop
        if GATED:
            if weights_ptr is not None:
                y *= tl.load(weights_ptr + slot).to(tl.float32)[:, None]
            # Offsets within the tile have 32 bits, for the same reason.
            y_ptrs = y_ptr + row.to(tl.int64) * N + (tl.arange(0, BLOCK_M)[:, None] * N + offs_n[None, :])
        else:
            y_ptrs = y_ptr + slot.to(tl.int64)[:, None] * N + offs_n[None, :]
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _combine_kernel(
    parts_ptr, index_ptr, y_ptr, H, num_experts, TOP_K: tl.constexpr, BLOCK_H: tl.constexpr, PDL: tl.constexpr
):
    """y[t] = sum over j, in this order, of parts[t * TOP_K + j]."""
    token, offs = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((BLOCK_H,), tl.float32)
    for j in range(TOP_K):
        expert = tl.load(index_ptr + token * TOP_K + j)
        there = tl.where((expert >= 0) & (expert < num_experts), H, 0)  # columns that were computed
        acc += tl.load(parts_ptr + (token * TOP_K + j) * H + offs, mask=offs < there, other=float("nan"))
    tl.store(y_ptr + token * H + offs, acc.to(y_ptr.dtype.element_ty), mask=offs < H)

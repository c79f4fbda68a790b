"""The kernel of `decode_attention`, and of `rope_decode_attention`, which makes q, k and v of its one new token itself.

Read the former's page first. In the latter, part 0 is also the one that writes the new token's k and v into the cache.
It takes them from its registers and nobody reads the cache there, so no program waits for another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rope_kernel import load_rotated, note_outside


@triton.jit
def _tanh(x):
    return 1 - 2 / (tl.exp(2 * x) + 1)


@triton.jit
def _seen(
    scores, key, is_key, slot, bias_rows, is_row, window, softcap,
    IS_BOOL: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """scores [rows, keys], capped, with the mask's bias; -inf where a row's token, at `slot`, does not see the key."""
    if softcap is not None:
        scores = softcap * _tanh(scores / softcap)
    visible = is_row[:, None] & is_key[None, :]
    if bias_rows is not None:
        bias = tl.load(bias_rows[:, None] + key[None, :], mask=visible, other=0)
        if IS_BOOL:
            visible &= bias != 0
        else:
            scores += bias.to(tl.float32)
    elif IS_CAUSAL:
        visible &= key[None, :] <= slot[:, None]
    if window is not None:
        visible &= key[None, :] > (slot - window)[:, None]
    return tl.where(visible, scores, -float("inf"))


@triton.jit
def _shares(scores, maximum, total):
    """exp(scores), what is gathered so far has to be multiplied with, and the new maximum and sum."""
    higher = tl.maximum(maximum, tl.max(scores, 1))
    shift = tl.where(higher == -float("inf"), 0.0, higher)  # a row that has seen nothing yet
    shares = tl.exp(scores - shift[:, None])
    fade = tl.exp(maximum - shift)
    return shares, fade, higher, total * fade + tl.sum(shares, 1)


@triton.jit
def _heads_of(rows, kv, heads_ptr, GROUP: tl.constexpr, S_Q: tl.constexpr):
    """The query head of each row of key/value head `kv`, and whether there is one."""
    head = kv * GROUP + rows // S_Q
    is_row = rows < GROUP * S_Q
    if heads_ptr is not None:
        head = tl.load(heads_ptr + head, mask=is_row, other=-1)
        is_row &= head >= 0
    return head, is_row


@triton.jit
def _store(y_ptr, y, total, b, head, new, is_row, num_heads, offs_d, S_Q: tl.constexpr, D: tl.constexpr):
    """y / total, 0 where nothing was seen, to [B, S_q, H_q, D]."""
    y /= tl.where(total == 0, 1.0, total)[:, None]
    y_rows = y_ptr + ((b.to(tl.int64) * S_Q + new) * num_heads + head) * D
    mask = is_row[:, None] & (offs_d < D)[None, :]
    tl.store(y_rows[:, None] + offs_d[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _merge(
    partials_ptr, maxima_ptr, totals_ptr, first, used,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, MERGE: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """Output [ROWS, BLOCK_D] and sum [ROWS] of the parts `first`, ... in their order; all reads are from L2."""
    rows, splits, offs_d = tl.arange(0, ROWS), tl.arange(0, MAX_SPLITS), tl.arange(0, BLOCK_D)
    at = (first + splits)[:, None] * ROWS + rows[None, :]
    maxima = tl.load(maxima_ptr + at, mask=(splits < used)[:, None], other=-float("inf"), cache_modifier=".cg")
    totals = tl.load(totals_ptr + at, mask=(splits < used)[:, None], other=0.0, cache_modifier=".cg")
    maximum = tl.max(maxima, 0)
    shift = tl.where(maximum == -float("inf"), 0.0, maximum)
    total = tl.sum(totals * tl.exp(maxima - shift), 0)
    y = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for s in range(0, used, MERGE):
        some = s + tl.arange(0, MERGE)
        places = (first + some)[:, None] * ROWS + rows[None, :]
        is_used = (some < used)[:, None]
        weight = tl.exp(tl.load(maxima_ptr + places, mask=is_used, other=-float("inf"), cache_modifier=".cg") - shift)
        in_part = is_used[:, :, None] & (offs_d < D)[None, None, :]
        parts = partials_ptr + places[:, :, None] * D + offs_d[None, None, :]
        part = tl.load(parts, mask=in_part, other=0.0, cache_modifier=".cg")
        y += tl.sum(part * weight[:, :, None], 0)
    return y, total


@triton.jit(do_not_specialize=["ahead"])
def _decode_attention_kernel(
    q_ptr, k_ptr, v_ptr, heads_ptr, lengths_ptr, mask_ptr, sinks_ptr, y_ptr, partials_ptr, arrived_ptr,
    note_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, means_ptr,
    scale, window, softcap, eps, ahead, capacity, num_heads, stride_l, stride_c,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_mb, stride_mh, stride_ms,
    D: tl.constexpr, GROUP: tl.constexpr, S_Q: tl.constexpr, ROWS: tl.constexpr, MERGE: tl.constexpr,
    MAX_SPLITS: tl.constexpr, IS_BOOL: tl.constexpr, IS_NEW: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr,
    UNIT_OFFSET: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    split, num_splits = tl.program_id(0), tl.num_programs(0)
    kv, num_kv_heads, b = tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    # This program's part of the sequence; a new token is not in the cache yet.
    end = ahead
    if lengths_ptr is not None:
        # Beyond the cache there is nothing to read, by whatever 64 bits say.
        end += tl.minimum(tl.maximum(tl.load(lengths_ptr + b * stride_l), -1), capacity).to(tl.int32)
    last = tl.minimum(end - 1 if IS_NEW else end, capacity)
    begin = 0
    if window is not None:
        begin = tl.maximum(end - S_Q + 1 - window, 0)
    part = tl.cdiv(tl.cdiv(last - begin, num_splits), BLOCK_S) * BLOCK_S
    used = tl.maximum(tl.cdiv(last - begin, tl.maximum(part, 1)), 1)
    if split >= used:
        return
    begin += split * part
    stop = tl.minimum(begin + part, last)

    # Its rows: every query head that reads this key/value head, for every new token.
    rows = tl.arange(0, BLOCK_M)
    new = rows % S_Q
    slot = end - S_Q + new
    head, is_row = _heads_of(rows, kv, heads_ptr, GROUP, S_Q)
    offs_s, offs_d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    in_d = (offs_d < D)[None, :]
    x_ptr = q_ptr + b.to(tl.int64) * stride_qb
    k_head = k_ptr + b.to(tl.int64) * stride_kb + kv * stride_kh
    v_head = v_ptr + b.to(tl.int64) * stride_vb + kv * stride_vh
    q_rows = (x_ptr + head * stride_qh + new * stride_qs)[:, None]
    bias_rows = None
    if mask_ptr is not None:
        bias_rows = mask_ptr + b.to(tl.int64) * stride_mb + head * stride_mh + new * stride_ms

    # Maximum, sum and output so far.
    maximum = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if sinks_ptr is not None:
        if split == 0:
            maximum = tl.load(sinks_ptr + head, mask=is_row, other=0.0).to(tl.float32)
            total += 1
    if IS_NEW:
        if cos_ptr is not None:
            cos_ptr += b * stride_c
            sin_ptr += b * stride_c
        if means_ptr is not None:
            means_ptr += 2 * b
        q = load_rotated(
            x_ptr, head[:, None], is_row[:, None], num_heads, cos_ptr, sin_ptr, q_weight_ptr, means_ptr, 0, eps,
            R, PAIRS, UNIT_OFFSET, WIDE, D, BLOCK_D,
        ).to(y_ptr.dtype.element_ty)  # fmt: skip
        if split == 0:
            one = tl.arange(0, 1)
            own = (kv + one)[:, None]
            k_heads = x_ptr + num_heads * D
            k = load_rotated(
                k_heads, own, own == kv, num_kv_heads, cos_ptr, sin_ptr, k_weight_ptr, means_ptr, 1, eps,
                R, PAIRS, UNIT_OFFSET, WIDE, D, BLOCK_D,
            ).to(k_ptr.dtype.element_ty)  # fmt: skip
            v = tl.load(k_heads + (num_kv_heads + own) * D + offs_d[None, :], mask=in_d, other=0.0)
            place = tl.cast(end - 1, tl.int64)
            is_outside = (place < 0) | (place >= capacity)
            if note_ptr is not None:
                if is_outside & (kv == 0):
                    note_outside(note_ptr, b, lengths_ptr, 1, ahead - 1, capacity, stride_l, 0, 0)
            in_cache = offs_d[None, :] < tl.where(is_outside, 0, D)
            tl.store(k_head + place * stride_ks + offs_d[None, :], k, mask=in_cache)
            tl.store(v_head + place * stride_vs + offs_d[None, :], v, mask=in_cache)
            scores = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)[:, None] * scale
            key = end - 1 + one
            scores = _seen(scores, key, key >= 0, slot, bias_rows, is_row, window, softcap, IS_BOOL, False)
            shares, fade, maximum, total = _shares(scores, maximum, total)
            acc = shares * v.to(tl.float32)
    else:
        q = tl.load(q_rows + offs_d[None, :], mask=is_row[:, None] & in_d, other=0.0)

    for start in range(begin, stop, BLOCK_S):
        key = start + offs_s
        in_tile = (key < stop)[:, None] & in_d
        k_tile = k_head + tl.cast(start, tl.int64) * stride_ks
        k = tl.load(k_tile + offs_s[:, None] * stride_ks + offs_d[None, :], mask=in_tile, other=0.0)
        scores = tl.dot(q, k.T, input_precision="ieee") * scale
        scores = _seen(scores, key, key < stop, slot, bias_rows, is_row, window, softcap, IS_BOOL, S_Q > 1)
        shares, fade, maximum, total = _shares(scores, maximum, total)
        v_tile = v_head + tl.cast(start, tl.int64) * stride_vs
        v = tl.load(v_tile + offs_s[:, None] * stride_vs + offs_d[None, :], mask=in_tile, other=0.0)
        acc = tl.dot(shares.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")

    if used == 1:
        _store(y_ptr, acc, total, b, head, new, is_row, num_heads, offs_d, S_Q, D)
        return
    if MAX_SPLITS > 1:
        first = (b * num_kv_heads + kv) * num_splits
        all_parts = tl.num_programs(2) * num_kv_heads * num_splits
        maxima_ptr = partials_ptr + all_parts * (ROWS * D)
        totals_ptr = maxima_ptr + all_parts * ROWS
        own = (first + split) * ROWS + rows
        tl.store(partials_ptr + own[:, None] * D + offs_d[None, :], acc, mask=(rows < ROWS)[:, None] & in_d)
        tl.store(maxima_ptr + own, maximum, mask=rows < ROWS)
        tl.store(totals_ptr + own, total, mask=rows < ROWS)
        tl.debug_barrier()  # every thread has stored before one of them says so
        arrived = arrived_ptr + b * num_kv_heads + kv
        if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") < used - 1:
            return
        tl.store(arrived, 0)

        rows = tl.arange(0, ROWS)
        y, total = _merge(partials_ptr, maxima_ptr, totals_ptr, first, used, D, BLOCK_D, ROWS, MERGE, MAX_SPLITS)
        head, is_row = _heads_of(rows, kv, heads_ptr, GROUP, S_Q)
        _store(y_ptr, y, total, b, head, rows % S_Q, is_row, num_heads, offs_d, S_Q, D)

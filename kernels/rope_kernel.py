"""The kernel of `rope_and_cache`, and what of it `decode_attention` shares: read that op's page first."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .lost import lost_note
from .lost_kernel import is_read, note
from .mean_squares_kernel import squares_block, sum_of_squares
from .rms_norm_kernel import inverse_rms
from .target import has_pdl, launch_options

BLOCK_H = 8  # heads of a program, 16 bytes a thread


@triton.jit
def _load_factor(weights, offs_d, D: tl.constexpr, UNIT_OFFSET: tl.constexpr):
    """What normed heads are multiplied with, fp32 [1 or rows, BLOCK_D]."""
    weight = tl.load(weights + offs_d[None, :], mask=(offs_d < D)[None, :], other=0.0).to(tl.float32)
    return weight + 1 if UNIT_OFFSET else weight


@triton.jit
def load_rotated(
    x_ptr, head, is_row, num_heads, cos_ptr, sin_ptr, weight_ptr, means_ptr, i, eps,
    R: tl.constexpr, PAIRS: tl.constexpr, UNIT_OFFSET: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """rope(norm(x) * weight) of heads of one token, fp32 [rows, BLOCK_D], 0 beyond D.

    Args:
        x_ptr: the token's q or k, num_heads heads side by side.
        head: [rows, 1]; is_row: [rows, 1], whether there is one.
        cos_ptr, sin_ptr: the token's; None where nothing is rotated. weight_ptr: None where nothing is normed.
        means_ptr: of a norm over all heads (WIDE) the token's mean squares, q's (i 0) and k's (i 1); None: x's own.
    """
    offs_d = tl.arange(0, BLOCK_D)
    mask = is_row & (offs_d < D)[None, :]
    x_rows = x_ptr + head * D
    x = tl.load(x_rows + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        if WIDE:
            if means_ptr is not None:
                mean = tl.load(means_ptr + i)
            else:
                mean = sum_of_squares(x_ptr, 0, num_heads * D, WIDE) / (num_heads * D)
            scale = tl.rsqrt(mean + eps)
            weight_ptr += tl.where(is_row, head, 0) * D
        else:
            scale = inverse_rms(x, eps, D)
        x *= scale * _load_factor(weight_ptr, offs_d, D, UNIT_OFFSET)
    if cos_ptr is not None:
        # What turns with each element: the same lines once more, where a shuffle would depend on the layout.
        partner = ((offs_d ^ 1) if PAIRS else (offs_d + R // 2)) % R
        other = tl.load(x_rows + partner[None, :], mask=is_row, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            other *= scale * _load_factor(weight_ptr, partner, D, UNIT_OFFSET)
        cos = tl.load(cos_ptr + offs_d, mask=offs_d < R, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + offs_d, mask=offs_d < R, other=0.0).to(tl.float32)
        x = x * cos[None, :] + other * sin[None, :]
    return x


@triton.jit
def _slot_of(token, stop, positions_ptr, length, first, stride_pb, stride_ps, SLOT_STEP: tl.constexpr):
    """Where in the cache a token, or some, before `stop` belong, int64."""
    b, s = token // length, token % length
    slot = s * SLOT_STEP + first
    if positions_ptr is not None:
        slot += tl.load(positions_ptr + tl.cast(b, tl.int64) * stride_pb + s * stride_ps, mask=token < stop, other=0)
    return tl.cast(slot, tl.int64)


@triton.jit
def note_outside(
    note_ptr, token, positions_ptr, length, first, capacity, stride_pb, stride_ps,
    SLOT_STEP: tl.constexpr, CHUNK: tl.constexpr = 32,
):  # fmt: skip
    """For `lost_note`, by each token that is outside of the cache: by the first of them, which looks at all before."""
    if is_read(note_ptr):
        earlier = tl.zeros((), tl.int32)
        for start in range(0, token, CHUNK):
            other = start + tl.arange(0, CHUNK)
            slot = _slot_of(other, token, positions_ptr, length, first, stride_pb, stride_ps, SLOT_STEP)
            is_outside = (other < token) & ((slot < 0) | (slot >= capacity))
            earlier += tl.sum(is_outside.to(tl.int32), 0)
        if earlier == 0:
            slot = _slot_of(token, token + 1, positions_ptr, length, first, stride_pb, stride_ps, SLOT_STEP)
            note(note_ptr, token, slot, capacity)


@triton.jit(do_not_specialize=["length", "capacity", "first"])
def _rope_and_cache_kernel(
    qkv_ptr, cos_ptr, sin_ptr, k_ptr, v_ptr, positions_ptr, note_ptr, q_ptr, q_weight_ptr, k_weight_ptr, means_ptr,
    length, capacity, first, eps, num_heads, num_kv_heads,
    stride_xb, stride_xs, stride_cb, stride_cs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_pb, stride_ps,
    D: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr, UNIT_OFFSET: tl.constexpr, WIDE: tl.constexpr,
    SLOT_STEP: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token, block = tl.program_id(0), tl.program_id(1)
    b, s = (token // length).to(tl.int64), token % length
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    offs_h, offs_d = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    x_ptr = qkv_ptr + b * stride_xb + s * stride_xs
    cos_ptr = None if cos_ptr is None else cos_ptr + b * stride_cb + s * stride_cs
    sin_ptr = None if cos_ptr is None else sin_ptr + b * stride_cb + s * stride_cs
    means_ptr = None if means_ptr is None else means_ptr + 2 * token.to(tl.int64)
    q_blocks, kv_blocks = tl.cdiv(num_heads, BLOCK_H), tl.cdiv(num_kv_heads, BLOCK_H)
    if block < q_blocks:
        head = block * BLOCK_H + offs_h
        is_head = head < num_heads
        x = load_rotated(
            x_ptr, head, is_head, num_heads, cos_ptr, sin_ptr, q_weight_ptr, means_ptr, 0, eps,
            R, PAIRS, UNIT_OFFSET, WIDE, D, BLOCK_D,
        )  # fmt: skip
        q_rows = q_ptr + (token.to(tl.int64) * num_heads + head) * D
        tl.store(q_rows + offs_d, x.to(q_ptr.dtype.element_ty), mask=is_head & (offs_d < D))
    else:
        slot = _slot_of(token, token + 1, positions_ptr, length, first, stride_pb, stride_ps, SLOT_STEP)
        is_outside = (slot < 0) | (slot >= capacity)
        k_block = block - q_blocks
        if note_ptr is not None:
            if is_outside & (k_block == 0):
                note_outside(
                    note_ptr, token, positions_ptr, length, first, capacity, stride_pb, stride_ps, SLOT_STEP
                )  # fmt: skip
        head = k_block % kv_blocks * BLOCK_H + offs_h
        is_head = head < tl.where(is_outside, 0, num_kv_heads)
        if k_block < kv_blocks:
            k = load_rotated(
                x_ptr + num_heads * D, head, is_head, num_kv_heads, cos_ptr, sin_ptr, k_weight_ptr, means_ptr, 1, eps,
                R, PAIRS, UNIT_OFFSET, WIDE, D, BLOCK_D,
            )  # fmt: skip
            k_rows = k_ptr + b * stride_kb + head * stride_kh + slot * stride_ks
            tl.store(k_rows + offs_d, k.to(k_ptr.dtype.element_ty), mask=is_head & (offs_d < D))
        else:
            mask = is_head & (offs_d < D)
            v = tl.load(x_ptr + (num_heads + num_kv_heads + head) * D + offs_d, mask=mask)
            v_rows = v_ptr + b * stride_vb + head * stride_vh + slot * stride_vs
            tl.store(v_rows + offs_d, v.to(v_ptr.dtype.element_ty), mask=mask)


def wide_block(q_weight: torch.Tensor | None, num_heads: int, head_dim: int, mean_squares: torch.Tensor | None) -> int:
    """WIDE: of a norm over all heads how many elements are squared at a time; 0: there is none.

    Of one head that is all that there is, this norm and the one of each head are the same.
    """
    is_wide = mean_squares is not None or (q_weight is not None and len(q_weight) != head_dim)
    return squares_block(num_heads * head_dim) if is_wide else 0


def run(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    signed_sin: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor | None,
    first: int = 0,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
    pairs: bool = False,
    mean_squares: torch.Tensor | None = None,
) -> torch.Tensor:
    """The launch; see `rope_and_cache`. positions None: `first`, `first` + 1, ... Returns q [B, S, H_q, D]."""
    batch, length, width = qkv.shape
    _, num_kv_heads, capacity, head_dim = keys.shape
    num_heads = width // head_dim - 2 * num_kv_heads
    q = torch.empty(batch, length, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    is_start = positions is None or positions.numel() == 1
    p_strides = (0, 0) if positions is None or is_start else positions.stride()
    if cos is not None and signed_sin is not None:
        cos, signed_sin = cos.contiguous(), signed_sin.contiguous()
    c_strides = (0, 0) if cos is None else (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(2))
    block_d = triton.next_power_of_2(head_dim)
    blocks = triton.cdiv(num_heads, BLOCK_H) + 2 * triton.cdiv(num_kv_heads, BLOCK_H)
    if batch * length * blocks:
        _rope_and_cache_kernel[(batch * length, blocks)](
            qkv, cos, signed_sin, keys, values, positions,
            None if positions is None else lost_note(qkv.device, "position"), q, q_weight, k_weight,
            None if mean_squares is None else mean_squares.contiguous(),
            length, capacity, first, eps, num_heads, num_kv_heads,
            *qkv.stride()[:2], *c_strides, *keys.stride()[:3], *values.stride()[:3], *p_strides,
            D=head_dim, R=head_dim if cos is None else cos.shape[-1], PAIRS=pairs, UNIT_OFFSET=unit_offset,
            WIDE=wide_block(q_weight, num_heads, head_dim, mean_squares), SLOT_STEP=int(is_start), BLOCK_H=BLOCK_H,
            BLOCK_D=block_d, PDL=has_pdl(), num_warps=max(1, BLOCK_H * block_d // 256), **launch_options(),
        )  # fmt: skip
    return q

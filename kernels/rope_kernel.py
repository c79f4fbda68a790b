"""The kernel of `rope_and_cache`, and what of it `decode_attention` shares: read that op's page first."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .rms_norm_kernel import inverse_rms, load_factor
from .target import has_pdl, launch_options

BLOCK_H = 8  # heads of a program, 16 bytes a thread


@triton.jit
def load_rotated(
    x_rows, is_row, cos_ptr, sin_ptr, weight_ptr, eps,
    R: tl.constexpr, PAIRS: tl.constexpr, UNIT_OFFSET: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """rope(norm(x) * weight) of heads of one token, fp32 [rows, BLOCK_D], 0 beyond D.

    Args:
        x_rows: [rows, 1] pointers to the heads; is_row: [rows, 1], whether there is one.
        cos_ptr, sin_ptr: the token's; None where nothing is rotated. weight_ptr: None where nothing is normed.
    """
    offs_d = tl.arange(0, BLOCK_D)
    mask = is_row & (offs_d < D)[None, :]
    x = tl.load(x_rows + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        scale = inverse_rms(x, eps, D)
        x *= scale * load_factor(weight_ptr, offs_d, D, UNIT_OFFSET)
    if cos_ptr is not None:
        # What turns with each element: the same lines once more, where a shuffle would depend on the layout.
        partner = ((offs_d ^ 1) if PAIRS else (offs_d + R // 2)) % R
        other = tl.load(x_rows + partner[None, :], mask=is_row, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            other *= scale * load_factor(weight_ptr, partner, D, UNIT_OFFSET)
        cos = tl.load(cos_ptr + offs_d, mask=offs_d < R, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + offs_d, mask=offs_d < R, other=0.0).to(tl.float32)
        x = x * cos[None, :] + other * sin[None, :]
    return x


@triton.jit(do_not_specialize=["length", "capacity", "first"])
def _rope_and_cache_kernel(
    qkv_ptr, cos_ptr, sin_ptr, k_ptr, v_ptr, positions_ptr, q_ptr, q_weight_ptr, k_weight_ptr,
    length, capacity, first, eps, num_heads, num_kv_heads,
    stride_xb, stride_xs, stride_cb, stride_cs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_pb, stride_ps,
    D: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr, UNIT_OFFSET: tl.constexpr, SLOT_STEP: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
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
    q_blocks, kv_blocks = tl.cdiv(num_heads, BLOCK_H), tl.cdiv(num_kv_heads, BLOCK_H)
    if block < q_blocks:
        head = block * BLOCK_H + offs_h
        is_head = head < num_heads
        q_in = x_ptr + head * D
        x = load_rotated(q_in, is_head, cos_ptr, sin_ptr, q_weight_ptr, eps, R, PAIRS, UNIT_OFFSET, D, BLOCK_D)
        q_rows = q_ptr + (token.to(tl.int64) * num_heads + head) * D
        tl.store(q_rows + offs_d, x.to(q_ptr.dtype.element_ty), mask=is_head & (offs_d < D))
    else:
        slot = s * SLOT_STEP + first
        if positions_ptr is not None:
            slot += tl.load(positions_ptr + b * stride_pb + s * stride_ps)
        slot = slot.to(tl.int64)
        k_block = block - q_blocks
        head = k_block % kv_blocks * BLOCK_H + offs_h
        is_head = head < tl.where((slot >= 0) & (slot < capacity), num_kv_heads, 0)
        if k_block < kv_blocks:
            k_in = x_ptr + (num_heads + head) * D
            k = load_rotated(k_in, is_head, cos_ptr, sin_ptr, k_weight_ptr, eps, R, PAIRS, UNIT_OFFSET, D, BLOCK_D)
            k_rows = k_ptr + b * stride_kb + head * stride_kh + slot * stride_ks
            tl.store(k_rows + offs_d, k.to(k_ptr.dtype.element_ty), mask=is_head & (offs_d < D))
        else:
            mask = is_head & (offs_d < D)
            v = tl.load(x_ptr + (num_heads + num_kv_heads + head) * D + offs_d, mask=mask)
            v_rows = v_ptr + b * stride_vb + head * stride_vh + slot * stride_vs
            tl.store(v_rows + offs_d, v.to(v_ptr.dtype.element_ty), mask=mask)


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
            qkv, cos, signed_sin, keys, values, positions, q, q_weight, k_weight,
            length, capacity, first, eps, num_heads, num_kv_heads,
            *qkv.stride()[:2], *c_strides, *keys.stride()[:3], *values.stride()[:3], *p_strides,
            D=head_dim, R=head_dim if cos is None else cos.shape[-1], PAIRS=pairs, UNIT_OFFSET=unit_offset,
            SLOT_STEP=int(is_start), BLOCK_H=BLOCK_H, BLOCK_D=block_d, PDL=has_pdl(),
            num_warps=max(1, BLOCK_H * block_d // 256), **launch_options(),
        )  # fmt: skip
    return q

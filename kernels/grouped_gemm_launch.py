"""How the kernels of `grouped_gemm_kernels` are launched."""

from __future__ import annotations

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from .grouped_gemm_configs import DECODE_T, Config, Decode, Prefill, lie_on_16_bytes
from .grouped_gemm_kernels import _combine_kernel, _decode_down_kernel, _decode_gate_up_kernel, _prefill_kernel
from .lost import lost_note
from .routing_kernels import run_sort
from .target import COUNTERS, arch, arrival_counters, free_sms, has_pdl, launch_options, num_sms


def launch(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor | None,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    activation: str,
    is_transposed: bool,
    config: Config,
    sms: int | None = None,
) -> torch.Tensor:
    """`experts` by the kernels that `config` configures.

    Args:
        x: [T, H]; or [T * k, H], a row a slot. T, H, I and E are at least 1; all contiguous in the last dimension.
        top_k_weights: [T, k] contiguous; None for ones.
        sms: multiprocessors to use; None: all that are free.

    Raises:
        ValueError: the kernels do not take this shape; see `takes`.
    """
    why_not = takes(config, x, top_k_index, gate_up_proj, down_proj, is_transposed)
    if why_not:
        raise ValueError(f"{config} does not take {why_not}")
    if is_transposed:
        gate_up_proj, down_proj = gate_up_proj.mT, down_proj.mT  # [E, N, K] in name, as the others; the strides tell
    index = top_k_index.contiguous()
    given = x, index, top_k_weights, gate_up_proj, down_proj, activation, is_transposed
    if isinstance(config, Decode):
        return _launch_decode(*given, config, sms or num_sms(x.device))
    return _launch_prefill(*given, config, sms or free_sms(x.device))


def takes(config: Config, x, top_k_index, gate_up_proj, down_proj, is_transposed: bool) -> str:
    """What of these operands the kernels of `config` do not take; empty if they take them all."""
    num_tokens = len(top_k_index)
    if x.stride(1) != 1 or gate_up_proj.stride(2) != 1 or down_proj.stride(2) != 1:
        return "x or weights that are not contiguous in their last dimension"
    if isinstance(config, Decode):
        if num_tokens > DECODE_T:
            return f"{num_tokens} tokens, but at most {DECODE_T}"
        if len(x) != num_tokens:
            return "a row of x for each choice"
        if is_transposed and (0 < arch() < 90 or 0 < arch() and config.block_n < 64):
            return "transposed weights, where these go to tensor cores by way of registers, too many of them"
    elif config.tma:
        if 0 < arch() < 90:
            return f"sm_{arch()}, which has no TMA"
        if not lie_on_16_bytes(x.shape[1], gate_up_proj, down_proj):
            return "weights or a width I whose rows do not lie at multiples of 16 bytes"
    return ""


def _launch_decode(x, index, weights, gate_up, down, activation, is_transposed, config: Decode, sms: int):
    (num_tokens, top_k), (num_experts, hidden, width) = index.shape, down.shape
    block_t = max(16, triton.next_power_of_2(num_tokens))
    max_hits = min(num_tokens * top_k, num_experts)
    h = x.new_empty(num_tokens * top_k, width)
    hits = torch.empty(1 + max_hits, dtype=torch.int32, device=x.device)
    slots = torch.empty(max_hits, block_t, dtype=torch.int32, device=x.device)
    y = x.new_empty(num_tokens, hidden)
    options = dict(
        TOP_K=top_k, TRANSPOSED=is_transposed, PDL=has_pdl(), BLOCK_T=block_t, BLOCK_C=triton.next_power_of_2(top_k),
        BLOCK_S=triton.next_power_of_2(num_tokens * top_k), BLOCK_E=triton.next_power_of_2(num_experts + 1),
        BLOCK_N=config.block_n, BLOCK_K=config.block_k, num_warps=config.num_warps, **launch_options(),
    )  # fmt: skip

    units = max_hits * triton.cdiv(width, config.block_n)
    steps = triton.cdiv(hidden, config.block_k)
    splits, parts, arrived = _split(x, units, 2 * config.block_n * block_t, steps, config, sms)
    _decode_gate_up_kernel[(units, splits)](
        x, gate_up, index, weights, h, hits, slots, lost_note(x.device, "expert"), parts, arrived,
        num_tokens, width, hidden, num_experts, x.stride(0), *gate_up.stride(),
        ACTIVATION=activation, SPLITS=splits, num_stages=config.num_stages, **options,
    )  # fmt: skip
    tiles = triton.cdiv(hidden, config.block_n)
    steps = triton.cdiv(width, config.block_k)
    splits, parts, arrived = _split(x, tiles, config.block_n * block_t, steps, config, sms)
    lines = 0 if is_transposed else triton.next_power_of_2(triton.cdiv(config.block_k * (config.num_stages - 1), 64))
    _decode_down_kernel[(tiles, splits)](
        h, down, index, hits, slots, y, parts, arrived,
        num_tokens, hidden, width, num_experts, *down.stride(),
        SPLITS=splits, PREFETCH=lines,
        num_stages=2 * config.num_stages,  # half of them load `slots`, on which the others depend
        **options,
    )  # fmt: skip
    return y


def _split(x, tiles: int, part_size: int, steps: int, config: Decode, sms: int):
    """How many programs share a tile; where they leave their parts, and where they count their arrivals."""
    splits = max(1, min(sms * config.programs_per_sm // tiles, steps, 16))
    if splits == 1:
        return 1, None, None
    assert tiles <= COUNTERS  # programs share tiles only where these are few
    parts = torch.empty(tiles * splits * part_size, dtype=torch.float32, device=x.device)
    return splits, parts, arrival_counters(x.device)


def _launch_prefill(x, index, weights, gate_up, down, activation, is_transposed, config: Prefill, sms: int):
    (num_tokens, top_k), (num_experts, hidden, width) = index.shape, down.shape
    num_slots = num_tokens * top_k
    slots, offsets = run_sort(index, num_experts)
    h = x.new_empty(num_slots, width)
    parts = torch.empty(num_slots, hidden, dtype=torch.float32, device=x.device)
    y = x.new_empty(num_tokens, hidden)
    # rows, of x, w, y, factors; N, K; columns of a tile
    gemms = (
        (x, gate_up, h, weights, width, hidden, config.block_n, activation),
        (h, down, parts, None, hidden, width, 2 * config.block_n, None),
    )
    tiles_m = num_slots // config.block_m + min(num_slots, num_experts)  # at most
    for rows, w, out, factors, n, k, block_n, act in gemms:
        strides, source = w.stride(), rows
        if config.tma:
            block = [1, config.block_k, block_n] if is_transposed else [1, block_n, config.block_k]
            w = TensorDescriptor.from_tensor(w.mT if is_transposed else w, block)
            source = rows if act else TensorDescriptor.from_tensor(rows, [config.block_m, config.block_k])
        _prefill_kernel[(min(sms * config.programs_per_sm, tiles_m * triton.cdiv(n, block_n)),)](
            source, w, out, slots, offsets, factors, num_experts, n, k, rows.stride(0), *strides,
            SLOTS_PER_ROW=num_slots // len(x), ACTIVATION=act, TRANSPOSED=is_transposed, TMA=config.tma,
            SWAP=config.swap, PDL=has_pdl(), BLOCK_M=config.block_m, BLOCK_N=block_n, BLOCK_K=config.block_k,
            GROUP_M=config.group_m, BLOCK_E=triton.next_power_of_2(num_experts),
            num_warps=config.num_warps, num_stages=config.num_stages, **launch_options(),
        )  # fmt: skip
    block_h = min(1024, triton.next_power_of_2(hidden))
    _combine_kernel[(num_tokens, triton.cdiv(hidden, block_h))](
        parts, index, y, hidden, num_experts, TOP_K=top_k, BLOCK_H=block_h, PDL=has_pdl(), **launch_options()
    )
    return y

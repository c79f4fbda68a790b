"""The experts of a MoE layer: for each token the gated FFNs that it is routed to, weighted and summed.

    gate, up = x[t] @ gate_up_proj[e].T                     [I] each, gate first
    y[t]     = sum over choices j, e = top_k_index[t, j]:   top_k_weights[t, j] * (act(gate) * up) @ down_proj[e].T

On CUDA the kernels that run a shape are those that were measured to be the fastest there (see `tuned`), torch's grouped
GEMM among them. What nobody measured torch runs, too; but in a CUDA graph, if torch would wait for the device, ours do.
The kernels are in `grouped_gemm_kernels`. When they win is not measured yet.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .gemm import ACTIVATIONS, activation_named
from .grouped_gemm_configs import DECODE_T, Config, Decode, Prefill, lie_on_16_bytes
from .lost import lost_note, raise_lost
from .routing import check_routing, sort_by_expert_ref
from .tuned import TORCH, lookup

_log = logging.getLogger("tp_runtime")

CANDIDATES: dict[str, tuple[Config, ...]] = {
    "decode": (
        Decode(block_n=32, block_k=128, programs_per_sm=2, num_warps=4, num_stages=4),
        Decode(block_n=64, block_k=64, programs_per_sm=0, num_warps=4, num_stages=4),
        Decode(block_n=64, block_k=64, programs_per_sm=2, num_warps=4, num_stages=4),
        Decode(block_n=64, block_k=64, programs_per_sm=3, num_warps=4, num_stages=4),
        Decode(block_n=64, block_k=128, programs_per_sm=1, num_warps=4, num_stages=4),
        Decode(block_n=64, block_k=128, programs_per_sm=2, num_warps=4, num_stages=3),
    ),
    "prefill": (
        # few rows an expert: as much of the weights in flight as there is room for
        Prefill(16, 64, 128, group_m=8, swap=True, tma=True, num_warps=4, num_stages=3, programs_per_sm=2),
        Prefill(32, 64, 128, group_m=8, swap=True, tma=True, num_warps=4, num_stages=3),
        Prefill(64, 64, 64, group_m=8, swap=False, tma=True, num_warps=4, num_stages=4, programs_per_sm=2),
        # many: as large a tile as there are registers for
        Prefill(64, 128, 64, group_m=8, swap=False, tma=True, num_warps=8, num_stages=3),
        Prefill(128, 64, 64, group_m=8, swap=False, tma=True, num_warps=8, num_stages=4),
        Prefill(128, 128, 64, group_m=8, swap=False, tma=True, num_warps=8, num_stages=3),
        Prefill(128, 128, 64, group_m=16, swap=False, tma=True, num_warps=8, num_stages=3),
        # without TMA: sm_80, and rows that do not lie at multiples of 16 bytes
        Prefill(16, 64, 32, group_m=8, swap=True, tma=False, num_warps=4, num_stages=4, programs_per_sm=2),
        Prefill(64, 64, 64, group_m=8, swap=False, tma=False, num_warps=8, num_stages=3),
        Prefill(128, 64, 32, group_m=8, swap=False, tma=False, num_warps=8, num_stages=4),
    ),
}
LOOP = "loop"  # `experts_ref`: expert by expert, the host waiting for the device
# What a CUDA graph gets where nothing was measured and torch would wait: the first that takes the operands. float32,
# multiplied by CUDA cores and never measured, has tiles of its own, that fit into their registers.
UNTUNED: dict[bool, tuple[tuple[str, Config], ...]] = {
    False: (("decode", CANDIDATES["decode"][2]), ("prefill", CANDIDATES["prefill"][8])),
    True: (
        ("decode", Decode(block_n=16, block_k=64, programs_per_sm=2, num_warps=4, num_stages=4)),
        ("prefill", Prefill(32, 32, 32, group_m=8, swap=False, tma=False, num_warps=4, num_stages=3)),
    ),
}


def op_name(num_experts: int, top_k: int) -> str:
    """The op's name in the tables of `tuned`, where it stands with N = I, K = H and M = T."""
    return f"experts_{num_experts}_{top_k}"


def candidates(m: int, n: int, k: int, dtype: torch.dtype) -> Iterator[tuple[str, Config]]:
    """(kernel, configuration) that may be the fastest for T = m tokens, I = n and H = k."""
    from .target import arch

    if m <= DECODE_T:
        yield from (("decode", config) for config in CANDIDATES["decode"])
    if m > 4:
        has_tma = arch() >= 90 and n * dtype.itemsize % 16 == 0 == k * dtype.itemsize % 16
        most = 64 * 64 if arch() >= 100 else 128 * 128  # there, larger tiles leave the epilogue too few registers
        for config in CANDIDATES["prefill"]:
            assert isinstance(config, Prefill)
            if config.tma == has_tma and config.block_m * config.block_n <= most:
                yield "prefill", config


def experts(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    activation: str = "silu",
    is_transposed: bool = False,
    weigh_input: bool = False,
    num_sms: int | None = None,
) -> torch.Tensor:
    """The weighted sum of each token's experts; of experts cut along I, this rank's part of it.

    Args:
        x: [T, H].
        top_k_index: [T, k], any integers; k at most E.
        top_k_weights: [T, k], any floats.
        gate_up_proj: [E, 2 * I, H], all of gate before all of up; transposed [E, H, 2 * I]. I may be 0.
        down_proj: [E, H, I]; transposed [E, I, H].
        activation: silu, gelu (exact) or gelu_tanh.
        is_transposed: whether the weights are stored input features first, as Llama 4 has them.
        weigh_input: whether the routing weight scales an expert's input, as in Llama 4, not its output.
        num_sms: multiprocessors that many tokens take, so that communication keeps the others; None: all.

    Returns:
        [T, H] in x's dtype: summed in float32 in a fixed order, rounded once; the same bits at every call.

    Raises:
        ValueError: shapes that do not fit; a token given an expert that is not there or, on the CPU, a NaN weight. On
            CUDA, where nothing waits for the device, either makes that token's row NaN, and an expert that is not there
            raises in a later call on that device, or when it is asked: see `lost`.
    """
    given = x, top_k_index, top_k_weights, gate_up_proj, down_proj, activation, is_transposed, weigh_input
    if torch.compiler.is_compiling():
        return torch.ops.tp_runtime.experts(*given, num_sms)
    return _experts_cuda(*given, num_sms) if x.is_cuda else experts_ref(*given)


def experts_ref(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    activation: str = "silu",
    is_transposed: bool = False,
    weigh_input: bool = False,
) -> torch.Tensor:
    """The same, expert by expert, by torch: gate, up, act(gate), their product and each part are rounded as well."""
    num_experts, top_k = check(x, top_k_index, top_k_weights, gate_up_proj, down_proj, activation, is_transposed)[:2]
    chosen, act = top_k_index.flatten(), ACTIVATIONS[activation]
    if chosen.numel() and (  # three questions that cost little; where one is answered by yes, say what is wrong
        chosen.min() < 0 or chosen.max() >= num_experts or math.isnan(top_k_weights.sum())
    ):
        check_routing(top_k_index, top_k_weights, num_experts)
    if is_transposed:
        gate_up_proj, down_proj = gate_up_proj.mT, down_proj.mT
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros(x.shape, dtype=wide, device=x.device)
    order = chosen.argsort(stable=True)
    token_of_slot, weight_of_slot = order // top_k, top_k_weights.flatten()[order].unsqueeze(1)
    start = 0
    for expert, count in enumerate(torch.bincount(chosen, minlength=num_experts).tolist()):
        if count:
            token, weight = token_of_slot[start : start + count], weight_of_slot[start : start + count]
            rows = x[token] * weight.to(x.dtype) if weigh_input else x[token]
            gate, up = F.linear(rows, gate_up_proj[expert]).chunk(2, dim=-1)
            part = F.linear(act(gate) * up, down_proj[expert])
            y.index_add_(0, token, part.to(wide) if weigh_input else part * weight.to(wide))
            start += count
    return y.to(x.dtype)


def experts_torch(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    activation: str = "silu",
    is_transposed: bool = False,
    weigh_input: bool = False,
) -> torch.Tensor:
    """The same by torch's grouped GEMM, which on CUDA waits for the device unless `has_grouped_mm`."""
    top_k, num_experts = top_k_index.shape[1], len(gate_up_proj)
    sort = sort_by_expert_ref
    if x.is_cuda:
        from .routing_kernels import run_sort as sort  # notes lost tokens, in one launch
    if not is_transposed:
        gate_up_proj, down_proj = gate_up_proj.mT, down_proj.mT
    slots, offsets = sort(top_k_index, num_experts)
    rows = x[slots // top_k]
    if weigh_input:
        rows = rows * top_k_weights.flatten()[slots].unsqueeze(1).to(x.dtype)
    gate, up = F.grouped_mm(rows, gate_up_proj, offs=offsets[1:]).chunk(2, dim=-1)
    part = F.grouped_mm(ACTIVATIONS[activation](gate) * up, down_proj, offs=offsets[1:])
    parts = torch.empty_like(part)
    parts[slots] = part
    weighted = parts.unflatten(0, (-1, top_k)).float()
    if not weigh_input:
        weighted = weighted * top_k_weights.float().unsqueeze(2)
    is_there = ((top_k_index >= 0) & (top_k_index < num_experts)).unsqueeze(2)
    return torch.where(is_there, weighted, torch.nan).sum(1).to(x.dtype)


def run(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    activation: str = "silu",
    is_transposed: bool = False,
    weigh_input: bool = False,
    num_sms: int | None = None,
    *,
    kernel: str,
    config: Config | None = None,
) -> torch.Tensor:
    """`experts` by decode or prefill, as `config` says, by torch's grouped GEMM or its loop. T and I are at least 1."""
    if kernel == LOOP:
        return experts_ref(
            x, top_k_index, top_k_weights, gate_up_proj, down_proj, activation, is_transposed, weigh_input
        )
    if kernel == TORCH or config is None:
        return experts_torch(
            x, top_k_index, top_k_weights, gate_up_proj, down_proj, activation, is_transposed, weigh_input
        )
    from .grouped_gemm_launch import launch

    weights = top_k_weights.contiguous()
    if weigh_input:
        x, weights = (x.unsqueeze(1) * weights.to(x.dtype).unsqueeze(2)).flatten(0, 1), None
    return launch(x, top_k_index, weights, gate_up_proj, down_proj, activation, is_transposed, config, num_sms)


def _experts_cuda(
    x, top_k_index, top_k_weights, gate_up_proj, down_proj, activation="silu", is_transposed=False, weigh_input=False,
    num_sms=None,
) -> torch.Tensor:  # fmt: skip
    given = x, top_k_index, top_k_weights, gate_up_proj, down_proj
    num_experts, top_k, hidden, width = check(*given, activation, is_transposed)
    raise_lost(x.device)
    if 0 in (len(x), hidden, width):
        return torch.zeros_like(x)
    kernel, config = chosen(x, top_k_index, gate_up_proj, down_proj, width, is_transposed, weigh_input)
    return run(*given, activation, is_transposed, weigh_input, num_sms, kernel=kernel, config=config)


def chosen(
    x, top_k_index, gate_up_proj, down_proj, width: int, is_transposed: bool, weigh_input: bool
) -> tuple[str, Config | None]:
    """(kernel, configuration) that was measured to be the fastest on x's device; what can run, where none was."""
    from .grouped_gemm_launch import takes
    from .target import arrival_counters

    (num_tokens, top_k), (num_experts, hidden) = top_k_index.shape, (len(gate_up_proj), x.shape[1])

    def can_run(kernel: str, config: Config) -> bool:
        if kernel == "decode" and weigh_input and top_k > 1:
            return False
        return not takes(config, x, top_k_index, gate_up_proj, down_proj, is_transposed)

    row = lookup(op_name(num_experts, top_k), x, width, hidden, num_tokens, CANDIDATES)
    if row is not None and row["kernel"] != TORCH and can_run(row["kernel"], row["config"]):
        return row["kernel"], row["config"]
    if has_grouped_mm(x, gate_up_proj, down_proj):
        return TORCH, None
    _say_untuned(x.dtype, num_experts, width, hidden)
    if not _is_capturing():
        lost_note(x.device, "expert"), arrival_counters(x.device)  # which cannot be made when the same call is captured
        return LOOP, None
    return next(choice for choice in UNTUNED[x.dtype == torch.float32] if can_run(*choice))


def has_grouped_mm(x: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor) -> bool:
    """Whether torch's grouped GEMM is one kernel here. Else the host reads the sizes of the groups: no CUDA graph."""
    is_known = x.dtype == torch.bfloat16 and _capability(x.device)[0] in (9, 10)
    return is_known and lie_on_16_bytes(x.shape[1], gate_up_proj, down_proj)


def _is_capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _say_untuned(dtype: torch.dtype, num_experts: int, width: int, hidden: int) -> None:
    _log.warning(
        "experts %dx%dx%d, %s: torch runs one expert after the other, waiting for the device; `python -m bench.tune` "
        "measures kernels that do not, and which a CUDA graph is given unmeasured",
        num_experts, width, hidden, dtype,
    )  # fmt: skip


def check(
    x, top_k_index, top_k_weights, gate_up_proj, down_proj, activation: str, is_transposed: bool
) -> tuple[int, int, int, int]:
    """E, k, H and I.

    Raises:
        ValueError: the operands do not fit together.
    """
    num_experts, hidden, width = down_proj.mT.shape if is_transposed else down_proj.shape
    packed = (num_experts, hidden, 2 * width) if is_transposed else (num_experts, 2 * width, hidden)
    num_tokens, top_k = top_k_index.shape
    shapes = x.shape, top_k_weights.shape, gate_up_proj.shape
    if shapes != ((num_tokens, hidden), (num_tokens, top_k), packed):
        of = "x {}, top_k_weights {}, gate_up_proj {}".format(*map(list, shapes))
        fits = f"[{num_tokens}, {hidden}], [{num_tokens}, {top_k}], {list(packed)}"
        down, index = list(down_proj.shape), list(top_k_index.shape)
        raise ValueError(f"{of} do not fit down_proj {down} and top_k_index {index}: they should be {fits}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k_index {list(top_k_index.shape)}: top_k={top_k} of {num_experts} experts")
    if not x.dtype == gate_up_proj.dtype == down_proj.dtype:
        raise ValueError(f"x is {x.dtype}, but gate_up_proj {gate_up_proj.dtype}, down_proj {down_proj.dtype}")
    activation_named(activation)
    return num_experts, top_k, hidden, width


_library = torch.library.Library("tp_runtime", "FRAGMENT")
_library.define(
    "experts(Tensor x, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up_proj, Tensor down_proj,"
    " str activation='silu', bool is_transposed=False, bool weigh_input=False, int? num_sms=None) -> Tensor"
)
_library.impl("experts", lambda *given: experts_ref(*given[:8]), "CPU")
_library.impl("experts", _experts_cuda, "CUDA")


def _experts_fake(x, top_k_index, top_k_weights, gate_up_proj, down_proj, activation="silu", is_transposed=False, *_):
    check(x, top_k_index, top_k_weights, gate_up_proj, down_proj, activation, is_transposed)
    return x.new_empty(x.shape)


_library.impl("experts", _experts_fake, "Meta")

"""What is said before a run (the plan's table) and after it (predicted beside measured), for people and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from .estimate import decode_floor_ms, decode_read_bytes, find_device
from .plan import ITEM_BYTES, ParameterPlan, Plan, Range

MIB = 2**20


def plan_table(plan: Plan) -> str:
    """The plan in three tables, at most 120 columns wide for published models.

    1. Each parameter pattern: style, full shape, a rank's part (smallest..largest where ranks differ), and the MiB that
       it takes, all layers together, on the rank that holds most of it.
    2. Each rank: its heads, its parts of vocabulary and widths, its memory.
    3. Each collective: how often it is called in a forward pass, and the bytes of its result.
    """
    ranks = range(plan.tp_size)
    item_bytes = ITEM_BYTES[plan.dtype]
    parameters = [("parameter", "style", "full shape", "a rank's part", "MiB")]
    for p in plan.parameters:
        most = max(p.count * math.prod(p.local_shape(rank)) * item_bytes for rank in ranks)
        parameters.append((p.name, p.style, _shape(p.shape), _part(p, ranks), f"{most / MIB:.2f}"))

    cut = {
        "vocabulary": _ranges(plan, "embed_tokens.weight"),
        "FFN": _ranges(plan, "mlp.down_proj.weight", "feed_forward.down_proj.weight"),
        "expert FFN": _ranges(plan, "experts.down_proj"),
        "shared FFN": _ranges(plan, "shared_expert.down_proj.weight"),
    }
    cut = {name: ranges for name, ranges in cut.items() if ranges}
    holdings = [("rank", "query heads", "KV heads", *cut, "weights MiB", "KV cache bytes/token")]
    for rank, heads in enumerate(plan.heads):
        parts = [_range(ranges[rank]) for ranges in cut.values()]
        memory = (f"{plan.weight_bytes(rank) / MIB:.2f}", str(plan.kv_cache_bytes_per_token(rank)))
        holdings.append((str(rank), _range(heads.query), _range(heads.kv), *parts, *memory))

    title = (
        f"{plan.model_type}, {plan.tp_size} rank{'s' * (plan.tp_size > 1)}, {plan.dtype}, {plan.num_layers} layers, "
        f"head size {plan.head_dim}"
    )
    lines = [title, "", *_columns(parameters), "", *_columns(holdings), _total(plan), ""]
    collectives = [("collective", "after", "times", "bytes", "for each")]
    for c in plan.collectives:
        unit = "sequence" if c.op == "all_gather" else "token"
        collectives.append((c.op, c.name, str(len(c.layers) or 1), str(c.bytes_per_token), unit))
    if plan.collectives:
        lines += _columns(collectives)
    per_layer = sum(len(c.layers) for c in plan.collectives) // plan.num_layers
    return "\n".join([*lines, f"collectives per layer: {per_layer}"])


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows, the first one a heading, as lines of equal columns; columns of numbers are set to the right."""
    columns = []
    for heading, *cells in zip(*rows, strict=True):
        width = max(map(len, (heading, *cells)))
        is_number = all(cell.replace(".", "", 1).isdigit() for cell in cells)
        columns.append([f"{cell:{'>' if is_number else '<'}{width}}" for cell in (heading, *cells)])
    return ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]


def _shape(shape: Iterable[object]) -> str:
    return " x ".join(map(str, shape))


def _range(part: Range) -> str:
    start, stop = part
    return "none" if start == stop else f"{start}" if stop == start + 1 else f"{start}-{stop - 1}"


def _part(p: ParameterPlan, ranks: Iterable[int]) -> str:
    """`96 x 73..80`: the local shape, its smallest and its largest where ranks differ."""
    if p.dim is None:
        return "all"
    sizes = [sorted(set(sizes)) for sizes in zip(*(p.local_shape(rank) for rank in ranks), strict=True)]
    return _shape(f"{s[0]}..{s[-1]}" if len(s) > 1 else s[0] for s in sizes)


def _ranges(plan: Plan, *suffixes: str) -> list[Range]:
    """Each rank's part of the dimension along which the first parameter of such a name is cut."""
    found = next((p for p in plan.parameters if p.name.endswith(suffixes)), None)
    return [ranges[0] for ranges in found.ranges] if found else []


def _total(plan: Plan) -> str:
    """What all ranks hold together, beside what the model has once."""
    held = sum(plan.weight_bytes(rank) for rank in range(plan.tp_size)) / MIB
    once = sum(p.count * math.prod(p.shape) for p in plan.parameters) * ITEM_BYTES[plan.dtype] / MIB
    return f"weights: {once:.2f} MiB; all ranks together hold {held:.2f} MiB, {held / once - 1:.1%} more"


def run_report(
    plan: Plan, *, name: str, device: str, load_s: float, timing, batch: int, peak_memory_bytes: Sequence[int],
    collective_s: Sequence[float], experts_per_token: int, overlap: Mapping,
) -> dict:  # fmt: skip
    """The run in figures, predicted beside measured; None where there is nothing to say.

    Args:
        device: its name; predictions of time exist for GPUs whose data sheet is in `estimate.DEVICES`.
        timing: engine.Timing of rank 0.
        peak_memory_bytes: one figure a rank; resident memory on the CPU, allocated device memory on a GPU.
        collective_s: seconds that each rank's host spent in collectives while generating; empty where not measured.
        overlap: of `Overlap.report`: which schedules were forced or measured, and what they hide.
    """
    all_tokens = timing.prompt_tokens + timing.new_tokens
    context = (timing.prompt_tokens + timing.new_tokens / 2) / batch  # on average, while decoding
    known = find_device(device)
    total_s = timing.prefill_s + timing.decode_s
    decode_ms = timing.decode_s / timing.decode_steps * 1e3 if timing.decode_steps else None
    floor_ms = decode_floor_ms(plan, known, batch, context, experts_per_token) if known else None
    reads = max(decode_read_bytes(plan, r, batch, context, experts_per_token) for r in range(plan.tp_size))
    return {
        "tp_size": plan.tp_size,
        "model": name,
        "dtype": plan.dtype,
        "device": device,
        "load_s": load_s,
        "prefill_tokens_per_s": timing.prompt_tokens / timing.prefill_s if timing.prefill_s else None,
        "decode_ms_per_token": decode_ms,
        "tokens_per_s": timing.new_tokens / total_s if total_s else None,
        "read_gbps_per_rank": reads / (decode_ms * 1e6) if decode_ms else None,
        "collective_share": max(collective_s) / total_s if collective_s and total_s else None,
        "peak_memory_bytes": list(peak_memory_bytes),
        "overlap": dict(overlap),
        "predicted": {
            "load_s": None,
            "prefill_tokens_per_s": None,
            "decode_ms_per_token": floor_ms,
            "tokens_per_s": batch * 1e3 / floor_ms if floor_ms else None,
            "weight_bytes": [plan.weight_bytes(rank) for rank in range(plan.tp_size)],
            "kv_cache_bytes": [plan.kv_cache_bytes_per_token(rank) * all_tokens for rank in range(plan.tp_size)],
        },
    }


def report_line(report: dict) -> str:
    """The last line of a run."""

    def figure(key: str, form: str) -> str:
        return "" if report[key] is None else form.format(report[key])

    decode_ms, floor_ms = report["decode_ms_per_token"], report["predicted"]["decode_ms_per_token"]
    floor = f" (floor {floor_ms:.2f})" if decode_ms and floor_ms else ""
    peak = f" ({floor_ms / decode_ms:.0%} of the peak)" if decode_ms and floor_ms else ""
    weights, memory = max(report["predicted"]["weight_bytes"]), max(report["peak_memory_bytes"])
    parts = [
        f"tp {report['tp_size']}",
        report["device"],
        report["dtype"],
        f"load {report['load_s']:.2f} s",
        figure("prefill_tokens_per_s", "prefill {:.0f} tok/s"),
        figure("decode_ms_per_token", "{:.2f} ms/token" + floor),
        figure("tokens_per_s", "{:.1f} tok/s"),
        figure("read_gbps_per_rank", "{:.2f} GB/s read per rank" + peak),
        f"weights {weights / MIB:.1f} MiB, peak {memory / MIB:.0f} MiB per rank",
        figure("collective_share", "collectives {:.0%} of the time, all exposed") or "collectives not measured",
        _overlap(report["overlap"]),
    ]
    return " | ".join(filter(None, parts))


def _overlap(overlap: Mapping) -> str:
    """Which schedules run, how many sizes each, and the largest share of its communication that one hides; empty where
    nothing was measured or forced."""
    if overlap["mode"] != "auto":
        return f"overlap {overlap['mode']}"
    shares: dict[str, list[float]] = {}
    for row in overlap["chosen"]:
        shares.setdefault(row["schedule"], []).append(row["hidden_share"])
    told = [f"{name} x{len(of)}" + (f" hiding up to {max(of):.0%}" if any(of) else "") for name, of in shares.items()]
    return f"overlap: {', '.join(told)}" if told else ""

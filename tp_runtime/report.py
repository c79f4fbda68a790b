"""What is said before a run (the plan's table) and after it (predicted beside measured), for people and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from .estimate import decode_floor_ms, decode_read_bytes, find_device
from .plan import ParameterPlan, Plan

MIB = 2**20


def plan_table(plan: Plan) -> str:
    """The plan as a table: pattern, style, full shape, each rank's part; MiB a rank; heads; collectives a layer."""
    rows = [("parameter", "style", "full shape", "each rank's part")]
    for p in plan.parameters:
        rows.append((p.name, p.style, _shape(p.shape), _parts(p, plan.tp_size)))
    title = f"{plan.model_type}, {plan.tp_size} rank{'s' * (plan.tp_size > 1)}, {plan.dtype}, {plan.num_layers} layers"
    lines = [title, "", *_columns(rows), ""]

    ranks = [("rank", "query heads", "KV heads", "weights MiB", "KV cache KiB/token")]
    for rank, heads in enumerate(plan.heads):
        weights, cache = plan.weight_bytes(rank) / MIB, plan.kv_cache_bytes_per_token(rank) / 1024
        ranks.append((str(rank), _range(*heads.query), _range(*heads.kv), f"{weights:.2f}", f"{cache:.2f}"))
    lines += [*_columns(ranks), ""]

    collectives = [("collective", "after", "times", "bytes")]
    for c in plan.collectives:
        unit = "sequence" if c.op == "all_gather" else "token"
        collectives.append((c.op, c.name, str(len(c.layers) or 1), f"{c.bytes_per_token} a {unit}"))
    per_layer = sum(1 for c in plan.collectives if c.layers)
    return "\n".join(
        lines + (_columns(collectives) if plan.collectives else []) + [f"collectives per layer: {per_layer}"]
    )


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _range(start: int, stop: int) -> str:
    return f"{start}" if stop == start + 1 else f"{start}-{stop - 1}"


def _parts(p: ParameterPlan, tp_size: int) -> str:
    if p.dim is None:
        return "all"
    runs = [(shape, len(list(same))) for shape, same in groupby(p.local_shape(rank) for rank in range(tp_size))]
    return ", ".join(_shape(shape) + (f" ({count} ranks)" if count > 1 else "") for shape, count in runs)


def run_report(
    plan: Plan, *, name: str, device: str, load_s: float, timing, batch: int, peak_memory_bytes: Sequence[int],
    collective_s: Sequence[float], experts_per_token: int,
) -> dict:  # fmt: skip
    """The run in figures, predicted beside measured; None where there is nothing to say.

    Args:
        device: its name; predictions of time exist for GPUs whose data sheet is in `estimate.DEVICES`.
        timing: engine.Timing of rank 0.
        peak_memory_bytes: one figure a rank; resident memory on the CPU, allocated device memory on a GPU.
        collective_s: seconds that each rank's host spent in collectives while generating; empty where not measured.
    """
    context = (timing.prompt_tokens + timing.new_tokens) // batch
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
        "predicted": {
            "load_s": None,
            "prefill_tokens_per_s": None,
            "decode_ms_per_token": floor_ms,
            "tokens_per_s": batch * 1e3 / floor_ms if floor_ms else None,
            "weight_bytes": [plan.weight_bytes(rank) for rank in range(plan.tp_size)],
            "kv_cache_bytes": [plan.kv_cache_bytes_per_token(rank) * context * batch for rank in range(plan.tp_size)],
        },
    }


def report_line(report: dict) -> str:
    """The last line of a run."""

    def figure(key: str, form: str) -> str | None:
        value = report[key]
        return None if value is None else form.format(value)

    floor_ms = report["predicted"]["decode_ms_per_token"]
    share = report["collective_share"]
    weights = max(report["predicted"]["weight_bytes"])
    parts = [
        f"tp {report['tp_size']}",
        report["device"],
        report["dtype"],
        f"load {report['load_s']:.2f} s",
        figure("prefill_tokens_per_s", "prefill {:.0f} tok/s"),
        figure("decode_ms_per_token", "{:.2f} ms/token") + (f" (floor {floor_ms:.2f})" if floor_ms else "")
        if report["decode_ms_per_token"] is not None
        else None,
        figure("tokens_per_s", "{:.1f} tok/s"),
        figure("read_gbps_per_rank", "{:.2f} GB/s read per rank"),
        f"weights {weights / MIB:.1f} MiB, peak {max(report['peak_memory_bytes']) / MIB:.0f} MiB per rank",
        "collectives not measured" if share is None else f"collectives {share:.0%} of the time, all exposed",
    ]
    return " | ".join(part for part in parts if part)

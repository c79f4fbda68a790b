"""The tables of `bench.report`: GEMMs against torch and the limit, goals, losses, decode steps, checks.

Those of experts, attention, norms and all-reduces: `bench.report_op_tables`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.kernel_shapes import PUBLISHED_CUBLAS_US, PUBLISHED_DEVICE
from bench.record import table
from tp_runtime.estimate import Device, find_device

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Goal:
    """A geomean of torch's time over ours that the project set itself."""

    what: str
    op: str
    least_m: int
    most_m: int
    target: float | None
    published_shapes_only: bool = False

    def rows(self, rows: Iterable[dict]) -> list[dict]:
        return [
            r
            for r in rows
            if r["op"] == self.op and r["dtype"] == "bfloat16" and self.least_m <= r["m"] <= self.most_m
            and (not self.published_shapes_only or (r["n"], r["k"]) in PUBLISHED_CUBLAS_US)
        ]  # fmt: skip


GOALS = (
    Goal("skinny GEMM, M 1 to 32, twelve shapes", "gemm", 1, 32, 1.25, published_shapes_only=True),
    Goal("skinny gated GEMM, M 1 to 32", "gated_gemm", 1, 32, None),
    Goal("prefill GEMM, M 512 to 8192", "gemm", 512, 8192, 1.0),
    Goal("prefill gated GEMM, M 512 to 8192", "gated_gemm", 512, 8192, 1.08),
)


def speedup(row: dict) -> float:
    """torch's median time over ours."""
    return row["torch_us"]["median"] / row["ours_us"]["median"]


def geomean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def limit_us(row: dict, device: Device | None) -> float | None:
    """The time that neither the device's memory nor its tensor cores can beat, by its data sheet."""
    if device is None:
        return None
    return max(row["bytes"] / device.memory_gbps / 1e3, row["flops"] / device.bf16_tflops / 1e6)


def published_us(row: dict, gpu: str) -> float | None:
    """What others published for cuBLAS on this shape and device."""
    if row["op"] != "gemm" or gpu != PUBLISHED_DEVICE:
        return None
    return PUBLISHED_CUBLAS_US.get((row["n"], row["k"]), {}).get(row["m"])


def case(row: dict) -> str:
    return f"{row['model']} {row['role']} tp{row['tp_size']}"


def _figure(value: float | None, form: str = "{:.1f}") -> str:
    return "" if value is None else form.format(value)


def gemm_table(rows: Sequence[dict], gpu: str) -> str:
    """Every row: times, what they mean in TB/s and TFLOP/s, the share of the limit, which kernel was chosen."""
    device = find_device(gpu)
    head = ["op, dtype", "shape", "N x K", "M", "ours us (20th to 80th)", "torch us", "torch / ours"]
    head += ["TB/s", "torch's", "TFLOP/s", "torch's", "of the limit", "published cuBLAS us", "runs"]
    lines = [head]
    for r in sorted(rows, key=lambda r: (r["op"], r["dtype"], r["model"], r["tp_size"], r["role"], r["m"])):
        ours, torchs = r["ours_us"], r["torch_us"]["median"]
        limit = limit_us(r, device)
        lines.append([
            f"{r['op']}, {r['dtype']}", case(r), f"{r['n']}x{r['k']}", str(r["m"]),
            f"{ours['median']:.1f} ({ours['p20']:.1f} to {ours['p80']:.1f})", f"{torchs:.1f}", f"{speedup(r):.2f}x",
            *(f"{r['bytes'] / us / 1e6:.2f}" for us in (ours["median"], torchs)),
            *(f"{r['flops'] / us / 1e6:.0f}" for us in (ours["median"], torchs)),
            _figure(limit and limit / ours["median"], "{:.0%}"), _figure(published_us(r, gpu)), r["runs"],
        ])  # fmt: skip
    return table(lines)


def goals_table(rows: Sequence[dict]) -> str:
    """The geomeans beside their targets."""
    lines = [["torch's time over ours", "geomean", "target", "worst", "ours slower in"]]
    for goal in GOALS:
        ratios = sorted(map(speedup, goal.rows(rows)))
        target = _figure(goal.target, ">= {:g}x")
        if not ratios:
            lines.append([goal.what, NOT_MEASURED, target, "", ""])
            continue
        mean = geomean(ratios)
        verdict = " (missed)" if goal.target and mean < goal.target else ""
        slower = f"{sum(ratio < 1 for ratio in ratios)} of {len(ratios)}"
        lines.append([goal.what, f"{mean:.3f}x{verdict}", target, f"{ratios[0]:.2f}x", slower])
    return table(lines)


def slower_table(rows: Sequence[dict]) -> str:
    """The rows in which ours is slower than torch, worst first."""
    slower = sorted((r for r in rows if speedup(r) < 1), key=speedup)
    if not slower:
        return "In no row was ours slower than torch." if rows else ""
    lines = [["slower than torch in", "M", "ours us", "torch us", "torch / ours", "runs"]]
    for r in slower:
        times = f"{r['ours_us']['median']:.1f}", f"{r['torch_us']['median']:.1f}", f"{speedup(r):.2f}x"
        lines.append([f"{r['op']} {case(r)}, {r['n']}x{r['k']}, {r['dtype']}", str(r["m"]), *times, r["runs"]])
    return table(lines)


def steps_table(rows: Sequence[dict]) -> str:
    """Decode steps: ours, Hugging Face's in the same run, the floor, the target, what was published."""
    head = ["decode step", "batch", "ours ms (20th to 80th)", "Hugging Face ms", "floor ms", "target ms"]
    lines = [[*head, "published ms"]]
    for r in rows:
        ours, verdict = r["ours_ms"], ""
        if r["target_ms"] is not None:
            verdict = "" if ours["median"] <= r["target_ms"] else " (missed)"
        theirs = r["theirs_ms"] and r["theirs_ms"]["median"]
        lines.append([
            r["what"], str(r["batch"]), f"{ours['median']:.2f} ({ours['p20']:.2f} to {ours['p80']:.2f}){verdict}",
            _figure(theirs, "{:.2f}"), _figure(r["floor_ms"], "{:.2f}"),
            _figure(r["target_ms"], "<= {:.1f}"), r["published"],
        ])  # fmt: skip
    return table(lines)


def last_words(error: Sequence[str]) -> str:
    """Of the last lines of a section that failed the one that says why: it stands before the exit code."""
    return error[-2] if len(error) > 1 else error[-1]


def checks_table(results: dict[str, dict]) -> str:
    """What was checked: cases, wrong ones, the worst error against torch's own."""
    lines = [["check", "status", "cases", "wrong", "worst error / torch's (max, RMS)", "commit, date"]]
    wrong = []
    for name, result in results.items():
        rows, stamp = result["rows"], result["stamp"]
        bad = [row["what"] for row in rows if row.get("is_ok") is False]
        ratios = [[row[key] for row in rows if row.get(key) is not None] for key in ("max_ratio", "rms_ratio")]
        worst = ", ".join(f"{max(values):.2f}" for values in ratios if values)
        date = f"{stamp['commit']}, {stamp['date'][:10]}"
        lines.append([name, result["status"], str(len(rows)), str(len(bad)), worst, date])
        wrong += [f"* {name}: wrong: {what}" for what in bad]
        wrong += [f"* {name}: {last_words(result['error'])}"] if result["error"] else []
    return "\n".join([table(lines), *([""] if wrong else []), *wrong])

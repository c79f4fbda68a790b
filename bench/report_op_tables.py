"""The tables of `bench.report` for ops that have several contenders: experts, attention, norms; and of all-reduces.

A row holds `ours_us` and `NAME_us` of everybody who was measured beside it, in the same run and on the same operands.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bench.kernel_shapes import PUBLISHED_DEVICE
from bench.record import shown, table
from bench.report_tables import NOT_MEASURED, geomean
from tp_runtime.estimate import find_device


class ExpertsGoal(NamedTuple):
    """A time that the project set itself for the experts of one rank of Mixtral-8x7B, bf16, on an H200."""

    tp_size: int
    tokens: int
    target_us: float
    published_us: float


EXPERTS_MODEL = "mixtral-8x7b"
EXPERTS_GOALS = (ExpertsGoal(1, 1, 175, 189), ExpertsGoal(8, 1, 32, 40), ExpertsGoal(1, 4096, 3600, 3595))
NO_PEERS = "ours", "published"


def several_rows(results: dict[str, dict], name: str) -> list[dict]:
    """The rows with contenders of a section, `experts_speed`, or of the benchmark alone, `bench_experts`; newest last.

    Of the same case the newest.
    """
    named = {f"{name}_speed", f"bench_{name}"}
    found = sorted((r for n, r in results.items() if n in named), key=lambda result: result["stamp"]["date"])
    return list({row["what"]: row for result in found for row in result["rows"] if "ours_us" in row}.values())


def others(row: dict) -> dict[str, float]:
    """Contender -> median us, of all but ours, the fastest first."""
    names = (key.removesuffix("_us") for key in row if key.endswith("_us"))
    medians = {name: row[f"{name}_us"]["median"] for name in names if name not in NO_PEERS}
    return dict(sorted(medians.items(), key=lambda pair: pair[1]))


def lead(row: dict) -> float:
    """The fastest contender's time over ours: below 1 ours loses."""
    return min(others(row).values()) / row["ours_us"]["median"]


def several_table(rows: Sequence[dict], gpu: str) -> str:
    """Every row: ours, the best of the others, what it means in TB/s and TFLOP/s, share of the limit, all others."""
    device = find_device(gpu)
    is_published = gpu == PUBLISHED_DEVICE and any(row.get("published_us") for row in rows)
    lines = [["case", "ours us (20th to 80th)", "best other / ours", "TB/s", "TFLOP/s", "of the limit", "others us"]]
    lines[0] += ["published best peer us"] * is_published + ["runs"] * any("runs" in row for row in rows)
    for row in rows:
        us, flops = row["ours_us"]["median"], row.get("flops", 0)
        limit_us = device and max(row["bytes"] / device.memory_gbps / 1e3, flops / device.bf16_tflops / 1e6)
        cells = [row["what"], shown(row["ours_us"], "{:.1f}"), f"{lead(row):.2f}x", f"{row['bytes'] / us / 1e6:.2f}"]
        cells += [f"{flops / us / 1e6:.0f}" if flops else "", f"{limit_us / us:.0%}" if limit_us else ""]
        cells.append(", ".join(f"{name} {median:.1f}" for name, median in others(row).items()))
        cells += [str(row.get("published_us") or "")] * is_published
        lines.append(cells + [row.get("runs", "")] * (len(lines[0]) - len(cells)))
    return table(lines)


def losses_table(rows: Iterable[dict]) -> str:
    """The rows in which another one was faster than ours, worst first."""
    rows = list(rows)
    if not (losing := sorted((row for row in rows if lead(row) < 1), key=lead)):
        return "In no row was another one faster." if rows else ""
    lines = [["slower than another in", "ours us", "fastest", "us", "fastest / ours"]]
    for row in losing:
        name, us = next(iter(others(row).items()))
        lines.append([row["what"], f"{row['ours_us']['median']:.1f}", name, f"{us:.1f}", f"{lead(row):.2f}x"])
    return table(lines)


def summary_table(rows_of: dict[str, Sequence[dict]]) -> str:
    """A line for each title with rows: the best other's time over ours, and in how many rows ours loses."""
    lines = [["the best other's time over ours", "geomean", "worst", "ours slower in"]]
    for title, rows in rows_of.items():
        if leads := [lead(row) for row in rows]:
            slower = f"{sum(value < 1 for value in leads)} of {len(leads)}"
            lines.append([title, f"{geomean(leads):.3f}x", f"{min(leads):.2f}x", slower])
    return table(lines) if len(lines) > 1 else ""


def experts_goals_table(rows: Iterable[dict]) -> str:
    """Measured beside the target, the best of the same run and the best that others published."""
    of = {(row["tp_size"], row["tokens"]): row for row in rows if row["model"] == EXPERTS_MODEL}
    lines = [[f"experts, {EXPERTS_MODEL}", "ours us", "target us", "best other in the run", "best peer us, published"]]
    for goal in EXPERTS_GOALS:
        row = of.get((goal.tp_size, goal.tokens))
        what, target = f"tp{goal.tp_size}, tokens {goal.tokens}", f"<= {goal.target_us:g}"
        if row is None:
            lines.append([what, NOT_MEASURED, target, "", f"{goal.published_us:g}"])
            continue
        us, (name, best) = row["ours_us"]["median"], next(iter(others(row).items()))
        verdict = "" if us <= goal.target_us else " (missed)"
        lines.append([what, f"{us:.1f}{verdict}", target, f"{name} {best:.1f}", f"{goal.published_us:g}"])
    return table(lines)


def all_reduce_rows(results: dict[str, dict]) -> list[dict]:
    return [row for result in results.values() for row in result["rows"] if "alone_us" in row]


def all_reduce_table(rows: Sequence[dict]) -> str:
    """What one GPU can show; what was published was measured with NVLink and stands apart."""
    lines = [["all_reduce", "tp", "KiB", "launch alone us", "all ranks together us", "copy us"]]
    lines[0].append("published us, with NVLink")
    for row in rows:
        together = shown(row["together_us"]) if row["together_us"] else NOT_MEASURED
        published = ", ".join(f"{peer} {us:g}" for peer, us in row["published_us"].items())
        figures = shown(row["alone_us"]), together, f"{row['copy_us']['median']:.2f}", published
        lines.append([row["op"], str(row["tp_size"]), str(row["message_bytes"] >> 10), *figures])
    kinds = ", ".join(dict.fromkeys(row["emulated"] for row in rows))
    return f"{table(lines)}\n\nAll ranks on {kinds}."

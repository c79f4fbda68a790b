"""Plots of GEMM rows: bandwidth when decoding, arithmetic rate when prefilling, and every speed-up, losses included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.report_tables import case, geomean, published_us, speedup
from tp_runtime.estimate import find_device

OURS, TORCH, PUBLISHED, LIMIT = "#1f77b4", "#999999", "#d9b44a", "#c0392b"
MOST_DECODE_M = 64


def write(rows_of: Mapping[str, Sequence[dict]], folder: Path) -> list[Path]:
    """Draws what the rows of each GPU allow.

    Returns:
        The files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "bench", "svg.fonttype": "none", "font.size": 8})
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for gpu, rows in rows_of.items():
        slug = "-".join(gpu.lower().split())
        rows = [row for row in rows if row["dtype"] == "bfloat16"]
        decode = [row for row in rows if row["m"] == 1]
        prefill = [row for row in rows if row["m"] > MOST_DECODE_M]
        plots = (("bandwidth", _bandwidth, decode), ("rate", _rate, prefill), ("speedup", _speedup, rows))
        for name, draw, drawn in plots:
            if drawn:
                figure = draw(drawn, gpu)
                files.append(folder / f"{slug}_{name}.svg")
                figure.savefig(files[-1], metadata={"Date": None}, bbox_inches="tight")
    return files


def _axes(title: str, width: float = 9, height: float = 4.5):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.3)
    return figure, axes


def _label(row: dict) -> str:
    return f"{case(row)}\n{row['n']}x{row['k']}{' gated' if row['op'] == 'gated_gemm' else ''}"


def _bandwidth(rows: Sequence[dict], gpu: str):
    """TB/s of each shape at M = 1: ours, torch, published, the data sheet."""
    rows = sorted(rows, key=lambda row: row["bytes"])
    figure, axes = _axes(f"{gpu}, bfloat16, M = 1: achieved bandwidth", width=max(6, 0.5 * len(rows)))
    at = range(len(rows))
    ours, torchs = ([r["bytes"] / r[f"{side}_us"]["median"] / 1e6 for r in rows] for side in ("ours", "torch"))
    axes.bar([x - 0.27 for x in at], ours, 0.27, color=OURS, label="ours")
    axes.bar(at, torchs, 0.27, color=TORCH, label="torch, same run")
    known = [(x + 0.27, r["bytes"] / us / 1e6) for x, r in zip(at, rows, strict=True) if (us := published_us(r, gpu))]
    if known:
        axes.bar(*zip(*known, strict=True), 0.27, color=PUBLISHED, label="cuBLAS, published by others")
    if device := find_device(gpu):
        axes.axhline(device.memory_gbps / 1e3, color=LIMIT, label="data sheet")
    axes.set_xticks(list(at), [_label(row) for row in rows], rotation=90)
    axes.set_ylabel("TB/s")
    axes.legend(loc="lower right", framealpha=0.9)
    return figure


def _rate(rows: Sequence[dict], gpu: str):
    """TFLOP/s over M, geomean over shapes: ours, torch, the data sheet."""
    figure, axes = _axes(f"{gpu}, bfloat16: achieved arithmetic rate, geomean over shapes")
    for op, style in (("gemm", "-"), ("gated_gemm", "--")):
        drawn = sorted({row["m"] for row in rows if row["op"] == op})
        for side, color in (("ours", OURS), ("torch", TORCH)):
            rates = [
                geomean([r["flops"] / r[f"{side}_us"]["median"] / 1e6 for r in rows if (r["op"], r["m"]) == (op, m)])
                for m in drawn
            ]
            axes.plot(drawn, rates, style, color=color, marker="o", label=f"{op}, {side}")
    if device := find_device(gpu):
        axes.axhline(device.bf16_tflops, color=LIMIT, label="data sheet")
    axes.set_xscale("log", base=2)
    sizes = sorted({row["m"] for row in rows})
    axes.set_xticks(sizes, list(map(str, sizes)))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("M, tokens")
    axes.set_ylabel("TFLOP/s")
    axes.legend()
    return figure


def _speedup(rows: Sequence[dict], gpu: str):
    """Every row, sorted: torch's time over ours; below 1 torch is faster."""
    ratios = sorted(map(speedup, rows))
    figure, axes = _axes(f"{gpu}, bfloat16: torch's time over ours, each bar a row; red: torch is faster")
    axes.bar(range(len(ratios)), ratios, 1.0, color=[OURS if ratio >= 1 else LIMIT for ratio in ratios])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"{len(ratios)} rows, geomean {geomean(ratios):.2f}x")
    axes.set_ylabel("torch / ours")
    return figure

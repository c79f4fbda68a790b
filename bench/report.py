"""Records -> Markdown tables and plots: what was measured, beside the limit, torch and published figures.

    python -m bench.report [FILES ...] [--readme] [--plots DIR] [--ship]

Without FILES, all records of bench/results: of each section on each device the newest that holds rows of it, so that a
check which was run in several parts is one report. Every row that was measured is in a table; those in which ours is
slower are listed once more by themselves, and what no record holds reads "not measured".

    --readme       rewrites what stands between the two marker lines of README.md
    --plots DIR    writes the plots there, as SVG (needs matplotlib)
    --ship         writes the choices of the records' `tune` sections into the tables of this checkout

"torch" was measured in the same run, on the same weights. "Published" figures were measured by others, elsewhere.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.kernel_shapes import PUBLISHED_CUBLAS_US, PUBLISHED_SOURCE
from bench.record import RESULTS, say, table, verdicts
from bench.report_op_tables import (
    all_reduce_rows,
    all_reduce_table,
    experts_goals_table,
    losses_table,
    several_rows,
    several_table,
    summary_table,
)
from bench.report_overlap import overlap_rows, overlap_table, overlap_targets
from bench.report_tables import (
    NOT_MEASURED,
    checks_table,
    gemm_table,
    goals_table,
    slower_table,
    steps_table,
)

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN = "<!-- numbers: begin (python -m bench.report --readme) -->"
END = "<!-- numbers: end -->"
# Sections and benchmarks with several contenders, and the titles of their tables.
SEVERAL = {"experts": "Experts", "attention": "Decode attention", "norm": "RMSNorm with its residual"}

def load(files: Sequence[Path]) -> list[dict]:
    """Records, oldest first.

    Raises:
        ValueError: a file that is no record of bench/.
    """
    records = []
    for file in files:
        try:
            record = json.loads(file.read_text())
            is_record = isinstance(record, dict) and {"name", "date", "gpus"} <= set(record)
        except (OSError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from None
        if not is_record:
            raise ValueError(f"{file} is no record of bench/ (name, date, gpus); give files of bench/results")
        records.append({**record, "file": file.name})
    return sorted(records, key=lambda record: record["date"])


def sections(records: Iterable[dict]) -> dict[str, dict[str, dict]]:
    """GPU -> section -> its newest result with rows or an error, `stamp` (its record) in it.

    A record of bench_gemm alone counts as a section of that name.
    """
    found: dict[str, dict[str, dict]] = {}
    for record in records:
        if not record["gpus"]:
            continue
        results = record.get("sections")
        if results is None:
            results = [{"name": record["name"], "status": "passed", "error": [], "rows": record.get("rows", [])}]
        for result in results:
            if result["rows"] or result["error"]:
                found.setdefault(record["gpus"][0]["name"], {})[result["name"]] = {**result, "stamp": record}
    return found


def gemm_rows(results: dict[str, dict]) -> list[dict]:
    """Rows of bench_gemm in any section; of the same case the newest."""
    newest = {}
    for result in sorted(results.values(), key=lambda result: result["stamp"]["date"]):
        for row in result["rows"]:
            if "role" in row:
                newest[row["op"], row["model"], row["role"], row["tp_size"], row["dtype"], row["m"]] = row
    return list(newest.values())


def stamped(results: Iterable[dict]) -> str:
    """Hardware and versions of the newest of the results."""
    stamp = max((result["stamp"] for result in results), key=lambda stamp: stamp["date"])
    gpu, versions = stamp["gpus"][0], stamp["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "transformers", "python"))
    return f"{gpu['name']}, driver {gpu['driver']}, {packages}, {stamp['date'][:10]}, commit {stamp['commit']}"


def step_rows(results: dict[str, dict]) -> list[dict]:
    return [row for result in results.values() for row in result["rows"] if "ours_ms" in row]


def report(records: Sequence[dict]) -> str:
    """All of it."""
    parts = []
    for gpu, results in sections(records).items():
        parts += [f"## {gpu}", stamped(results.values()), checks_table(results)]
        if rows := gemm_rows(results):
            parts += ["### GEMMs", goals_table(rows), gemm_table(rows, gpu)]
            parts += ["### Slower than torch", slower_table(rows)]
        for name, title in SEVERAL.items():
            if rows := several_rows(results, name):
                goals = [experts_goals_table(rows)] if name == "experts" else []
                parts += [f"### {title}", *goals, several_table(rows, gpu), losses_table(rows)]
        if rows := all_reduce_rows(results):
            parts += ["### All-reduce", all_reduce_table(rows)]
        if rows := overlap_rows(results):
            parts += ["### Hidden communication", verdicts(overlap_targets(rows)), overlap_table(rows)]
        if rows := step_rows(results):
            parts += ["### Decode steps", steps_table(rows)]
    for record in records:
        if not record["gpus"] and record.get("targets"):
            lines = [["figure", "measured", "target", "verdict"]]
            for t in record["targets"]:
                lines.append([t["name"], f"{t['value']:.3g}", f"{t['target']:.3g}", "met" if t["is_met"] else "missed"])
            machine = f"{record['cpu']['name']}, {record['cpu']['cores']} cores"
            parts += [f"## {record['name']}, {machine}, {record['date'][:10]}", table(lines)]
    return "\n\n".join(parts) or NOT_MEASURED


def readme_block(records: Sequence[dict]) -> str:
    """What README says: for each GPU, goals, the twelve shapes, decode steps, GEMMs that lose; of others how many."""
    parts = []
    for gpu, results in sections(records).items():
        rows = gemm_rows(results)
        parts += [f"Measured on {stamped(results.values())}; `python -m bench.gpu_check`:", goals_table(rows)]
        if twelve := [r for r in rows if is_published(r)]:
            parts += [gemm_table(twelve, gpu), f"Published: {PUBLISHED_SOURCE}; not measured by this project."]
        if experts := several_rows(results, "experts"):
            parts += [experts_goals_table(experts)]
        if steps := step_rows(results):
            parts += [steps_table(steps)]
        several = {title: several_rows(results, name) for name, title in SEVERAL.items()}
        parts += [summary_table(several), slower_table(rows), checks_table(results)]
    return "\n\n".join(filter(None, parts)) or f"{goals_table([])}\n\nNo GPU figure has been measured yet."


def is_published(row: dict) -> bool:
    """Whether a row is one that others published a figure of."""
    of_shape = PUBLISHED_CUBLAS_US.get((row["n"], row["k"]), {})
    return row["op"] == "gemm" and row["dtype"] == "bfloat16" and row["m"] in of_shape


def ship(records: Sequence[dict]) -> list[Path]:
    """Writes the choices that the records hold into the tables of this checkout.

    Returns:
        The tables.
    """
    from tp_runtime.kernels import tuned

    rows_of: dict[str, list[dict]] = {}
    for record in records:
        for section in record.get("sections", []):
            for row in section["rows"]:
                if "tuned" in row:
                    rows_of.setdefault(row["device"], []).append(row["tuned"])
    for device, rows in rows_of.items():
        tuned.save_rows(tuned.shipped_file(device), device, rows)
    return [tuned.shipped_file(device) for device in rows_of]


def rewrite(readme: Path, block: str) -> None:
    """Puts `block` between the two marker lines.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ValueError(f"{readme} needs these two lines, once each and in this order: {BEGIN} and {END}")
    before, rest = text.split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{block}\n{END}{rest.split(END)[1]}")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m bench.report", description=__doc__.split("\n\n")[0])
    p.add_argument("files", nargs="*", type=Path, metavar="FILE", help="records; default: all of bench/results")
    readme = "rewrite the numbers between the markers of README.md, or of this file"
    p.add_argument("--readme", nargs="?", const=README, type=Path, metavar="FILE", help=readme)
    p.add_argument("--plots", type=Path, metavar="DIR", help="write the plots there")
    p.add_argument("--ship", action="store_true", help="write the tuned choices into the tables of this checkout")
    return p


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parser().parse_args(argv)
    try:
        records = load(args.files or sorted(RESULTS.glob("*.json")))
        files = []
        if args.readme:
            rewrite(args.readme, readme_block(records))
            files.append(args.readme)
        if args.ship:
            files += ship(records)
        if args.plots:
            from bench import plots

            rows_of = {gpu: gemm_rows(results) for gpu, results in sections(records).items()}
            files += plots.write(rows_of, args.plots)
    except (ValueError, ImportError) as error:
        say(f"report: {error}")
        return 2
    if not args.readme:
        print(report(records))
    for file in files:
        say(f"written: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

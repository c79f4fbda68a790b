"""What every benchmark says in the same way: how repeats spread, a table on stdout, a stamped JSON record."""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from tp_runtime import env

RESULTS = Path(__file__).resolve().parent / "results"


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median with 20th and 80th percentile."""
    fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else list(values) * 4
    return {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[3]}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Spread of ours / theirs, repeat by repeat: what slowed the machine for a while slowed both."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def shown(figure: dict[str, float], form: str = "{:.2f}") -> str:
    """`median (p20 to p80)`."""
    return f"{form} ({form} to {form})".format(figure["median"], figure["p20"], figure["p80"])


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned; the first row is its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    head, *lines = (f"| {' | '.join(row)} |" for row in cells)
    return "\n".join([head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines])


def target(name: str, value: float, least: float | None = None, most: float | None = None) -> dict:
    """A figure beside the target that it is measured against."""
    is_met = (least is None or value >= least) and (most is None or value <= most)
    return {"name": name, "value": value, "target": least if most is None else most, "is_met": is_met}


def verdicts(targets: Sequence[dict]) -> str:
    """One line a target; those that are missed say so."""
    lines = []
    for t in targets:
        lines.append(f"{'met' if t['is_met'] else 'MISSED':6}  {t['name']}: {t['value']:.3g}, target {t['target']:.3g}")
    return "\n".join(lines)


def add_flags(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """The flags of vLLM's latency benchmark that have a default here, and --output-json."""
    helps = {
        "input_len": "tokens of the prompt",
        "output_len": "new tokens",
        "batch_size": "sequences at a time",
        "num_iters": "repeats of each measurement, interleaved",
    }
    for name, default in defaults.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, f"--{name}", type=int, default=default, help=f"{helps[name]}; default: {default}")
    text = "the record; default: bench/results/NAME_DATE.json"
    parser.add_argument("--output-json", "--output_json", type=Path, metavar="F", help=text)


def stamp(name: str, args: argparse.Namespace) -> dict:
    """What every record begins with: its name and flags, versions, machine, commit and date."""
    now = datetime.datetime.now(datetime.timezone.utc)
    flags = {key: value for key, value in vars(args).items() if isinstance(value, (int, float, str, list))}
    return {"name": name, "date": now.isoformat(timespec="seconds"), "flags": flags, **env.describe()}


def dump(file: Path, content: dict) -> None:
    """Writes a record; who reads the file meanwhile sees it as it was before or as it is after."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f".{file.name}.new")
    new.write_text(json.dumps(content, indent=1) + "\n")
    new.replace(file)


def write(name: str, args: argparse.Namespace, **content) -> Path:
    """Writes the record, stamped; returns its file."""
    stamped = stamp(name, args)
    file = args.output_json or RESULTS / f"{name}_{stamped['date'][:10]}.json"
    dump(file, {**stamped, **content})
    say(f"written: {file}")
    return file

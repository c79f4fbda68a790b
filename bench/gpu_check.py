"""Everything that needs a GPU, in one command: right, free of races, how fast.

    python -m bench.gpu_check [--only NAME ...] [--budget-s S] [--ship] [--dry-run] [--output-json F]

The sections (`bench/gpu_section.py`) run one after the other, the most valuable first, each in a process of its own:
one that fails, hangs or loses the device does not take the others along. With a budget, a section is left out if its
estimate is more than what is left, and one that runs into the end of the budget is stopped between two rows.

The record, bench/results/gpu_check_DEVICE_DATE.json, is written anew with each row: a run that is killed keeps what it
had. `python -m bench.report` makes tables and plots of it. Nothing needs to be installed: a checkout, torch, triton and
transformers do.

Exit code: 0; 1 if a section failed; 2 without a GPU or for a usage error.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from bench import record
from bench.gpu_section import BY_NAME, SECTIONS, Section
from bench.record import say, table
from bench.report_tables import last_words

ROOT = Path(__file__).resolve().parents[1]
LAST_LINES = 30  # of what a failing section wrote, in the record
EVENT = re.compile(r'\{"(row|end)": \{.*\}$')  # at the end of a line: a progress bar may stand before it

# (section, seconds left or None) -> events: {"row": ...} each, then {"end": ...} or {"error": last lines}.
Runner = Callable[[Section, "float | None"], Iterator[dict]]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m bench.gpu_check", description=__doc__.split("\n\n")[0])
    p.add_argument("--only", nargs="+", choices=BY_NAME, metavar="NAME", help=f"of {', '.join(BY_NAME)}")
    p.add_argument("--budget-s", "--budget_s", type=float, metavar="S", help="seconds to end in; default: no limit")
    p.add_argument("--ship", action="store_true", help="tuned choices also go into the tables of this checkout")
    p.add_argument("--dry-run", "--dry_run", action="store_true", help="list what would run; needs no GPU")
    p.add_argument("--output-json", "--output_json", type=Path, metavar="F", help="the record")
    return p


def dry_run(sections: Iterable[Section], budget_s: float | None) -> str:
    """What `check` would do if every estimate were right."""
    rows = [["", "section", "s", "from", "shows"]]
    total = 0.0
    for section in sections:
        is_skipped = budget_s is not None and section.estimate_s > budget_s - total
        start = "skipped" if is_skipped else f"{total:.0f}"
        rows.append([str(len(rows)), section.name, f"{section.estimate_s:.0f}", start, section.shows])
        total += 0 if is_skipped else section.estimate_s
    limit = "" if budget_s is None else f" of a budget of {budget_s:.0f} s"
    return f"{table(rows)}\ntotal: {total:.0f} s ({total / 60:.0f} min){limit}, as estimated for one H200"


def in_process(ship: bool) -> Runner:
    """Runs each section in a process of its own."""

    def run(section: Section, left_s: float | None) -> Iterator[dict]:
        limit = [] if left_s is None else ["--seconds", f"{left_s:.0f}"]
        command = [sys.executable, "-m", "bench.gpu_section", section.name, *limit, *(["--ship"] if ship else [])]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        text: deque[str] = deque(maxlen=LAST_LINES)
        try:
            for line in process.stdout:
                if event := EVENT.search(line):
                    yield json.loads(event[0])
                elif line.strip():
                    text.append(line.rstrip())
                    say(f"    {text[-1]}")
            if (code := process.wait()) != 0:
                yield {"error": [*text, f"exit code {code}"]}
        finally:
            process.kill()
            process.wait()

    return run


def check(
    sections: Sequence[Section],
    budget_s: float | None,
    run: Runner,
    save: Callable[[list[dict]], None],
    clock: Callable[[], float] = time.monotonic,
) -> list[dict]:
    """Runs the sections in order.

    Args:
        save: called with all results so far, after every row and every section.

    Returns:
        For each section its line of the table and: status (passed, failed, cut short, skipped; in the record of a run
        that was stopped also interrupted, running), seconds, rows, error (the last lines that it wrote), clocks of
        the GPU at its end.
    """
    started = clock()
    results: list[dict] = []
    for index, section in enumerate(sections):
        left_s = None if budget_s is None else budget_s - (clock() - started)
        result = {"name": section.name, "shows": section.shows, "estimate_s": section.estimate_s}
        result |= {"status": "running", "seconds": 0.0, "rows": [], "error": []}
        results.append(result)
        head = f"[{index + 1}/{len(sections)}] {section.name}"
        if left_s is not None and section.estimate_s > left_s:
            result["status"] = "skipped"
            say(f"{head}: skipped, {section.estimate_s:.0f} s estimated, {max(0, left_s):.0f} s left")
            save(results)
            continue
        say(f"{head}: {section.shows}; {section.estimate_s:.0f} s estimated{_of(left_s)}")
        save(results)
        begun = clock()
        try:
            with closing(run(section, left_s)) as events:
                for event in events:
                    result["seconds"] = round(clock() - begun, 1)
                    _take(result, event, is_over=left_s is not None and clock() - begun >= left_s)
                    save(results)
                    if row := event.get("row"):
                        verdict = "WRONG  " if row.get("is_ok") is False else ""
                        rest = None if left_s is None else left_s - (clock() - begun)
                        say(f"{head} {len(result['rows'])}: {verdict}{row['what']}{_of(rest)}")
        finally:
            if result["status"] == "running":
                result["status"] = "interrupted"
            save(results)
        say(f"{head}: {result['status']} after {result['seconds']:.0f} s")
    return results


def _take(result: dict, event: dict, is_over: bool) -> None:
    """Adds an event to a section's result."""
    are_right = all(row.get("is_ok") is not False for row in result["rows"])
    if "row" in event:
        result["rows"].append(event["row"])
    elif "end" in event:
        result["clocks"] = event["end"]["clocks"]
        result["status"] = "failed" if not are_right else "passed" if event["end"]["is_complete"] else "cut short"
    else:
        result["error"] = event["error"]
        result["status"] = "cut short" if is_over and are_right else "failed"


def _of(left_s: float | None) -> str:
    return "" if left_s is None else f" ({max(0, left_s):.0f} s left)"


def summary(results: Sequence[dict]) -> str:
    """One line a section, and what was wrong."""
    rows = [["section", "status", "s", "rows", "wrong"]]
    wrong = []
    for r in results:
        failing = [row["what"] for row in r["rows"] if row.get("is_ok") is False]
        rows.append([r["name"], r["status"], f"{r['seconds']:.0f}", str(len(r["rows"])), str(len(failing))])
        wrong += [f"{r['name']}: WRONG  {what}" for what in failing]
        wrong += [f"{r['name']}: {last_words(r['error'])}"] if r["error"] else []
    return "\n".join([table(rows), *wrong])


def record_file(device: str, date: str) -> Path:
    """A file of bench/results that is not there yet."""
    name = f"gpu_check_{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}_{date}"
    number, file = 1, record.RESULTS / f"{name}.json"
    while file.exists():
        number += 1
        file = record.RESULTS / f"{name}_{number}.json"
    return file


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parser().parse_args(argv)
    sections = [s for s in SECTIONS if not args.only or s.name in args.only]
    if args.dry_run:
        print(dry_run(sections, args.budget_s))
        return 0
    import torch

    if not torch.cuda.is_available():
        say("gpu_check: no CUDA GPU that torch can use; --dry-run lists what would run")
        return 2
    stamp = record.stamp("gpu_check", args)
    file = args.output_json or record_file(torch.cuda.get_device_name(), stamp["date"][:10])
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the section is ended too

    def save(results: list[dict]) -> None:
        record.dump(file, {**stamp, "sections": results})

    results = check(sections, args.budget_s, in_process(args.ship), save)
    print(summary(results), flush=True)
    say(f"written: {file}; tables: python -m bench.report {os.path.relpath(file)}")
    return 1 if any(r["status"] == "failed" for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())

"""How much of a prefill's communication each schedule hides, tensor-parallel on gloo.

    python -m bench.bench_overlap [--tp 2] [--tokens 512 2048] [--size 200m] [--num-iters 5] [--dir DIR]

All schedules of tp_runtime/overlap.py in turn, on the same ranks and prompt, and once more without all-reduces:

    exposed = seconds - seconds without communication          hidden = 1 - exposed / exposed of the sequential schedule

Correct before timed: the hidden states of all schedules agree.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import random_llama, torchrun
from bench.record import add_flags, ratio, say, shown, spread, table, write

MODES = {"off": "sequential", "columns": "columns", "lanes": "lanes", "auto": "auto"}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m bench.bench_overlap", description=__doc__.split("\n\n")[0])
    p.add_argument("--size", choices=random_llama.SIZES, default="200m", help="of the random Llama; default: 200m")
    p.add_argument("--tp", type=int, default=2, help="ranks; default: 2")
    p.add_argument("--tokens", type=int, nargs="+", default=[512, 2048], help="of the prompt; default: 512 2048")
    p.add_argument("--dir", type=Path, help="keeps the checkpoint here for the next run; default: nowhere")
    add_flags(p, num_iters=5)
    return p


def rows_of(length: int, ranks: list[dict]) -> list[dict]:
    """One row a schedule; a repeat takes as long as its slowest rank."""
    seconds = {
        name: [max(repeat) for repeat in zip(*(rank["seconds"][name] for rank in ranks), strict=True)]
        for name in ranks[0]["seconds"]
    }
    silent = seconds.pop("no communication")
    exposed = {mode: [max(a - b, 0) for a, b in zip(s, silent, strict=True)] for mode, s in seconds.items()}
    sequential = spread(exposed["off"])["median"]
    return [
        {
            "tokens": length,
            "schedule": MODES[mode] + (f" ({ranks[0]['chosen']})" if mode == "auto" else ""),
            "seconds": {**spread(s), "all": s},
            "compute_s": spread(silent)["median"],
            "speedup": ratio(seconds["off"], s),
            "hidden": 1 - spread(exposed[mode])["median"] / sequential if sequential else None,
        }
        for mode, s in seconds.items()
    ]


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parser().parse_args(argv)
    with random_llama.folder(args.dir) as folder:
        request = {
            "checkpoint": str(random_llama.checkpoint(folder, args.size, "float32")),
            "modes": list(MODES),
            "tokens": args.tokens,
            "num_iters": args.num_iters,
        }
        say(f"{args.tp} ranks, {len(args.tokens)} lengths, {args.num_iters} repeats")
        ranks = torchrun.run("bench.overlap_rank", request, args.tp)
    rows = [row for length in args.tokens for row in rows_of(length, [rank[str(length)] for rank in ranks])]
    cells = [
        [
            str(row["tokens"]), row["schedule"], shown(row["seconds"], "{:.3f}"), f"{row['compute_s']:.3f}",
            shown(row["speedup"]), "" if row["hidden"] is None else f"{row['hidden']:.0%}",
        ]
        for row in rows
    ]  # fmt: skip
    print(table([["tokens", "schedule", "s", "s without communication", "over sequential", "hidden"], *cells]))
    write("bench_overlap", args, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

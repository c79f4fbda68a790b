"""How much of the communication each schedule hides, for known models' layers; and a trace in which it can be seen.

    python -m bench.bench_overlap [--model NAME ...] [--role ROLE ...] [--tp N ...] [--m M ...] [--scale S]
        [--link auto|gloo|nccl|emulated] [--num-iters N] [--trace FILE] [--output-json F]

Sequential and every schedule of `--overlap`, compute alone, communication alone, and the ideal: the longer of the two.
A row is a row-parallel GEMM (o, down), a layer's experts (experts_down), or decoder layers with a prompt of M tokens
(layers), which is what lanes can cut. Results are checked against the sequential ones before anything is timed.

What carries the all-reduces, unless --link says so: NCCL where there are as many GPUs as ranks; with fewer GPUs, one of
them and an emulation of NCCL (bench/emulated_nccl.py), which every such row says; without a GPU, gloo between CPU
ranks, where the models are --scale times as narrow. Under torchrun, its ranks; it takes --m for a flag of its own, so
say --tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.kernel_shapes import MODELS, scaled
from bench.record import say, verdicts, write
from bench.report_overlap import overlap_table, overlap_targets
from tp_runtime import env
from tp_runtime.launch import RankEnv, joined, launch
from tp_runtime.plan import make_plan

LINKS = ("gloo", "nccl", "emulated")
ROLES = ("o", "down", "experts_down", "layers")
ON_GPU = {
    "model": ["llama-3-8b", "llama-3-70b", "mixtral-8x7b"], "tp": [2, 4, 8], "m": [1 << i for i in range(14)],
    "scale": 1, "dtype": "bfloat16", "num_iters": 10,
}  # fmt: skip
ON_CPU = {
    "model": ["llama-3-8b", "mixtral-8x7b"], "tp": [2], "m": [512, 2048], "scale": 4, "dtype": "float32",
    "num_iters": 5,
}  # fmt: skip
COSTS = """
time: on two CPU cores, as it runs without flags, about 5 minutes. On GPUs, all of it, 378 rows: some 25 minutes,
a guess; `--tp 8 --role layers` alone, 42 rows: some 4.
"""
_TIMEOUT_S = 1800.0  # without a collective: the longest row, or the start of torch


def parser() -> argparse.ArgumentParser:
    text = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(
        "python -m bench.bench_overlap", description=__doc__, epilog=COSTS, formatter_class=text
    )
    p.add_argument(
        "--model", nargs="+", choices=MODELS, metavar="NAME", help=f"of {', '.join(MODELS)}{_default('model')}"
    )
    p.add_argument("--role", nargs="+", choices=ROLES, default=list(ROLES), help="default: all that the model has")
    p.add_argument("--tp", nargs="+", type=int, metavar="N", help=f"ranks{_default('tp')}")
    p.add_argument("--m", "--tokens", nargs="+", type=int, metavar="M", help=f"tokens{_default('m')}")
    p.add_argument("--scale", type=int, metavar="S", help=f"the models' widths are divided by it{_default('scale')}")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help=_default("dtype").strip("; "))
    p.add_argument("--layers", type=int, default=2, help="decoder layers of the role of that name; default: 2")
    p.add_argument("--link", choices=("auto", *LINKS), default="auto", help="what carries the all-reduces")
    p.add_argument("--num-iters", "--num_iters", type=int, help=f"repeats, interleaved{_default('num_iters')}")
    p.add_argument(
        "--trace", type=Path, metavar="FILE", help="a trace of layers: the first model and tp, the largest M"
    )
    p.add_argument("--output-json", "--output_json", type=Path, metavar="F", help="the record")
    return p


def _default(name: str) -> str:
    def shown(value) -> str:
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)

    return f"; default: {shown(ON_GPU[name])}, without a GPU {shown(ON_CPU[name])}"


def link_of(wanted: str, tp_size: int, num_gpus: int) -> str:
    """What carries the all-reduces of so many ranks."""
    if wanted != "auto":
        return wanted
    return "gloo" if not num_gpus else "nccl" if num_gpus >= tp_size else "emulated"


class Progress:
    """On a terminal one line that changes, else a line for each row."""

    def __init__(self, total: int):
        self.done, self._total, self._began = 0, total, time.monotonic()

    def __call__(self, text: str) -> None:
        self.done += 1
        line = f"[{self.done}/{self._total}, {time.monotonic() - self._began:.0f} s] {text}"
        if sys.stderr.isatty():
            width = os.get_terminal_size(sys.stderr.fileno()).columns
            print(f"\r\x1b[K{line[: width - 1]}", end="", file=sys.stderr, flush=True)
        else:
            say(line)


def num_rows(args: argparse.Namespace) -> int:
    """Of one number of ranks."""
    sparse = [any("experts" in key for key in MODELS[model]) for model in args.model]
    return len(args.m) * sum(
        role != ("down" if is_sparse else "experts_down") for role in args.role for is_sparse in sparse
    )


def of_rank(args: argparse.Namespace, tp_size: int, link: str, has_trace: bool, progress: Progress, reply: Path):
    """What a rank does: measures; rank 0 writes what was found into `reply`."""

    def main(env: RankEnv) -> None:
        import torch

        from bench import overlap_rank
        from bench.emulated_nccl import EMULATED, EmulatedCommunicator
        from tp_runtime.local import run_ranks

        layers = args.dtype, args.scale, args.layers

        def measure(comm) -> None:
            is_first, found, shares = comm.rank == 0, [], {}
            for row in overlap_rank.rows(
                args.model, args.role, args.m, comm, EMULATED if link == "emulated" else link, args.num_iters, *layers
            ):
                found.append(row)
                if is_first:
                    progress(("" if row["is_ok"] else "WRONG ") + row["what"])
            if has_trace:
                shares = overlap_rank.trace(args.model[0], max(args.m), comm, args.trace if is_first else None, *layers)
            if is_first:
                reply.write_text(json.dumps({"rows": found, "trace": shares}))

        if link == "gloo":
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // tp_size))
        if link == "emulated":
            measure(EmulatedCommunicator(tp_size, "cuda"))
        else:
            run_ranks(env, link, "cuda" if link == "nccl" else "cpu", tp_size, measure)

    return main


def preload() -> None:
    """Once for all ranks: seconds."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler says on stderr that it starts and stops
    import bench.emulated_nccl
    import bench.overlap_rank  # noqa: F401


def check(args: argparse.Namespace, links: dict[int, str], num_gpus: int) -> None:
    """
    Raises:
        ValueError: what cannot be measured here, and what can.
    """
    if num_gpus < max((tp if link == "nccl" else 1 for tp, link in links.items() if link != "gloo"), default=0):
        raise ValueError(
            f"--link {args.link} with --tp {max(links)} needs more than the {num_gpus} GPUs that are here; "
            "--link emulated needs one, --link gloo none"
        )
    for model in args.model:
        for tp_size in args.tp:
            make_plan(scaled(model, args.scale, args.layers), tp_size, dtype=args.dtype)
    if "emulated" in links.values():
        from bench.emulated_nccl import published_us

        for tp_size in args.tp:
            published_us(tp_size, 0)


def run(args: argparse.Namespace, links: dict[int, str], here: RankEnv | None) -> tuple[int, dict]:
    """Exit code, rows and the trace's shares of all numbers of ranks.

    Args:
        here: the rank that this process is, where torchrun started it.
    """
    found: dict = {"rows": [], "trace": {}}
    progress = Progress(num_rows(args) * len(links))
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        reply = Path(folder) / "reply.json"
        for index, (tp_size, link) in enumerate(links.items()):
            main = of_rank(args, tp_size, link, bool(args.trace) and index == 0, progress, reply)
            if here:
                main(here)
                code = 0
            else:
                code = launch(main, 1 if link == "emulated" else tp_size, timeout_s=_TIMEOUT_S, preload=preload)
            if code:
                return code, found
            if reply.exists():  # of torchrun's ranks the first alone has one
                answer = json.loads(reply.read_text())
                found["rows"] += answer["rows"]
                found["trace"] |= answer["trace"]
            progress.done = len(found["rows"])
    if sys.stderr.isatty():
        say("")
    return 0, found


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parser().parse_args(argv)
    here, num_gpus = joined(_TIMEOUT_S), len(env.gpus())
    for name, value in (ON_GPU if num_gpus and args.link != "gloo" else ON_CPU).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if here:
        args.tp = [here.world_size]
    links = {tp_size: link_of(args.link, tp_size, num_gpus) for tp_size in args.tp}
    try:
        check(args, links, num_gpus)
    except ValueError as error:
        say(f"bench_overlap: {error}")
        return 2
    code, found = run(args, links, here)
    if code or (here and here.rank):
        return code
    rows, shares = found["rows"], found["trace"]
    print(overlap_table(rows))
    targets = overlap_targets(rows) if "gloo" not in links.values() else []  # they are set for GPUs
    if targets:
        print(verdicts(targets))
    for schedule, share in shares.items():
        print(f"trace, {schedule}: {share:.0%} of the communication's time there is compute as well")
    if args.trace:
        say(f"written: {args.trace}; open it in ui.perfetto.dev")
    write("bench_overlap", args, rows=rows, targets=targets, trace=shares)
    for row in rows:
        for text in row["wrong"]:
            say(f"WRONG {row['what']}: {text}")
    return 0 if all(row["is_ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

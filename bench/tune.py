"""Measures which kernel is fastest for the shapes that a model's layers call on this GPU, and writes it down.

    python -m bench.tune --model PATH|ID|NAME ... [--tp N ...] [--m 1,2,4] [--op gemm,gated_gemm,attention,experts]
    python -m bench.tune --shape 7168x8192 ... [--op gemm,gated_gemm,attention_32_8,experts_8_2]

How a row comes about: `bench/choice.py`. Where it is written, and what reads it: `kernels/tuned.py`; with --ship it
goes to the table in this checkout. Each row is written as soon as it is measured, and one that this Triton has measured
before is kept unless --again: a run that was stopped goes on where it was. The most valuable rows come first; what does
not fit in --budget-s is left for the next run.

Exit code: 0; 2 without a GPU or for a usage error; 1 if the device fails; 130 if interrupted.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from bench import timing
from bench.choice import Task, Timer, measure
from bench.compiled import recording
from bench.kernel_ops import OPS, TUNABLE, Op, op_named
from bench.kernel_shapes import MODELS, KernelShape, attention_shapes, model_shapes, top_k_shapes
from bench.record import say, table
from tp_runtime.estimate import Device, find_device
from tp_runtime.kernels import tuned

# Tokens of a call, the most valuable first: one sequence, some, many, then prompts.
M_ORDER = (1, 16, 4, 64, 32, 8, 2, 2048, 4096, 1024, 512, 8192, 128, 256)
# What has one token of each sequence: lm_head, and decode attention, whose caches fill the memory.
MOST_TOKENS = {"lm_head": 256, "top_k": 256, "attention": 64}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ESTIMATED_FOR, ESTIMATED_ARCH = "NVIDIA H200", 90  # without a GPU that we have figures of

_log = logging.getLogger("bench.tune")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m bench.tune", description=__doc__.split("\n\n")[0])
    what = f"folder, Hub id, or one of {', '.join(MODELS)}"
    p.add_argument("--model", nargs="+", default=[], metavar="M", help=f"tune the shapes of these models: {what}")
    p.add_argument("--tp", nargs="+", type=int, default=[1], metavar="N", help="for these numbers of ranks; default: 1")
    p.add_argument("--shape", nargs="+", type=_shape, default=[], metavar="NxK", help="tune these shapes")
    text = f"tokens of a call; default: powers of two to {max(M_ORDER)}"
    p.add_argument("--m", type=_ms, default=[], metavar="M,M", help=text)
    of_kind = "experts_E_K: K experts of E a token; attention_Q_KV: heads"
    text = f"of {', '.join(TUNABLE)}; default: all that there are shapes for; {of_kind}"
    p.add_argument("--op", type=_ops, metavar="OP,OP", help=text)
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    p.add_argument("--budget-s", "--budget_s", type=float, metavar="S", help="seconds to end in; default: no limit")
    p.add_argument("--again", action="store_true", help="measure what has been measured before, too")
    p.add_argument("--ship", action="store_true", help="write the table of this checkout instead of the user's")
    p.add_argument("--dry-run", "--dry_run", action="store_true", help="list what would be measured; needs no GPU")
    return p


def _shape(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"[1-9]\d{0,8}x[1-9]\d{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no NxK such as 7168x8192")
    n, k = text.split("x")
    return int(n), int(k)


def _ms(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d{0,8}(,[1-9]\d{0,8})*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of tokens such as 1,16,2048")
    return [int(m) for m in text.split(",")]


def _ops(text: str) -> list[Op]:
    try:
        return [op_named(name) for name in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def tasks(
    shapes: Iterable[KernelShape],
    ops: Iterable[Op] = tuple(TUNABLE.values()),
    ms: Iterable[int] = (),
    dtype: str = "bfloat16",
    any_role: bool = False,
) -> list[Task]:
    """What to measure for these shapes, the most valuable first: by M as in M_ORDER, then by the weights of all layers.

    Args:
        ms: tokens of a call, each standing for its bucket; none: all of M_ORDER, for lm_head those of a decode step.
        any_role: every op of a dense layer on every shape of one; False: the op that the layers call for its role.
    """
    found: dict[tuned.Key, Task] = {}
    for shape in shapes:
        for op in (op.on(shape) for op in ops if shape.role in op.roles or (any_role and op.name in OPS)):
            for m in sorted(set(map(tuned.bucket, ms or M_ORDER))):
                if ms or m <= MOST_TOKENS.get(shape.role, m):
                    task = Task(op, shape, m, DTYPES[dtype])
                    found.setdefault(task.key, task)
    return sorted(found.values(), key=lambda t: (M_ORDER.index(t.m), -t.shape.num_weights))


def asked_shapes(args: argparse.Namespace) -> list[KernelShape]:
    """The shapes of --model and --tp, and those of --shape in the roles of each op."""
    makers = model_shapes, attention_shapes, top_k_shapes
    shapes = [s for make in makers for model in args.model for tp in args.tp for s in make(model, tp, args.dtype)]
    for n, k in args.shape:
        for op in args.op or OPS.values():
            if op == TUNABLE["experts"]:
                raise ValueError("--op experts says not how many beside --shape; --op experts_8_2 does: 2 of 8 a token")
            if op == TUNABLE["attention"]:
                raise ValueError("--op attention says not how many heads beside --shape; --op attention_32_8 does")
            names = "num_experts", "top_k", "num_heads", "num_kv_heads"
            counts = {name: getattr(op, name, 0) for name in names}
            shapes.append(KernelShape(f"{n}x{k}", op.roles[0], 1, op.stacked * n, k, **counts))
    if not shapes:
        raise ValueError("nothing to tune: give --model or --shape")
    return shapes


def estimates_s(todo: Iterable[Task], device: Device) -> Iterator[float]:
    """For each task, a guess of its time. What is compiled depends on M, and on N and K only in how K is split."""
    known: set[tuple] = set()
    for task in todo:
        compiled = {(task.op.name, label, task.m) for label in task.candidates()}
        yield task.estimate_s(device, len(compiled - known))
        known |= compiled


def measured(
    todo: Sequence[Task], file: Path, device_name: str, device: str = "cuda", timer: Timer = timing.time_us
) -> Iterator[tuple[Task, tuned.Row]]:
    """Each task with its row, which is in `file` by then; one for which the memory is too small is left out."""
    for task in todo:
        try:
            row = measure(task, device, timer)
        except torch.OutOfMemoryError as error:
            _log.warning("%s is left out: %s", task.name, str(error).split(". ")[0])
            continue
        finally:
            if device == "cuda":
                torch.cuda.empty_cache()  # also what CUDA graphs kept for themselves
        if row["us"] or row["torch_us"]:
            tuned.save_rows(file, device_name, [row])
            yield task, row


def within(todo: Sequence[Task], budget_s: float | None, device: Device, clock: Callable[[], float]) -> Iterator[Task]:
    """The tasks one by one, until the estimate of the next is more than what is left of the budget."""
    started = clock()
    for task, estimate_s in zip(todo, estimates_s(todo, device)):
        if budget_s is not None and clock() - started + estimate_s > budget_s:
            return
        yield task


def result(task: Task, row: tuned.Row, device: Device | None) -> list[str]:
    """A line of the closing table; the rates are those of what runs."""
    m, n, k = task.size
    ours, torchs = row["us"], row["torch_us"]
    us = torchs if row["kernel"] == tuned.TORCH else ours
    num_bytes, flops = task.op.bytes(m, n, k, task.dtype.itemsize), task.op.flops(m, n, k)
    return [
        task.op.name, task.shape.name, f"{n}x{k}", str(m),
        f"{ours:.1f}" if ours else "none is right", f"{torchs:.1f}" if torchs else "waits for the device",
        f"{torchs / ours:.2f}x" if ours and torchs else "", row["kernel"],
        f"{num_bytes / us / 1e6:.2f}", f"{flops / us / 1e6:.0f}", f"{task.limit_us(device) / us:.0%}" if device else "",
    ]  # fmt: skip


HEAD = ["op", "shape", "N x K", "M", "ours us", "torch us", "torch / ours", "runs", "TB/s", "TFLOP/s", "of the limit"]


def dry_run(todo: Sequence[Task], num_kept: int, device: Device) -> str:
    """What would be measured, and how long that might take."""
    rows, total_s = [["op", "shape", "N x K", "M", "candidates", "limit us", "from s"]], 0.0
    for task, estimate_s in zip(todo, estimates_s(todo, device)):
        m, n, k = task.size
        limit_us = task.limit_us(device)
        figures = f"{limit_us:.1f}" if limit_us >= 1 else f"{limit_us:.2g}", f"{total_s:.0f}"
        rows.append([task.op.name, task.shape.name, f"{n}x{k}", str(m), str(len(task.candidates())), *figures])
        total_s += estimate_s
    total = f"{len(todo)} rows, {total_s:.0f} s ({total_s / 60:.0f} min) as estimated for {device.name}"
    return f"{table(rows)}\n{total}" + (f"; {num_kept} have been measured before" if num_kept else "")


def main(
    argv: Sequence[str] | None = None, timer: Timer = timing.time_us, device: str = "", clock: Callable = time.monotonic
) -> int:
    """The command; returns its exit code. `device`: cuda where there is one; tests say cpu."""
    args = parser().parse_args(argv)
    logging.basicConfig(format="%(message)s")
    try:
        return _run(args, timer, device or ("cuda" if torch.cuda.is_available() else ""), clock)
    except ValueError as error:
        say(f"bench.tune: {error}")
        return 2
    except KeyboardInterrupt:
        say("bench.tune: interrupted; every row that was measured is kept")
        return 130


def _run(args: argparse.Namespace, timer: Timer, device: str, clock: Callable[[], float]) -> int:
    all_tasks = tasks(asked_shapes(args), args.op or TUNABLE.values(), args.m, args.dtype)
    if not device and not args.dry_run:
        raise ValueError("there is no GPU here to measure on; --dry-run lists what would be measured")
    name = tuned.device_name(0 if device == "cuda" else -1)
    known = find_device(name)
    estimated = known or find_device(ESTIMATED_FOR)
    file = tuned.shipped_file(name) if args.ship else tuned.user_file(name)
    if file is None:
        raise ValueError("there is no home folder to write to; set XDG_CACHE_HOME or give --ship")
    kept = {} if args.again else _rows_of_this_triton(file, name)
    todo = [task for task in all_tasks if task.key not in kept]
    if args.dry_run:
        with recording(ESTIMATED_ARCH) if not device else nullcontext():  # candidates depend on the architecture
            print(dry_run(todo, len(all_tasks) - len(todo), estimated))
        return 0

    rows = {task.key: kept[task.key] for task in all_tasks if task.key in kept}
    tqdm.monitor_interval = 0  # no thread beside ours
    with logging_redirect_tqdm(), tqdm(total=len(todo), desc="tune", disable=not sys.stderr.isatty()) as bar:
        for task, row in measured(within(todo, args.budget_s, estimated, clock), file, name, device, timer):
            rows[task.key] = row
            bar.update()
            bar.write(f"{task.name}: {row['us']} us, torch {row['torch_us']} us: {row['kernel']}", file=sys.stderr)
    tuned.forget()
    print(table([HEAD, *(result(task, rows[task.key], known) for task in all_tasks if task.key in rows)]))
    say(f"{len(rows)} of {len(all_tasks)} rows are in {file}")
    return 0


def _rows_of_this_triton(file: Path, name: str) -> dict[tuned.Key, tuned.Row]:
    try:
        rows = tuned.read_rows(file, name)
    except ValueError as error:
        raise ValueError(f"{file}: {error}; move it away") from None
    return tuned.usable(row for row in rows if row["triton"] == tuned.triton_minor())


if __name__ == "__main__":
    sys.exit(main())

"""Loading at tp N on gloo, ours against transformers' own tensor parallelism, in one run.

    python -m bench.bench_load [--size 200m] [--dtype float32 bfloat16] [--tp 2] [--num-iters 5] [--dir FOLDER]

What is measured, each rank for itself, and how. The figure of a row is that of the rank that needs most.

    load         until `load` / `from_pretrained` has returned on all ranks; imports and the process group are there
                 already
    ready        load, and a forward pass over the prompt: transformers maps the files and leaves most weights there, so
                 that they are read when they are first used
    read         bytes that system calls returned, plus resident pages of mapped checkpoint files (the kernel maps
                 neighbours along, at most 15 a fault). Ours are the former, theirs the latter.
    kept         bytes of the parameters afterwards; the shard is what the plan says that a rank must hold
    resident     its peak, the interpreter and torch included (VmHWM, reset just before). Mapped pages count: the kernel
                 can take them back, and reads them again when they are used.
    anonymous    growth of resident memory that maps no file
    first token  from starting the command to the first byte on its stdout, and to the end of its process. Ours:
                 python -m tp_runtime.generate; theirs: torchrun with the script in bench/transformers_tp.py.

All files are in the page cache; the sides take turns. Nothing is reported unless it was right: in the first repeat
every weight is put together from the ranks again and compared with the files bit for bit, and in float32 all texts are
the same.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import random_llama, torchrun
from bench.record import add_flags, ratio, say, shown, spread, table, target, verdicts, write
from tp_runtime import make_plan

SIDES = ("transformers", "ours")
TIMED = ("load_s", "ready_s", "first_token_s", "exit_s")
MIB = 2**20


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m bench.bench_load", description=__doc__.split("\n\n")[0])
    random_llama.add_flags(p)
    p.add_argument("--only", choices=SIDES, help="leave the other side out")
    add_flags(p, input_len=32, num_iters=5)
    return p


def shell_command(side: str, checkpoint: Path, tp_size: int, ids: list[int]) -> list[str]:
    """The command that a user types for one new token."""
    flags = ["--model", str(checkpoint), "--prompt", random_llama.prompt_text(ids), "--max-new-tokens", "1"]
    if side == "transformers":
        return torchrun.command("bench.transformers_tp", tp_size) + flags
    return [sys.executable, "-m", "tp_runtime.generate", "--tp", str(tp_size), *flags]


def from_shell(command: list[str]) -> tuple[dict[str, float], str]:
    """Seconds to the first byte on stdout and to the end of the process; and the text."""
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=torchrun.ROOT, env=torchrun.environment(), stdout=subprocess.PIPE, stderr=log
        )
        text = process.stdout.read(1)
        first_token_s = time.perf_counter() - started
        text += process.stdout.read()
        code = process.wait()
        exit_s = time.perf_counter() - started
        log.seek(0)
        if code != 0 or not text:
            raise RuntimeError(f"{' '.join(command)} ended with exit code {code}:\n{log.read().decode()}")
    return {"first_token_s": first_token_s, "exit_s": exit_s}, text.decode().strip()


def measure(args: argparse.Namespace, folder: Path, dtype: str, sides: list[str]) -> dict[str, dict[str, list]]:
    """Side -> figure -> one value a repeat, of the rank that needs most."""
    checkpoint, warm_up = (random_llama.checkpoint(folder, size, dtype) for size in (args.size, "tiny"))
    ids = random_llama.prompt_ids(args.size, 1, args.input_len)
    commands = {side: shell_command(side, checkpoint, args.tp, ids[0]) for side in sides}

    def load(side: str, is_check: bool) -> list[dict]:
        request = {"side": side, "checkpoint": str(checkpoint), "warm_up": str(warm_up), "prompt_ids": ids}
        return torchrun.run("bench.load_rank", {**request, "is_check": is_check}, args.tp)

    repeats: dict[str, list[dict]] = {side: [] for side in sides}
    texts = set()
    for i in range(args.num_iters):
        say(f"{dtype}: repeat {i + 1} of {args.num_iters}")
        for side in sides:
            ranks = load(side, is_check=i == 0)
            most = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
            seconds, text = from_shell(commands[side])
            repeats[side].append(most | seconds)
            texts.add(text)
    assert dtype != "float32" or len(texts) == 1, f"the first tokens differ: {texts}"
    return {side: {key: [repeat[key] for repeat in repeats[side]] for key in repeats[side][0]} for side in sides}


def row(side: str, dtype: str, figures: dict[str, list], shard_bytes: int) -> dict:
    """One row of the record: medians of what is counted, spreads of what is timed."""
    medians = {key: spread(values)["median"] for key, values in figures.items() if key not in TIMED}
    read_bytes = medians["read_call_bytes"] + medians["mapped_bytes"]
    timed = {key: {**spread(figures[key]), "all": figures[key]} for key in TIMED}
    return {"side": side, "dtype": dtype, "shard_bytes": shard_bytes, "read_bytes": read_bytes, **medians, **timed}


def table_row(r: dict) -> list[str]:
    timed = [shown(r[key]) for key in TIMED]
    names = ("read_bytes", "weight_bytes", "resident_peak_bytes", "anonymous_growth_bytes")
    return [r["dtype"], r["side"], *timed, *(f"{r[name] / MIB:.0f}" for name in names), f"{r['shard_bytes'] / MIB:.0f}"]


HEAD = [
    "dtype", "side", "load s", "ready s", "first token s", "process s",
    "read MiB", "kept MiB", "resident MiB", "anonymous MiB", "shard MiB",
]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parser().parse_args(argv)
    sides = [args.only] if args.only else list(SIDES)
    rows, ratios, targets = [], [], []
    with random_llama.folder(args.dir) as folder:
        for dtype in args.dtype:
            figures = measure(args, folder, dtype, sides)
            shard_bytes = make_plan(folder / random_llama.name(args.size, dtype), args.tp).weight_bytes(0)
            rows += [row(side, dtype, figures[side], shard_bytes) for side in sides]
            if "ours" in sides:
                ours = rows[-1]
                spare = (ours["resident_peak_bytes"] - shard_bytes) / MIB
                targets.append(target(f"{dtype}: bytes read / shard", ours["read_bytes"] / shard_bytes, most=1.05))
                targets.append(target(f"{dtype}: resident - shard, MiB", spare, most=512))
            if len(sides) == 2:
                faster = {key: ratio(figures["transformers"][key], figures["ours"][key]) for key in TIMED}
                ratios.append({"dtype": dtype, **faster})
                speedup = faster["first_token_s"]["median"]
                targets.append(target(f"{dtype}: from the shell to the first token, theirs / ours", speedup, least=1.5))
    print(table([HEAD, *map(table_row, rows)]))
    for r in ratios:
        print(f"{r['dtype']}: theirs / ours: " + ", ".join(f"{key[:-2]} {shown(r[key])}" for key in TIMED))
    print(verdicts(targets))
    write("bench_load", args, rows=rows, theirs_over_ours=ratios, targets=targets)
    return 0


if __name__ == "__main__":
    sys.exit(main())

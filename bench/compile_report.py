"""Tables of what the compiler makes of every kernel configuration, for GPUs that need not be there.

    python -m bench.compile_report [--arch 80 90 100] [--op gemm ...] [--json]

One table for each kernel and architecture, a line for each configuration and form (bias, residual, activation):

    registers, spill       of a thread; bytes of its registers that lie in memory instead
    shared, blocks         KiB of a block; blocks that live on one multiprocessor at a time
    mma                    tensor-core instructions: mma.sync, wgmma or tcgen05.mma
    cp.async, TMA, ld      loads into shared memory by 16 bytes a thread, or narrower, or by descriptor; into registers
    setmaxnreg, PDL        warp specialisation; programmatic dependent launch (griddepcontrol)

Instructions are counted where they stand in the PTX: those of the pipeline's prologue as well, not how often they run.
Those that no line has are left out. Claims (`compile_claims`) that do not hold stand below the table.

Exit code: 0; 1 if a configuration does not compile or is not what it claims; 2 for a usage error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence

from tqdm import tqdm

from bench.compile_cases import OPS, cases
from bench.compile_claims import INSTRUCTIONS, Case, compile_all, counts
from bench.compiled import CHIPS, Compiled, CompileError
from bench.record import stamp, table

FIGURES = ("num_warps", "registers", "spill_bytes", "shared_bytes", "tensor_memory_columns", "occupancy")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m bench.compile_report", description=__doc__.split("\n\n")[0])
    p.add_argument("--arch", nargs="+", type=int, choices=CHIPS, default=list(CHIPS), help="90 for sm_90; default: all")
    p.add_argument("--op", nargs="+", choices=OPS, default=list(OPS), help="default: all")
    p.add_argument("--json", action="store_true", help="one JSON object on stdout instead of tables")
    return p


def row(case: Case, kernel: Compiled | CompileError) -> dict:
    """What is known of a case; `broken` says what is not as it should be. One that does not compile has no figures."""
    row = {
        "op": case.op, "kernel": case.kernel, "config": case.config._asdict() if case.config else {}, "arch": case.arch,
        "shape": case.shape, "dtype": str(case.dtype).removeprefix("torch."),
    }  # fmt: skip
    if isinstance(kernel, Compiled):
        row |= {**{name: getattr(kernel, name) for name in FIGURES}, "instructions": counts(kernel)}
    return {**row, "broken": case.broken_claims(kernel)}


def cells(row: dict) -> dict[str, str]:
    """Column -> what stands there; empty for a figure of 0 and for False."""
    config = {field: "" if value is False else str(value) for field, value in row["config"].items()}
    figures = {}
    if "registers" in row:
        figures = {
            "warps": row["num_warps"], "registers": row["registers"], "spill": row["spill_bytes"],
            "shared": f"{row['shared_bytes'] / 1024:.1f}", "blocks": row["occupancy"], **row["instructions"],
        }  # fmt: skip
    figures = {column: str(value or "") for column, value in figures.items()}
    return {**config, "shape": row["shape"], "dtype": row["dtype"], **figures}


def tables(rows: Iterable[dict]) -> Iterator[str]:
    """A table for each kernel and architecture, and what is wrong below it."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["kernel"], row["arch"]), []).append(row)
    for (op, kernel, arch), group in groups.items():
        lines = [(cells(row), row["broken"]) for row in group]
        head = dict.fromkeys(column for line, _ in lines for column in line)
        head = [c for c in head if c not in INSTRUCTIONS or any(line.get(c) for line, _ in lines)]
        yield f"\n{op} {kernel}, sm_{arch}\n"
        yield table([head, *([line.get(column, "-") for column in head] for line, _ in lines)])
        yield from (f"  line {i}: {what}" for i, (_, broken) in enumerate(lines, 1) for what in broken)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    todo = [case for op in args.op for arch in args.arch for case in cases(arch, [op])]
    with tqdm(compile_all(todo), desc="compile", total=len(todo), disable=not sys.stderr.isatty(), leave=False) as bar:
        rows = [row(case, kernel) for case, kernel in zip(todo, bar)]
    if args.json:
        print(json.dumps({**stamp("compile_report", args), "rows": rows}, indent=1))
    else:
        print(*tables(rows), sep="\n")
    wrong = sum(bool(row["broken"]) for row in rows)
    print(f"{len(rows)} configurations compiled, {wrong or 'none'} not as claimed", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""GEMMs of one rank of real models, ours against torch: on CUDA the kernels against cuBLAS, on the CPU the references.

    python -m bench.bench_gemm [--model NAME ...] [--role ROLE ...] [--tp N ...] [--m M ...] [--op OP ...]
        [--dtype DTYPE ...] [--num-iters 30] [--device auto|cpu|cuda] [--output-json F]
    pytest bench/bench_gemm.py --benchmark-only [--benchmark-json F]

Shapes are named by model, role and tp_size (`bench.kernel_shapes`). A gate_up is measured twice: as a GEMM, and as the
gated GEMM that the runtime runs, whose other side is torch's GEMM, activation and product. "Ours" is what the layers
call: the choice of this device's table, which may be torch. Without --model the twelve shapes of the skinny target;
with it, all dense shapes of those models. Every result is checked against float64 before it is timed (`bench.timing`).
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.choice import label
from bench.kernel_ops import OPS, Op
from bench.kernel_shapes import MODELS, ROLES, SKINNY, KernelShape, model_shapes, shape
from bench.on_gpu.errors import against
from bench.record import say, shown, spread, table, write
from bench.timing import REPEATS, Call, time_us
from tp_runtime.kernels import tuned
from tp_runtime.kernels.gated_gemm import gated_gemm
from tp_runtime.kernels.gemm import gemm

OURS = {"gemm": gemm, "gated_gemm": gated_gemm}  # what the layers call
SIDES = ("torch", "ours")
DENSE_ROLES = [role for role in ROLES if not role.startswith("experts")]
DTYPES = ("bfloat16", "float16", "float32")
M_DECODE = (1, 4, 16, 32, 64)
TP_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Case:
    """One op on one shape, which of a gated GEMM is that of gate and up stacked."""

    op: Op
    shape: KernelShape
    m: int
    dtype: str

    @property
    def size(self) -> tuple[int, int, int]:
        """M, N, K, as the op looks them up: N features of y."""
        return self.m, *self.op.size(self.shape)

    @property
    def what(self) -> str:
        return f"{self.op.name} {self.shape.name}, {self.shape.n}x{self.shape.k}, M={self.m}, {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def facts(self) -> dict:
        """What a record says of the case; n and k are those of the weights."""
        s = self.shape
        return {
            "op": self.op.name, "model": s.model, "role": s.role, "tp_size": s.tp_size, "rank": s.rank,
            "dtype": self.dtype, "m": self.m, "n": s.n, "k": s.k,
            "bytes": self.op.bytes(*self.size, self.torch_dtype.itemsize), "flops": self.op.flops(*self.size),
        }  # fmt: skip

    def operands(self, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """x [M, K] and copies of the weights to take in turn."""
        return self.op.operands(*self.size, self.torch_dtype, device)

    def sides(self, x: torch.Tensor, ws: torch.Tensor) -> dict[str, Call]:
        """torch and ours, on the i-th copy of the weights; on the first, ours has been found right."""
        ours = OURS[self.op.name]
        calls = {"torch": lambda i: self.op.torchs(x, ws[i]), "ours": lambda i: ours(x, ws[i])}
        with torch.inference_mode():
            error = against(self.op.exact(x, ws[0]), calls["ours"](0), calls["torch"](0))
        assert error["is_ok"], f"{self.what}: {error}"
        return calls

    def runs(self, x: torch.Tensor) -> str:
        """What "ours" comes down to on x's device."""
        if not x.is_cuda:
            return "reference"
        m, n, k = self.size
        row = tuned.lookup(self.op.name, x, n, k, m, self.op.kernels.CANDIDATES)
        if row is None:
            return "torch, not tuned"
        return row["kernel"] if row["kernel"] == tuned.TORCH else label(row["kernel"], row["config"])


def cases(
    shapes: Iterable[KernelShape], ms: Iterable[int], dtypes: Iterable[str], ops: Iterable[str] = tuple(OURS)
) -> list[Case]:
    """Every shape as a GEMM, a gate_up also as a gated one."""
    found = itertools.product(shapes, dtypes, ms, ops)
    return [Case(OPS[op], s, m, dtype) for s, dtype, m, op in found if op == "gemm" or s.role in OPS[op].roles]


def measure(case: Case, device: str, repeats: int = REPEATS) -> dict:
    """One row of a record."""
    x, ws = case.operands(device)
    times = time_us(case.sides(x, ws), len(ws), repeats, device)
    figures = {f"{side}_us": spread(times[side]) for side in SIDES}
    return {"what": case.what, **case.facts(), **figures, "copies": len(ws), "runs": case.runs(x)}


def rows(cases: Iterable[Case], device: str, repeats: int = REPEATS) -> Iterator[dict]:
    for case in cases:
        yield measure(case, device, repeats)
        if device == "cuda":
            torch.cuda.empty_cache()  # also what CUDA graphs kept for themselves


# `pytest bench --benchmark-only`: enough to see a regression in a minute; the command measures all.
ON_CUDA = torch.cuda.is_available()
PYTEST_CASES = (
    cases(map(shape, SKINNY), (1, 16, 2048), ("bfloat16",))
    if ON_CUDA
    else cases([s for s in model_shapes("llama-3.2-1b", 4) if s.role in ("qkv", "gate_up")], (1, 16), DTYPES[::2])
)


class Replayed:
    """`count` calls in one CUDA graph: of `count` calls of this, the first replays them all and waits."""

    def __init__(self, call: Call, num_copies: int, count: int):
        self.count, self._called = count, 0
        for i in range(num_copies):
            call(i)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for i in range(count):
                call(i % num_copies)

    def __call__(self) -> None:
        if self._called % self.count == 0:
            self._graph.replay()
            torch.cuda.synchronize()
        self._called += 1


def pytest_generate_tests(metafunc) -> None:
    metafunc.parametrize("case", PYTEST_CASES, ids=lambda case: re.sub("[, ]+", "-", case.what.replace("=", "")))
    metafunc.parametrize("side", SIDES)


def test_gemm(benchmark, case: Case, side: str):
    benchmark.group = case.what
    benchmark.extra_info.update(case.facts(), side=side)
    x, ws = case.operands("cuda" if ON_CUDA else "cpu")
    call = case.sides(x, ws)[side]
    benchmark.extra_info["runs"] = case.runs(x) if side == "ours" else "torch"
    with torch.inference_mode(), one_thread():
        if ON_CUDA:
            calls = Replayed(call, len(ws), count=20 * len(ws))
            benchmark.pedantic(calls, rounds=20, iterations=calls.count, warmup_rounds=2)
        else:
            turn = itertools.cycle(range(len(ws)))
            benchmark(lambda: call(next(turn)))


@contextmanager
def one_thread() -> Iterator[None]:
    """As a rank on a machine with as many ranks as cores."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m bench.bench_gemm", description=__doc__.split("\n\n")[0])
    which = f"folders, Hub ids or of {', '.join(MODELS)}; default: the shapes of the skinny target"
    p.add_argument("--model", nargs="+", metavar="NAME", help=which)
    p.add_argument("--role", nargs="+", choices=DENSE_ROLES, help="default: all of them")
    p.add_argument("--tp", nargs="+", type=int, help="tensor-parallel sizes; default: 1 2 4 8")
    p.add_argument("--m", nargs="+", type=int, default=list(M_DECODE), help="tokens; default: 1 4 16 32 64")
    p.add_argument("--op", nargs="+", choices=OURS, default=list(OURS), help="default: both")
    p.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=DTYPES)
    p.add_argument("--num-iters", "--num_iters", type=int, default=REPEATS, help=f"repeats; default: {REPEATS}")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--output-json", "--output_json", type=Path, metavar="F", help="the record")
    return p


def chosen_shapes(args: argparse.Namespace) -> list[KernelShape]:
    """The dense shapes that the flags ask for.

    Raises:
        ValueError: a model or tp_size that cannot be; nothing left.
    """
    if args.model:
        found = [s for model in args.model for tp_size in args.tp or TP_SIZES for s in model_shapes(model, tp_size)]
    else:
        found = [s for s in map(shape, SKINNY) if not args.tp or s.tp_size in args.tp]
    roles = args.role or DENSE_ROLES
    if not (left := [s for s in found if s.role in roles]):
        raise ValueError(f"no shape has a role of {', '.join(roles)} at this --tp; give other ones, or a --model")
    return left


def cells(row: dict) -> list[str]:
    ours, torchs = row["ours_us"]["median"], row["torch_us"]["median"]
    return [
        row["what"], shown(row["ours_us"], "{:.1f}"), shown(row["torch_us"], "{:.1f}"), f"{torchs / ours:.2f}x",
        f"{row['bytes'] / ours / 1e6:.3f}", f"{row['flops'] / ours / 1e6:.2f}", row["runs"],
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parser().parse_args(argv)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no CUDA GPU that torch can use; --device cpu measures the references")
        asked = cases(chosen_shapes(args), args.m, args.dtype, args.op)
    except ValueError as error:
        say(f"bench_gemm: {error}")
        return 2
    measured: list[dict] = []
    for row in rows(asked, device, args.num_iters):
        measured.append(row)
        say(f"{len(measured)} of {len(asked)}: {row['what']}")
    head = ["case", "ours us", "torch us", "torch / ours", "TB/s", "TFLOP/s", "runs"]
    print(table([head, *map(cells, measured)]))
    write("bench_gemm", args, device=device, rows=measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Ours against what else there is, by the rows of bench/bench_*.py, for the shapes and sizes of the targets."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from bench import bench_attention, bench_experts, bench_layer, bench_norm
from bench.bench_gemm import M_DECODE, cases, rows
from bench.choice import label
from bench.gpu_section import Options, Row
from bench.kernel_shapes import SKINNY, model_shapes, shape
from bench.timing import REPEATS
from tp_runtime.kernels import grouped_gemm, tuned

DTYPES = ("bfloat16",)
M_PREFILL = (512, 1024, 2048, 4096, 8192)
PREFILL_MODELS = (("llama-3-8b", 1), ("llama-3-70b", 8), ("llama-3-8b", 8))
LAYER = ("qkv", "o", "gate_up", "down")
# model, tp_size: those with a target or a published figure first.
EXPERTS = tuple(itertools.product(("mixtral-8x7b", "qwen3-30b-a3b"), (1, 8, 2, 4)))
ATTENTION_MODELS = ("llama-3-8b tp1", "llama-3-70b tp8")
NORM_M, NORM_N = (1, 16, 64, 4096), (4096, 8192)


def skinny_cases():
    return cases(map(shape, SKINNY), M_DECODE, DTYPES)


def prefill_cases():
    shapes = [s for model, tp_size in PREFILL_MODELS for s in model_shapes(model, tp_size) if s.role in LAYER]
    return [c for c in cases(shapes, M_PREFILL, DTYPES) if c.shape.role in c.op.roles]  # as the layers call them


def experts_cases() -> list[bench_experts.Case]:
    of_layers = (bench_experts.cases([m], [tp], list(bench_experts.TOKENS), list(DTYPES)) for m, tp in EXPERTS)
    return [case for cases in of_layers for case in cases if case.shape.rank == 0]


def attention_cases() -> list[bench_attention.Case]:
    sizes = bench_attention.ON_GPU
    return [
        bench_attention.Case(model, batch, context, dtype)
        for model, batch, context, dtype in itertools.product(
            ATTENTION_MODELS, sizes["batch"], sizes["context"], DTYPES
        )
    ]


def skinny(options: Options) -> Iterator[Row]:
    return rows(skinny_cases(), "cuda")


def prefill(options: Options) -> Iterator[Row]:
    return rows(prefill_cases(), "cuda")


def experts(options: Options, device: str = "cuda", cases: Iterable | None = None, repeats: int = REPEATS):
    def measure(case: bench_experts.Case) -> Iterator[Row]:
        for row in bench_experts.rows([case], device, repeats):
            yield {**row, "runs": runs(case, device)}

    return one_by_one(experts_cases() if cases is None else cases, measure)


def runs(case: bench_experts.Case, device: str) -> str:
    """What "ours" comes down to: the kernel that the device's table names, or torch's."""
    if device != "cuda":
        return "reference"
    tokens, width, hidden = case.size
    like = torch.empty(0, dtype=getattr(torch, case.dtype), device=device)
    row = tuned.lookup(case.op.name, like, width, hidden, tokens, grouped_gemm.CANDIDATES)
    if row is None:
        return "torch (not tuned)"
    return tuned.TORCH if row["kernel"] == tuned.TORCH else label(row["kernel"], row["config"])


def attention(options: Options, device: str = "cuda", cases: Iterable | None = None, repeats: int = REPEATS):
    cases = attention_cases() if cases is None else cases
    return one_by_one(cases, lambda case: bench_attention.rows([case], device, repeats))


def layer(options: Options, device: str = "cuda", cases: Iterable | None = None, repeats: int = REPEATS):
    cases = bench_layer.cases(**bench_layer.ON_GPU) if cases is None else cases
    return one_by_one(cases, lambda case: bench_layer.rows([case], device, repeats))


def norm(options: Options, device: str = "cuda", sizes: Iterable | None = None, repeats: int = REPEATS):
    sizes = itertools.product(NORM_M, NORM_N, DTYPES) if sizes is None else sizes
    return one_by_one(sizes, lambda size: bench_norm.rows([size], device, repeats))


def one_by_one(cases: Iterable[Any], measure: Callable[[Any], Iterator[Row]]) -> Iterator[Row]:
    """The rows of each case; one that fails is wrong, and the others are measured.

    What torch.compile knows is dropped in between: after eight shapes it would compile no more, and its side be slow.
    """
    for case in cases:
        try:
            yield from measure(case)
        except Exception as error:
            what = getattr(case, "what", str(case))
            text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            yield {"what": f"{what}: not measured", "wrong": [text], "is_ok": False}
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # raises where the device is lost
        torch.compiler.reset()

"""GEMMs of one rank against cuBLAS: the rows of `bench.bench_gemm` for the shapes and sizes of the targets."""

from __future__ import annotations

from collections.abc import Iterator

from bench.bench_gemm import M_DECODE, cases, rows
from bench.gpu_section import Options, Row
from bench.kernel_shapes import SKINNY, model_shapes, shape

DTYPES = ("bfloat16",)
M_PREFILL = (512, 1024, 2048, 4096, 8192)
PREFILL_MODELS = (("llama-3-8b", 1), ("llama-3-70b", 8), ("llama-3-8b", 8))
LAYER = ("qkv", "o", "gate_up", "down")


def skinny_cases():
    return cases(map(shape, SKINNY), M_DECODE, DTYPES)


def prefill_cases():
    shapes = [s for model, tp_size in PREFILL_MODELS for s in model_shapes(model, tp_size) if s.role in LAYER]
    return [c for c in cases(shapes, M_PREFILL, DTYPES) if c.shape.role in c.op.roles]  # as the layers call them


def skinny(options: Options) -> Iterator[Row]:
    return rows(skinny_cases(), "cuda")


def prefill(options: Options) -> Iterator[Row]:
    return rows(prefill_cases(), "cuda")

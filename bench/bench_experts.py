"""The experts of one MoE layer on one rank, ours against Hugging Face's own ways, a loop of GEMMs and vLLM's kernel.

    python -m bench.bench_experts [--model NAME ...] [--tp N ...] [--tokens T ...] [--dtype DTYPE ...]
        [--num-iters 30] [--device auto|cpu|cuda] [--output-json F]
    pytest bench/bench_experts.py --benchmark-only [--benchmark-json F]

    ours         what `ParallelExperts` calls: the choice of this device's table, which may be torch
    torch        torch's grouped GEMM, as we call it where nothing was measured
    grouped_mm   transformers' experts module, by its implementation of that name (its default), as are
    batched_mm   which copies the weights of each token's experts, and
    eager        expert by expert. It waits for the device, so it is not in a CUDA graph and pays for its launches
    loop         two GEMMs and the activation an expert, as if the host knew the routing; without weights
    vllm         vLLM's fused_moe, where it is installed

Tokens choose their experts evenly by chance. Ours is checked against float64 before anything is timed (`bench.timing`).
TB/s counts each expert that is hit once, TFLOP/s no row that is padding.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from bench.bench_gemm import DTYPES, TP_SIZES, Replayed, one_thread
from bench.kernel_ops import TUNABLE, Experts, ExpertsOp
from bench.kernel_shapes import KernelShape, model_shapes
from bench.on_gpu.errors import against, free_bytes
from bench.record import say, shown, spread, table, write
from bench.timing import REPEATS, Call, time_us
from tp_runtime.kernels.grouped_gemm import experts, experts_ref, has_grouped_mm

MODELS = ("mixtral-8x7b", "qwen3-30b-a3b")
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 8192)
HF = ("grouped_mm", "batched_mm", "eager")
TINY = KernelShape("tiny", "experts_gate_up", 1, n=256, k=128, num_experts=8, top_k=2)

# Published, not measured by this project: us of the best peer, bf16, on an H200; model, tp_size -> tokens -> us.
# Source: NVIDIA's measured operator database (github.com/ai-dynamo/aiconfigurator, snapshot of 2026-08).
PUBLISHED_US = {
    ("mixtral-8x7b", tp_size): dict(zip((1, 16, 4096), times))
    for tp_size, times in {1: (189, 660, 3595), 2: (105, 345, 1808), 4: (62, 185, 981), 8: (40, 102, 549)}.items()
}


@dataclass(frozen=True)
class Case:
    """Some tokens through a rank's part of one layer."""

    shape: KernelShape
    tokens: int
    dtype: str

    @property
    def op(self) -> ExpertsOp:
        return TUNABLE["experts"].on(self.shape)

    @property
    def size(self) -> tuple[int, int, int]:
        """Tokens, I and H."""
        return self.tokens, *self.op.size(self.shape)

    @property
    def what(self) -> str:
        s = self.shape
        return f"{s.model} tp{s.tp_size}, {s.num_experts} experts, top {s.top_k}, T={self.tokens}, {self.dtype}"

    def facts(self) -> dict[str, Any]:
        item, (_, width, hidden), s = getattr(torch, self.dtype).itemsize, self.size, self.shape
        return {
            "model": s.model, "tp_size": s.tp_size, "rank": s.rank, "dtype": self.dtype, "tokens": self.tokens,
            "num_experts": s.num_experts, "top_k": s.top_k, "width": width, "hidden": hidden,
            "bytes": self.op.bytes(*self.size, item), "flops": self.op.flops(*self.size),
            "published_us": PUBLISHED_US.get((s.model, s.tp_size), {}).get(self.tokens),
        }  # fmt: skip

    def operands(self, device: str) -> tuple[torch.Tensor, list[Experts]]:
        return self.op.operands(*self.size, getattr(torch, self.dtype), device)


def sides(case: Case, x: torch.Tensor, ws: list[Experts]) -> dict[str, Call]:
    """Contender -> call on the i-th experts, all but `eager` such that a CUDA graph can record them; ours is right."""
    calls: dict[str, Call] = {"ours": lambda i: ws[i].call(experts, x)}
    if case.op.has_torch(x, ws[0]):
        calls["torch"] = lambda i: case.op.torchs(x, ws[i])
    modules = {name: [_hugging_face(w, name) for w in ws] for name in HF}
    for name, several in modules.items():
        if _can_run(name, case, x, ws[0]):
            calls[name] = lambda i, several=several: several[i](x, ws[i].index, ws[i].weights)
    tokens = [_tokens_of_experts(w) for w in ws]
    calls["loop"] = lambda i: _loop(x, ws[i], tokens[i])
    if fused := _vllm():
        calls["vllm"] = lambda i: fused(x, ws[i].gate_up, ws[i].down, ws[i].weights, ws[i].index)
    with torch.inference_mode():
        error = against(case.op.exact(x, ws[0]), calls["ours"](0), ws[0].call(experts_ref, x))
    assert error["is_ok"], f"{case.what}: {error}"
    return calls


def _hugging_face(w: Experts, implementation: str) -> nn.Module:
    """transformers' experts of Mixtral, as they are of most families, with these weights."""
    num_experts, hidden, width = w.down.shape
    config = MixtralConfig(hidden_size=hidden, intermediate_size=width, num_local_experts=num_experts)
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = MixtralExperts(config)
    module.gate_up_proj = nn.Parameter(w.gate_up, requires_grad=False)
    module.down_proj = nn.Parameter(w.down, requires_grad=False)
    return module


def _can_run(name: str, case: Case, x: torch.Tensor, w: Experts) -> bool:
    """Whether transformers' implementation fits into memory and, on CUDA, does not wait for the device; eager may."""
    if name == "batched_mm":
        tokens, width, hidden = case.size
        return tokens * case.shape.top_k * 3 * width * hidden * x.itemsize < free_bytes(x.device.type) / 4
    return name == "eager" or not x.is_cuda or has_grouped_mm(x, w.gate_up, w.down)


def _tokens_of_experts(w: Experts) -> list[tuple[int, torch.Tensor]]:
    """(expert, its tokens), of those that have any: what the loop knows beforehand."""
    found = ((expert, (w.index == expert).any(1).nonzero()[:, 0]) for expert in range(len(w.down)))
    return [(expert, tokens) for expert, tokens in found if len(tokens)]


def _loop(x: torch.Tensor, w: Experts, tokens_of: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    y = torch.zeros_like(x)
    for expert, tokens in tokens_of:
        gate, up = F.linear(x[tokens], w.gate_up[expert]).chunk(2, -1)
        y.index_add_(0, tokens, F.linear(F.silu(gate).mul_(up), w.down[expert]))
    return y


def _vllm() -> Any:
    """vLLM's Triton kernel; None where it is not installed."""
    try:
        from vllm.model_executor.layers.fused_moe import fused_experts
    except ImportError:
        return None
    return fused_experts


def measure(case: Case, device: str, repeats: int = REPEATS) -> dict[str, Any]:
    """One row of a record."""
    x, ws = case.operands(device)
    calls = sides(case, x, ws)
    waiting = {name: calls.pop(name) for name in ("eager",) if device == "cuda"}
    times = time_us(calls, len(ws), repeats, device)
    with torch.inference_mode():
        times |= {name: _launched_us(call, len(ws), repeats) for name, call in waiting.items()}
    return {"what": case.what, **case.facts(), **{f"{name}_us": spread(us) for name, us in times.items()}}


def _launched_us(call: Call, num_copies: int, repeats: int) -> list[float]:
    """Microseconds of one call that waits for the device in the middle, launches and waits included."""
    call(0)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for repeat, event in enumerate(events[1:]):
        call(repeat % num_copies)
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) * 1e3 for start, stop in itertools.pairwise(events)]


ON_CUDA = torch.cuda.is_available()


def cases(models: list[str], tp_sizes: list[int], tokens: list[int], dtypes: list[str]) -> list[Case]:
    """Raises ValueError for a model without experts, or a tp_size that cannot be."""
    found: list[Case] = []
    for model, tp_size in itertools.product(models, tp_sizes):
        shapes = [TINY] if model == TINY.model else model_shapes(model, tp_size)
        of_experts = [s for s in shapes if s.role == TINY.role]
        if not of_experts:
            raise ValueError(f"--model {model} has no experts")
        found += [Case(s, t, dtype) for s, dtype, t in itertools.product(of_experts, dtypes, tokens)]
    return found


# `pytest bench --benchmark-only`: enough to see a regression in a minute; the command measures all.
PYTEST_CASES = (
    cases([MODELS[0]], [8], [1, 16, 1024], ["bfloat16"]) if ON_CUDA else cases(["tiny"], [1], [1, 64], ["float32"])
)


def pytest_generate_tests(metafunc) -> None:
    metafunc.parametrize("case", PYTEST_CASES, ids=lambda case: re.sub("[, ]+", "-", case.what.replace("=", "")))
    metafunc.parametrize("side", ("ours", "grouped_mm", "batched_mm", "loop", *([] if ON_CUDA else ["eager"])))


def test_experts(benchmark, case: Case, side: str):
    benchmark.group = case.what
    benchmark.extra_info.update(case.facts(), side=side)
    x, ws = case.operands("cuda" if ON_CUDA else "cpu")
    call = sides(case, x, ws)[side]
    with torch.inference_mode(), one_thread():
        if ON_CUDA:
            calls = Replayed(call, len(ws), count=4 * len(ws))
            benchmark.pedantic(calls, rounds=20, iterations=calls.count, warmup_rounds=2)
        else:
            turn = itertools.cycle(range(len(ws)))
            benchmark(lambda: call(next(turn)))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m bench.bench_experts", description=__doc__.split("\n\n")[0])
    p.add_argument("--model", nargs="+", metavar="NAME", help=f"default: {' '.join(MODELS)} on CUDA, else tiny")
    p.add_argument("--tp", nargs="+", type=int, help="tensor-parallel sizes; default: 1 2 4 8 on CUDA, else 1")
    p.add_argument("--tokens", nargs="+", type=int, help="default: 1 to 8192 on CUDA, else 1 4 16 64")
    p.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: bfloat16 on CUDA, else float32")
    p.add_argument("--num-iters", "--num_iters", type=int, default=REPEATS, help=f"repeats; default: {REPEATS}")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--output-json", "--output_json", type=Path, metavar="F", help="the record")
    return p


def rows(asked: list[Case], device: str, repeats: int) -> Iterator[dict[str, Any]]:
    for case in asked:
        with nullcontext() if device == "cuda" else one_thread():
            row = measure(case, device, repeats)
        yield row
        if device == "cuda":
            torch.cuda.empty_cache()  # also what CUDA graphs kept for themselves


def cells(row: dict[str, Any]) -> list[str]:
    ours = row["ours_us"]["median"]
    others = [shown(row[f"{name}_us"], "{:.1f}") if f"{name}_us" in row else "" for name in OTHERS]
    rates = f"{row['bytes'] / ours / 1e6:.3f}", f"{row['flops'] / ours / 1e6:.2f}"
    return [row["what"], shown(row["ours_us"], "{:.1f}"), *others, str(row["published_us"] or ""), *rates]


OTHERS = ("torch", *HF, "loop", "vllm")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parser().parse_args(argv)
    device = args.device if args.device != "auto" else "cuda" if ON_CUDA else "cpu"
    large = device == "cuda"
    try:
        if large and not ON_CUDA:
            raise ValueError("there is no CUDA GPU that torch can use; --device cpu measures the references")
        asked = cases(
            args.model or (list(MODELS) if large else [TINY.model]), args.tp or (list(TP_SIZES) if large else [1]),
            args.tokens or list(TOKENS if large else TOKENS[:4]), args.dtype or ["bfloat16" if large else "float32"],
        )  # fmt: skip
    except ValueError as error:
        say(f"bench_experts: {error}")
        return 2
    measured: list[dict[str, Any]] = []
    for row in rows(asked, device, args.num_iters):
        measured.append(row)
        say(f"{len(measured)} of {len(asked)}: {row['what']}")
    head = ["case", "ours us", *(f"{name} us" for name in OTHERS), "best peer us, published", "TB/s", "TFLOP/s"]
    print(table([head, *map(cells, measured)]))
    write("bench_experts", args, device=device, rows=measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Races show as bits that change: repeats, CUDA graphs, dependent launches without waits, other work beside.

    captured    every candidate replayed from a CUDA graph with new inputs gives the bits of the eager call. Then chains
                gemm -> gated_gemm -> gemm (+ residual), as a decoder's FFNs follow each other, through one set of
                buffers: run back to back, where each kernel starts before the one before it has ended (programmatic
                dependent launch), and replayed from a graph, against the same chain with a wait after every kernel
    repeated    50 calls and 50 replays of every candidate give equal bits, while another stream keeps memory and tensor
                cores busy; and two streams run the same kernel on different inputs at once
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from bench.choice import compile_ahead, label
from bench.gpu_section import Options, Row
from bench.kernel_ops import OPS
from bench.kernel_shapes import model_shapes
from bench.on_gpu.cases import Case, Faults, compiled_ahead, model_cases

REPEATS = 50
REPLAYS = 5  # of a graph, each with new inputs
CHAIN_LAYERS = 16  # as many as an op has candidates for few tokens
# model, tp_size: hidden and the rank's part of the intermediate width
CHAINS = (("llama-3-8b", 1), ("llama-3-8b", 8), ("llama-3-70b", 8))
CHAIN_M = (1, 7, 64, 512)


def captured(options: Options, device: str = "cuda") -> Iterator[Row]:
    for case in model_cases((1, 16, 64, 512), ("bfloat16",)):
        yield check_replays(case, device)
    for (model, tp_size), m in itertools.product(CHAINS, CHAIN_M):
        (gate_up,) = (s for s in model_shapes(model, tp_size) if s.role == "gate_up")
        yield check_chain(f"{model} tp{tp_size}", m, gate_up.k, gate_up.n // 2, device)
        release(device)


def repeated(options: Options, device: str = "cuda") -> Iterator[Row]:
    for case in model_cases((1, 16, 64, 1024), ("bfloat16",)):
        yield check_repeats(case, device)
        release(device)


@torch.inference_mode()
def check_replays(case: Case, device: str) -> Row:
    """A graph that was captured once follows its inputs."""
    x, w = case.operands(device)
    faults = Faults(device)
    for name, candidate in compiled_ahead(case, x, w).items():

        def fault(candidate=candidate) -> str:
            out = x.new_empty(case.m, case.n)
            replay = replayed(lambda: call(case, x, w, candidate, out), device)
            for _ in range(REPLAYS):
                x.normal_()
                want = case.op.ours(x, w, *candidate)
                out.fill_(float("nan"))
                replay()
                if not torch.equal(out, want):
                    return "a replay differs from the eager call"
            return ""

        faults.check(name, fault)
    return faults.row(f"{case.what}: replayed")


@torch.inference_mode()
def check_repeats(case: Case, device: str) -> Row:
    """Equal bits again and again, beside other work."""
    x, w = case.operands(device)
    others = [torch.randn_like(x) for _ in range(2)]
    faults = Faults(device)
    for name, candidate in compiled_ahead(case, x, w).items():

        def fault(candidate=candidate) -> str:
            first, out = case.op.ours(x, w, *candidate), x.new_empty(case.m, case.n)
            replay = replayed(lambda: call(case, x, w, candidate, out), device)
            with busy_beside(device):
                differing = sum((case.op.ours(x, w, *candidate) != first).any() for _ in range(REPEATS))
            for _ in range(REPEATS):
                out.fill_(float("nan"))
                replay()
                differing = differing + (out != first).any()
            if count := int(differing):
                return f"{count} of {2 * REPEATS} repeats differ"
            return two_at_once(case, others, w, candidate, device)

        faults.check(name, fault)
    return faults.row(f"{case.what}: {REPEATS} repeats")


def two_at_once(case: Case, xs: list[torch.Tensor], w: torch.Tensor, candidate, device: str) -> str:
    """The same kernel on two streams: each keeps to its own workspace."""
    wants = [case.op.ours(x, w, *candidate) for x in xs]
    differing = [torch.zeros((), dtype=torch.int64, device=device) for _ in xs]
    streams = [torch.cuda.Stream() if device == "cuda" else None for _ in xs]
    synchronize(device)
    for _ in range(10):
        for x, want, count, stream in zip(xs, wants, differing, streams, strict=True):
            with torch.cuda.stream(stream) if stream else nullcontext():
                count += (case.op.ours(x, w, *candidate) != want).any()
    synchronize(device)
    return "two streams at once disturb each other" if any(map(int, differing)) else ""


@torch.inference_mode()
def check_chain(name: str, m: int, hidden: int, width: int, device: str, dtype: str = "bfloat16") -> Row:
    """Layers of gemm -> gated_gemm -> gemm + residual, each by the next of the candidates, through the same buffers."""
    attention, ffn, down = (
        Case(OPS[op], name, m, n, k, dtype)
        for op, n, k in (("gemm", hidden, hidden), ("gated_gemm", width, hidden), ("gemm", hidden, width))
    )
    faults = Faults(device)
    weights = [[case.operands(device)[1] for case in (attention, ffn, down)] for _ in range(CHAIN_LAYERS)]
    x, y, gated = (torch.empty(m, n, dtype=getattr(torch, dtype), device=device) for n in (hidden, hidden, width))
    out = torch.empty_like(x)
    for case, w in zip((attention, ffn, down), weights[0], strict=True):
        if device == "cuda":
            compile_ahead(case.op, case.candidates().values(), case.operands(device)[0], w)
    turns = [itertools.cycle(case.candidates().values()) for case in (attention, ffn, down)]
    layers = [[(*next(turn), w) for turn, w in zip(turns, ws, strict=True)] for ws in weights]

    def run(wait: Callable[[], None]) -> None:
        out.copy_(x)
        for (*one, w_o), (*two, w_gate_up), (*three, w_down) in layers:
            call(attention, out, w_o, one, y)
            wait()
            call(ffn, y, w_gate_up, two, gated)
            wait()
            call(down, gated, w_down, three, out, residual=y)
            wait()

    def fault() -> str:
        x.normal_()
        run(lambda: synchronize(device))
        replay = replayed(lambda: run(lambda: None), device)
        for _ in range(REPLAYS):
            x.normal_()
            run(lambda: synchronize(device))
            want = out.clone()
            if not want.isfinite().all():
                return "the chain with waits holds a NaN or an infinity"
            for way, again in (("back to back", lambda: run(lambda: None)), ("replayed", replay)):
                for buffer in (y, gated, out):
                    buffer.fill_(float("nan"))
                again()
                if not torch.equal(out, want):
                    return f"the chain {way} differs from the chain with waits"
        return ""

    kernels = ", ".join(dict.fromkeys(label(*candidate) for layer in layers for *candidate, _ in layer))
    faults.check(kernels, fault)
    return faults.row(f"chain {name}, M={m}, {CHAIN_LAYERS} layers", kernels=kernels)


def call(case: Case, x: torch.Tensor, w: torch.Tensor, candidate: Any, out: torch.Tensor, **operands) -> None:
    kernel, config = candidate
    case.op.kernels.run(x, w, out=out, kernel=kernel, config=config, **operands)


def replayed(work: Callable[[], None], device: str) -> Callable[[], None]:
    """`work` as a CUDA graph: what replays it. On the CPU `work` itself."""
    if device != "cuda":
        return work
    work()  # compiles, makes workspaces
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


@contextmanager
def busy_beside(device: str) -> Iterator[None]:
    """Other work on another stream: products and element-wise passes, tens of milliseconds of them."""
    if device != "cuda":
        yield
        return
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(150):
            a = (a @ a).clamp_(-1, 1)
    yield
    torch.cuda.synchronize()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def release(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()

"""Decode attention: ours against torch's SDPA and flex_attention, flash-attn and flashinfer where they are installed.

    python -m bench.bench_attention [--model NAME ...] [--batch B ...] [--context S ...] [--dtype bfloat16]
        [--num-iters 30] [--device auto|cpu|cuda] [--output-json F]

One new token of each sequence over a cache of S tokens, none of it in L2. TB/s counts the cache, read once. Every
contender is checked against float64 before it is timed, ours by the rule of the tests: at most twice torch's error. On
the CPU ours is the reference, which is SDPA.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.on_gpu.errors import against
from bench.record import say, shown, spread, table, write
from bench.timing import REPEATS, Call, num_copies, time_us
from tp_runtime.kernels.decode_attention import decode_attention

# query heads, key/value heads and head size of one rank
MODELS = {"llama-3-8b tp1": (32, 8, 128), "llama-3-70b tp8": (8, 1, 128), "gemma-2-9b tp1": (16, 8, 256)}
ON_GPU = {"batch": (1, 16, 64), "context": (1024, 8192, 32768)}
ON_CPU = {"batch": (1, 4), "context": (256, 1024)}
LARGE_BYTES = 1 << 29  # of such caches two in turn are enough: L2 holds a tenth


@dataclass(frozen=True)
class Case:
    """One step of one layer."""

    model: str
    batch: int
    context: int
    dtype: str

    @property
    def what(self) -> str:
        return f"{self.model} B={self.batch} S={self.context} {self.dtype}"

    @property
    def cache_bytes(self) -> int:
        _, kv_heads, head_dim = MODELS[self.model]
        return 2 * self.batch * kv_heads * self.context * head_dim * getattr(torch, self.dtype).itemsize

    def operands(self, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """q [B, H_q, 1, D], and caches to take in turn: [copies, keys and values, B, H_kv, S, D]."""
        heads, kv_heads, head_dim = MODELS[self.model]
        options = {"device": device, "dtype": getattr(torch, self.dtype)}
        copies = 2 if self.cache_bytes > LARGE_BYTES else num_copies(self.cache_bytes, device)
        caches = torch.empty(copies, 2, self.batch, kv_heads, self.context, head_dim, **options).normal_()
        return torch.randn(self.batch, heads, 1, head_dim, **options), caches


def torchs(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    y = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
    return y.transpose(1, 2).flatten(2)


def contenders(q: torch.Tensor, caches: torch.Tensor) -> dict[str, Call]:
    """Name -> attention over the i-th cache, [B, 1, H_q * D]; those that run here."""
    scale = q.shape[-1] ** -0.5
    calls: dict[str, Call] = {
        "torch": lambda i: torchs(q, *caches[i]),
        "ours": lambda i: decode_attention(q, *caches[i], scale),
    }
    if not q.is_cuda:
        return calls
    from torch.nn.attention.flex_attention import flex_attention

    flex = torch.compile(functools.partial(flex_attention, enable_gqa=True), dynamic=False)
    calls["flex"] = lambda i: flex(q, *caches[i]).transpose(1, 2).flatten(2)
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_with_kvcache

        new = q.transpose(1, 2)
        calls["flash-attn"] = lambda i: flash_attn_with_kvcache(new, *caches[i].transpose(2, 3)).flatten(2)
    if importlib.util.find_spec("flashinfer") and len(q) == 1:
        from flashinfer import single_decode_with_kv_cache

        decode = functools.partial(single_decode_with_kv_cache, q[0, :, 0], kv_layout="HND")
        calls["flashinfer"] = lambda i: decode(*caches[i, :, 0]).view(1, 1, -1)
    return calls


def checked(q: torch.Tensor, caches: torch.Tensor) -> dict[str, Call]:
    """The contenders that are right; ours has to be.

    Raises:
        AssertionError: ours is wrong.
    """
    calls = contenders(q, caches)
    rows = [torchs(q[b : b + 1].double(), *caches[0, :, b : b + 1].double()) for b in range(len(q))]  # memory for one
    want, reference = torch.cat(rows), calls["torch"](0)
    right = {}
    for name, call in calls.items():
        try:
            error = against(want, call(0), reference)
        except Exception as why:  # a library that does not take this shape is no contender for it
            if name == "ours":
                raise
            say(f"  without {name}: {type(why).__name__}: {str(why).splitlines()[0][:200]}")
            continue
        if error["is_ok"]:
            right[name] = call
        else:
            assert name != "ours", error
            say(f"  without {name}, which is wrong: {error}")
    return right


def rows(cases: Iterable[Case], device: str, repeats: int = REPEATS) -> Iterator[dict]:
    """One row of a record a case."""
    for case in cases:
        q, caches = case.operands(device)
        with torch.inference_mode():
            times = time_us(checked(q, caches), len(caches), repeats, device)
        figures = {f"{name}_us": spread(values) for name, values in times.items()}
        yield {"what": case.what, **vars(case), "bytes": case.cache_bytes, "copies": len(caches), **figures}
        del q, caches
        if device == "cuda":
            torch.cuda.empty_cache()


def cells(row: dict) -> list[str]:
    ours = row["ours_us"]["median"]
    others = {key.removesuffix("_us"): row[key]["median"] for key in row if key.endswith("_us") and key != "ours_us"}
    return [
        row["what"], shown(row["ours_us"], "{:.1f}"), f"{row['bytes'] / ours / 1e6:.3f}",
        ", ".join(f"{name} {us:.1f} ({us / ours:.2f}x)" for name, us in others.items()),
    ]  # fmt: skip


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m bench.bench_attention", description=__doc__.split("\n\n")[0])
    p.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), help="default: all of them")
    p.add_argument("--batch", nargs="+", type=int, help="sequences; default: 1 16 64, on the CPU 1 4")
    p.add_argument("--context", nargs="+", type=int, help="tokens held; default: 1024 8192 32768, on the CPU 256 1024")
    p.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=("bfloat16", "float16", "float32"))
    p.add_argument("--num-iters", "--num_iters", type=int, default=REPEATS, help=f"repeats; default: {REPEATS}")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--output-json", "--output_json", type=Path, metavar="F", help="the record")
    return p


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parser().parse_args(argv)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        say("bench_attention: there is no CUDA GPU that torch can use; --device cpu measures the references")
        return 2
    sizes = ON_GPU if device == "cuda" else ON_CPU
    asked = itertools.product(args.model, args.batch or sizes["batch"], args.context or sizes["context"], args.dtype)
    measured: list[dict] = []
    for row in rows([Case(*case) for case in asked], device, args.num_iters):
        measured.append(row)
        say(f"{len(measured)}: {row['what']}")
    print(table([["case", "ours us", "TB/s", "others us (over ours)"], *map(cells, measured)]))
    write("bench_attention", args, device=device, rows=measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())

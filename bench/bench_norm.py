"""RMSNorm with its residual addition: ours against torch's two ops, and Liger's fused one where it is installed.

    python -m bench.bench_norm [--n N ...] [--m M ...] [--dtype bfloat16] [--num-iters 30] [--device auto|cpu|cuda]
        [--output-json F]

TB/s counts x, residual, h and y, each once. Every contender is checked against float64 before it is timed. On the CPU
ours is the reference, which is torch's.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from bench.on_gpu.errors import against
from bench.record import say, shown, spread, table, write
from bench.timing import REPEATS, Call, num_copies, time_us
from tp_runtime.kernels.rms_norm import rms_norm

EPS = 1e-5


def torchs(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = residual + x
    return torch.rms_norm(h, weight.shape, weight, EPS), h


def contenders(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> dict[str, Call]:
    """Name -> (y, h) of the i-th x and residual; those that run here."""
    calls: dict[str, Call] = {
        "torch": lambda i: torchs(x[i], residual[i], weight),
        "ours": lambda i: rms_norm(x[i], weight, EPS, residual[i]),
    }
    if x.is_cuda:
        compiled = torch.compile(torchs, dynamic=False)
        calls["inductor"] = lambda i: compiled(x[i], residual[i], weight)
    if x.is_cuda and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        liger = LigerFusedAddRMSNormFunction.apply
        calls["liger"] = lambda i: liger(x[i], residual[i], weight, EPS, 0.0, "llama", False)
    return calls


def rows(shapes: Iterable[tuple[int, int, str]], device: str, repeats: int = REPEATS) -> Iterator[dict]:
    """One row of a record for each M, N and dtype."""
    for m, n, dtype in shapes:
        options = {"device": device, "dtype": getattr(torch, dtype)}
        num_bytes = 4 * m * n * options["dtype"].itemsize
        copies = num_copies(num_bytes, device)
        x, residual = torch.randn(2, copies, m, n, **options)
        weight = torch.rand(n, **options)
        with torch.inference_mode():
            calls = contenders(x, residual, weight)
            h = (residual[0] + x[0]).double()
            want = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS) * weight.double()
            reference = calls["torch"](0)[0]
            for name in list(calls):
                try:
                    error = against(want, calls[name](0)[0], reference)
                except Exception as why:  # a library that does not take this shape is no contender for it
                    if name == "ours":
                        raise
                    say(f"  without {name}: {type(why).__name__}: {str(why)[:200]}")
                    del calls[name]
                    continue
                if not error["is_ok"]:
                    assert name != "ours", f"M={m} N={n} {dtype}: {error}"
                    say(f"  without {name}, which is wrong: {error}")
                    del calls[name]
            times = time_us(calls, copies, repeats, device)
        figures = {f"{name}_us": spread(values) for name, values in times.items()}
        what = f"M={m} N={n} {dtype}"
        yield {"what": what, "m": m, "n": n, "dtype": dtype, "bytes": num_bytes, "copies": copies, **figures}


def cells(row: dict) -> list[str]:
    ours = row["ours_us"]["median"]
    others = {key.removesuffix("_us"): row[key]["median"] for key in row if key.endswith("_us") and key != "ours_us"}
    return [
        row["what"], shown(row["ours_us"], "{:.2f}"), f"{row['bytes'] / ours / 1e6:.3f}",
        ", ".join(f"{name} {us:.2f} ({us / ours:.2f}x)" for name, us in others.items()),
    ]  # fmt: skip


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m bench.bench_norm", description=__doc__.split("\n\n")[0])
    p.add_argument("--n", nargs="+", type=int, default=[4096, 8192], help="width; default: 4096 8192")
    p.add_argument("--m", nargs="+", type=int, default=[1, 16, 64, 4096], help="tokens; default: 1 16 64 4096")
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
        say("bench_norm: there is no CUDA GPU that torch can use; --device cpu measures the references")
        return 2
    measured: list[dict] = []
    for row in rows(itertools.product(args.m, args.n, args.dtype), device, args.num_iters):
        measured.append(row)
        say(f"{len(measured)}: {row['what']}")
    print(table([["case", "ours us", "TB/s", "others us (over ours)"], *map(cells, measured)]))
    write("bench_norm", args, device=device, rows=measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())

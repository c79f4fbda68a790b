"""A whole decoder layer at decode: patched, against Hugging Face's own and against the sum of its parts.

    python -m bench.bench_layer [--model "llama-3-8b tp1" ...] [--batch B ...] [--context S ...] [--num-iters 30]
        [--device auto|cpu|cuda] [--output-json F]

The layer of one rank, without its all-reduces: a model of the rank's own sizes, so that both sides have the same
weights and the same result. Its layers follow one another, as in a model, more of them than L2 holds, in a CUDA graph;
so the norm that opens a layer is in the launch that closes the one before. Static caches on both sides, with a mask, as
in Hugging Face's generate(); each call first sets the count of tokens back, a launch of its own on both sides.

    theirs      Hugging Face's layer, attention "sdpa"
    ours        the same after tp_runtime.patch
    parts       the launches of ours, each timed by itself, added up

Correct before timed: of one step through all layers, the error against float64 is at most twice theirs. Kernels a layer
are counted by torch.profiler.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, StaticCache

import tp_runtime
from bench.kernel_shapes import MODELS
from bench.on_gpu.errors import against
from bench.record import ratio, say, shown, spread, table, write
from bench.timing import REPEATS, Call, num_copies, time_us
from tp_runtime.comm import NullCommunicator
from tp_runtime.kernels.gated_gemm import gated_gemm
from tp_runtime.kernels.gemm import gemm
from tp_runtime.kernels.rms_norm import rms_norm
from tp_runtime.kernels.rope_decode_attention import rope_decode_attention
from tp_runtime.patching import patch_of
from tp_runtime.plan import make_plan

LAYERS = ("llama-3-8b tp1", "llama-3-70b tp8")
TINY = "tiny tp1"
_TINY = {"model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
ON_GPU = {"model": LAYERS, "batch": (1, 16), "context": (1024,)}
ON_CPU = {"model": (TINY,), "batch": (1, 2), "context": (16,)}


@dataclass(frozen=True)
class Case:
    """One step of the layers of one rank."""

    model: str
    batch: int
    context: int
    dtype: str

    @property
    def what(self) -> str:
        return f"layer of {self.model}, B={self.batch} S={self.context} {self.dtype}"

    def config(self, num_layers: int) -> LlamaConfig:
        """A model of what rank 0 holds of each layer, and hardly any vocabulary."""
        name, _, tp = self.model.partition(" tp")
        sizes = {**MODELS, "tiny": _TINY}[name]
        plan = make_plan(sizes, int(tp))
        heads, width = plan.heads[0], plan.parameter("model.layers.0.mlp.down_proj.weight").local_shape(0)[1]
        return LlamaConfig(
            hidden_size=sizes["hidden_size"], intermediate_size=width, num_attention_heads=heads.num_heads,
            num_key_value_heads=heads.num_kv_heads, head_dim=plan.head_dim, num_hidden_layers=num_layers, vocab_size=64,
            initializer_range=sizes["hidden_size"] ** -0.5, attn_implementation="sdpa",
            bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip


def layer_bytes(config: LlamaConfig, itemsize: int) -> int:
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return itemsize * config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)


class Steps:
    """The layers of a model, one call each, one token of each sequence: what each gives, the next is handed."""

    def __init__(self, model: PreTrainedModel, case: Case, states: list[tuple[torch.Tensor, torch.Tensor]]):
        self.model, self.context = model, case.context
        self.cache = StaticCache(config=model.config, max_cache_len=case.context + 1)
        keys = states[0][0]
        options = {"dtype": model.dtype, "device": keys.device}
        for i, (k, v) in enumerate(states):
            self.cache.update(k.to(model.dtype), v.to(model.dtype), i)
        generator = torch.Generator(keys.device).manual_seed(1)
        shape = case.batch, 1, model.config.hidden_size
        self.x = torch.randn(shape, generator=generator, device=keys.device).to(model.dtype)
        self.mask = torch.ones(case.batch, 1, 1, case.context + 1, dtype=torch.bool, device=options["device"])
        self.positions = torch.full((1, 1), case.context, device=options["device"])
        self.embeddings = model.model.rotary_emb(self.x, self.positions)
        self.h = self.x

    def __call__(self, i: int) -> torch.Tensor:
        if i == 0:
            self.h = self.x
        self.cache.layers[i].cumulative_length.fill_(self.context)
        self.h = self.model.model.layers[i](
            self.h, attention_mask=self.mask, position_embeddings=self.embeddings, position_ids=self.positions,
            past_key_values=self.cache, use_cache=True,
        )  # fmt: skip
        return self.h

    def through_all(self) -> torch.Tensor:
        return [self(i) for i in range(len(self.model.model.layers))][-1].clone()


def parts(steps: Steps) -> dict[str, Call]:
    """The launches of a patched layer, each on the i-th layer's weights."""
    layers, room, x = steps.model.model.layers, steps.cache.layers, steps.x
    attention, mlp = layers[0].self_attn, layers[0].mlp
    qkv = gemm(x, attention.qkv_proj.weight)
    of_heads = x.new_empty(*x.shape[:2], attention.o_proj.in_features_local).normal_()
    wide = x.new_empty(*x.shape[:2], mlp.down_proj.in_features_local).normal_()
    eps = layers[0].input_layernorm.eps
    cos, signed_sin = steps.embeddings
    position = torch.full((1,), steps.context, device=x.device)

    def attend(i: int) -> torch.Tensor:
        caches = room[i].keys, room[i].values
        return rope_decode_attention(
            qkv, cos, signed_sin, *caches, position, attention.scaling, attention._kv_of_query, steps.mask
        )

    return {
        "qkv": lambda i: gemm(x, layers[i].self_attn.qkv_proj.weight),
        "attention": attend,
        "o": lambda i: gemm(of_heads, layers[i].self_attn.o_proj.weight),
        "norm": lambda i: rms_norm(x, layers[i].post_attention_layernorm.weight, eps, x),
        "gate_up": lambda i: gated_gemm(x, layers[i].mlp.gate_up_proj.weight),
        "down": lambda i: gemm(wide, layers[i].mlp.down_proj.weight),
        "norm ahead": lambda i: rms_norm(x, layers[i].input_layernorm.weight, eps, x),
    }


def kernels_a_layer(steps: Steps) -> float | None:
    """Kernels that the device runs for one layer; None where there is no device to ask."""
    if not steps.x.is_cuda:
        return None
    from torch.profiler import ProfilerActivity, profile

    steps.through_all()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for i in range(len(steps.model.model.layers)):
            steps(i)
        torch.cuda.synchronize()
    kernels = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    # Not of the layer: the count that is set back.
    return len(kernels) / len(steps.model.model.layers) - 1


@torch.inference_mode()
def row(case: Case, device: str, repeats: int = REPEATS) -> dict:
    """One row of a record.

    Raises:
        AssertionError: ours is wrong.
    """
    dtype = getattr(torch, case.dtype)
    num_layers = num_copies(layer_bytes(case.config(1), dtype.itemsize), device)
    torch.manual_seed(0)
    with torch.device(device):
        theirs = AutoModelForCausalLM.from_config(case.config(num_layers), dtype=dtype).eval()
    ours = copy.deepcopy(theirs)
    tp_runtime.patch(ours, NullCommunicator(0, 1, device))
    config = theirs.config
    shape = case.batch, config.num_key_value_heads, case.context, config.head_dim
    states = [tuple(torch.randn(2, *shape, device=device, dtype=dtype)) for _ in range(num_layers)]
    steps = {"theirs": Steps(theirs, case, states), "ours": Steps(ours, case, states)}
    ahead = patch_of(ours).ahead
    ahead.is_open = True  # the layers follow one another, as within the model's own pass
    results = {name: each.through_all() for name, each in steps.items()}
    exact = Steps(copy.deepcopy(theirs).double(), case, states).through_all()
    error = against(exact, results["ours"], results["theirs"])
    assert error["is_ok"], f"{case.what}: {error}"
    del exact
    times = time_us(steps, num_layers, repeats, device)
    of_parts = time_us(parts(steps["ours"]), num_layers, repeats, device)
    kernels = {f"{name}_kernels": kernels_a_layer(each) for name, each in steps.items()}
    ahead.is_open = False
    part_us = {name: spread(us)["median"] for name, us in of_parts.items()}
    return {
        "what": case.what, **vars(case), "layers": num_layers,
        **{f"{name}_us": spread(us) for name, us in times.items()},
        "theirs_over_ours": ratio(times["theirs"], times["ours"]), "parts_us": part_us, "sum_us": sum(part_us.values()),
        **kernels, "max_ratio": error["max_ratio"], "rms_ratio": error["rms_ratio"],
    }  # fmt: skip


def rows(cases: Iterable[Case], device: str, repeats: int = REPEATS) -> Iterator[dict]:
    for case in cases:
        yield row(case, device, repeats)
        if device == "cuda":
            torch.cuda.empty_cache()


def cells(row: dict) -> list[str]:
    kernels = (row[f"{name}_kernels"] for name in ("ours", "theirs"))
    return [
        row["what"], shown(row["ours_us"], "{:.1f}"), shown(row["theirs_us"], "{:.1f}"),
        f"{row['theirs_over_ours']['median']:.2f}x", f"{row['sum_us']:.1f}",
        " / ".join("not measured" if count is None else f"{count:g}" for count in kernels),
    ]  # fmt: skip


HEAD = ["case", "ours us", "theirs us", "theirs / ours", "sum of parts us", "kernels a layer, ours / theirs"]


def cases(model: Iterable[str], batch: Iterable[int], context: Iterable[int], dtype: str = "bfloat16") -> list[Case]:
    return [Case(*case, dtype) for case in itertools.product(model, batch, context)]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m bench.bench_layer", description=__doc__.split("\n\n")[0])
    p.add_argument("--model", nargs="+", choices=(*LAYERS, TINY), help=f"default: {', '.join(LAYERS)}; on the CPU tiny")
    p.add_argument("--batch", nargs="+", type=int, help="sequences; default: 1 16, on the CPU 1 2")
    p.add_argument("--context", nargs="+", type=int, help="tokens held; default: 1024, on the CPU 16")
    p.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    p.add_argument("--num-iters", "--num_iters", type=int, default=REPEATS, help=f"repeats; default: {REPEATS}")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--output-json", "--output_json", type=Path, metavar="F", help="the record")
    return p


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parser().parse_args(argv)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        say("bench_layer: there is no CUDA GPU that torch can use; --device cpu takes a tiny layer")
        return 2
    sizes = ON_GPU if device == "cuda" else ON_CPU
    asked = {name: getattr(args, name) or sizes[name] for name in sizes}
    measured: list[dict] = []
    for found in rows(cases(**asked, dtype=args.dtype), device, args.num_iters):
        measured.append(found)
        say(f"{len(measured)}: {found['what']}")
    print(table([HEAD, *map(cells, measured)]))
    write("bench_layer", args, device=device, rows=measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())

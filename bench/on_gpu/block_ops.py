"""What stands between a decoder block's GEMMs: norm, rope and cache, decode attention, and top-k of the vocabulary.

    exact       every form that a family needs, at sizes of models and off the grid, against torch's ops in float64.
                What a cache holds behind a sequence's end is NaN for ours: it may not be read
    steady      equal bits again and again, and in CUDA graphs that are replayed while sequences grow: lengths and
                positions lie on the device and change between replays
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from bench.choice import label
from bench.gpu_section import Options, Row
from bench.on_gpu.calls import Call, Form, check_exact, check_steady, seeded
from bench.on_gpu.cases import DTYPES
from bench.on_gpu.races import release
from tp_runtime.kernels import (
    decode_attention,
    decode_attention_launch,
    mean_squares,
    mean_squares_kernel,
    rms_norm,
    rms_norm_kernel,
    rope,
    rope_decode_attention,
    vocab_top_k_kernel,
)

EPS = 1e-5
NORMS = ((1, 4096), (64, 8192), (33, 2880), (1000, 128), (3, 32768))  # rows, N
# Sequences, query heads, key/value heads, tokens that the cache has room for, head size.
ATTENTIONS = (
    (1, 32, 8, 8192, 128), (16, 8, 1, 1000, 128), (3, 8, 4, 777, 256), (64, 32, 8, 1024, 128), (2, 9, 3, 70, 80),
)  # fmt: skip
UNEVEN = (0, 0, 0, 1, 1, 0, 2, 2)  # the key/value head of each query head, of three
TOP_KS = ((1, 128256), (64, 16032), (3, 151936), (5, 1000))  # sequences, V
KS = (1, 8, 50)


def rows_exact(device: str) -> Iterator[Row]:
    for dtype in DTYPES:
        for m, n in NORMS:
            yield check_exact(f"rms_norm {m}x{n}, {dtype}", norm_forms(m, n, dtype, device), device)
            yield check_exact(f"mean_squares {m}x{n}, {dtype}", mean_squares_forms(m, n, dtype, device), device)
        for size in ATTENTIONS:
            for name, forms in (("attention", attention_forms), ("rope", rope_forms)):
                yield check_exact(f"{name} {of(size)}, {dtype}", forms(*size, dtype, device), device)
                release(device)
        for batch, v in TOP_KS:
            yield check_exact(f"vocab_top_k {batch}x{v}, {dtype}", top_k_forms(batch, v, dtype, device), device)


def exact(options: Options, device: str = "cuda") -> Iterator[Row]:
    return rows_exact(device)


def of(size: tuple[int, ...]) -> str:
    return "B={} H={}/{} S={} D={}".format(*size)


def norm_forms(m: int, n: int, dtype: str, device: str, run: Callable = rms_norm_kernel.run) -> list[Form]:
    options = {"dtype": getattr(torch, dtype), "device": device}
    x, residual = torch.randn(2, m, n, **options)
    weight, post_weight = 1 + 0.2 * torch.randn(2, n, **options)
    small = weight - 1

    def form(
        name: str, weight: torch.Tensor | None, *tensors: torch.Tensor, names: tuple = ("post_weight",), **rest: Any
    ) -> Form:
        """`names`: of the vectors behind the residual."""

        def call(function: Callable, x, weight, residual=None, *vectors: torch.Tensor):
            named = dict(zip(names, vectors))
            result = function(x, weight, EPS, residual, **named, **rest)
            # h alone is one result of ours, and two equal ones of the reference
            return result[0] if residual is not None and weight is None else result

        ours, torchs = (functools.partial(call, function) for function in (run, rms_norm.rmsnorm_ref))
        return Form(name, {"rms_norm": ours}, torchs, (x, weight, *tensors))

    return [
        form("", weight),
        form("1 + weight", small, unit_offset=True),
        form("residual", weight, residual),
        form("residual, multiplier", weight, residual, residual_multiplier=0.22),
        form("residual, post-norm", weight, residual, post_weight),
        form("residual, 1 + post-norm", small, residual, small, unit_offset=True),
        form("h alone", None, residual, post_weight),
        form("residual, x_bias", weight, residual, post_weight, names=("x_bias",)),
        form("residual, x_bias, post-norm", weight, residual, post_weight, small, names=("post_weight", "x_bias")),
        form("residual, layer norm", weight, residual, post_weight, names=("bias",)),
        form("residual, x_bias, layer norm", weight, residual, post_weight, small, names=("bias", "x_bias")),
        form("residual, layer norm without bias", weight, residual, centered=True),
    ]


def mean_squares_forms(m: int, n: int, dtype: str, device: str, run: Callable = mean_squares_kernel.run) -> list[Form]:
    """Of all columns; of a part of them, that no vector of 16 bytes begins or ends with."""
    x = torch.randn(m, n, dtype=getattr(torch, dtype), device=device)

    def form(name: str, *bounds: int) -> Form:
        def call(function: Callable, x):
            y = function(x, bounds, (3 * n, n))
            return y if x.dtype == torch.float64 else y.to(x.dtype)

        ours, torchs = (functools.partial(call, function) for function in (run, mean_squares.mean_squares_ref))
        return Form(name, {"mean_squares": ours}, torchs, (x,))

    return [form("whole", 0, n // 2, n // 2, n), form("part", 3, n // 2 - 1, n // 2 + 5, n // 2 + 5 + n // 8)]


def attention_forms(
    batch: int, heads: int, kv_heads: int, capacity: int, head_dim: int, dtype: str, device: str,
    run: Callable = decode_attention_launch.run,
) -> list[Form]:  # fmt: skip
    """Each by every candidate: full, lengths of their own, windows, caps, masks, sinks, head maps, several tokens."""
    options = {"dtype": getattr(torch, dtype), "device": device}
    keys, values = torch.randn(2, batch, kv_heads, capacity, head_dim, **options)
    lengths = torch.randint(min(4, capacity), capacity + 1, (batch,), device=device)
    padding = torch.arange(capacity, device=device) >= torch.randint(0, 3, (batch, 1, 1, 1), device=device)
    bias = torch.randn(batch, 1, 1, capacity, **options)
    scale = head_dim**-0.5

    def form(name: str, tokens: int = 1, num_heads: int = heads, scale: float = scale, **tensors: Any) -> Form:
        q = torch.randn(batch, num_heads, tokens, head_dim, **options)
        named = {name: value for name, value in tensors.items() if value is not None}

        def call(function: Callable, q, keys, values, *given, **config):
            return function(q, keys, values, scale, **dict(zip(named, given, strict=True)), **config)

        def ours(config: Any) -> Callable:
            def hidden(q, keys, values, *given):
                if "lengths" in named:
                    keys, values = (behind_is_nan(cache, named["lengths"]) for cache in (keys, values))
                return call(run, q, keys, values, *given, config=config)

            return hidden

        torchs = functools.partial(call, decode_attention.decode_attention_ref)
        every = {label("split", config): ours(config) for config in decode_attention_launch.CANDIDATES["split"]}
        return Form(name, every, torchs, (q, keys, values, *named.values()))

    forms = [
        form("full"),
        form("lengths", lengths=lengths),
        form("window", lengths=lengths, window=max(2, capacity // 3)),
        form("softcap", softcap=30.0, lengths=lengths),
        form("padding", mask=padding),
        form("bias, sinks", mask=bias, sinks=torch.randn(heads, **options)),
    ]
    if kv_heads == 3:
        forms.append(form("uneven heads", num_heads=len(UNEVEN), kv_of_query=UNEVEN, lengths=lengths))
    if heads // kv_heads * 3 <= decode_attention.MAX_ROWS:
        forms.append(form("three tokens", tokens=3, lengths=lengths.clamp_min(3)))
    return forms


def behind_is_nan(cache: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """A copy of a cache [B, H_kv, S, D] that is NaN from each sequence's length on."""
    is_behind = torch.arange(cache.shape[2], device=cache.device) >= lengths[:, None]
    return cache.masked_fill(is_behind[:, None, :, None], torch.nan)


def rope_forms(
    batch: int, heads: int, kv_heads: int, capacity: int, head_dim: int, dtype: str, device: str,
    kernels: Mapping[str, Callable] | None = None,
) -> list[Form]:  # fmt: skip
    """rope_and_cache, and in one launch with attention: their results and all of the caches that they write into."""
    rope_op, attention_op = (kernels or KERNELS)["rope_and_cache"], (kernels or KERNELS)["rope_decode_attention"]
    options = {"dtype": getattr(torch, dtype), "device": device}
    caches = torch.randn(2, batch, kv_heads, capacity, head_dim, **options)
    places = torch.randint(0, capacity, (batch, 1), device=device)
    norms = tuple(1 + 0.2 * torch.randn(2, head_dim, **options))
    wide_norms = tuple(1 + 0.2 * torch.randn(count * head_dim, **options) for count in (heads, kv_heads))
    width, scale = (heads + 2 * kv_heads) * head_dim, head_dim**-0.5

    def form(name: str, what: str, op: Callable, ref: Callable, tokens: int, where: Any, dim: int, *rest: Any) -> Form:
        qkv = torch.randn(batch, tokens, width, **options)
        cos, signed_sin = torch.rand(2, 1, 1, tokens, dim, **options)

        def call(function: Callable, qkv, cos, signed_sin, keys, values, *given):
            keys, values = keys.clone(), values.clone()
            return function(qkv, cos, signed_sin, keys, values, *given), keys, values

        ours, torchs = (functools.partial(call, function) for function in (op, ref))
        return Form(name, {what: ours}, torchs, (qkv, cos, signed_sin, *caches, where, *rest))

    apart = functools.partial(form, what="rope_and_cache", op=rope_op, ref=rope.rope_and_cache_ref)
    fused = functools.partial(
        form, what="rope_decode_attention", op=attention_op, ref=rope_decode_attention.rope_decode_attention_ref,
        tokens=1, dim=head_dim,
    )  # fmt: skip
    middle = torch.tensor([capacity // 2], device=device)
    in_pairs = (None, None, EPS, False, True)
    of_ranks = (*wide_norms, EPS, False, False, 0.5 + torch.rand(batch, 1, 2, device=device))
    return [
        apart("a prompt", tokens=min(50, capacity), where=0, dim=head_dim),
        apart("partial", tokens=1, where=middle, dim=head_dim // 2),
        _with(apart("pairs", tokens=1, where=middle, dim=head_dim), *in_pairs),
        _with(apart("places, norms", tokens=1, where=places, dim=head_dim), *norms, EPS, False),
        _with(apart("norms over all heads", tokens=1, where=middle, dim=head_dim), *wide_norms, EPS, False),
        _with(fused("at the host's place", where=capacity // 2), scale),
        _with(fused("at the device's place", where=middle), scale),
        _with(fused("pairs", where=middle), scale, *[None] * 5, *in_pairs),
        _with(fused("places, norms, window", where=places), scale, None, None, 40, None, None, *norms, EPS, False),
        _with(fused("norms over all heads", where=middle), scale, *[None] * 5, *wide_norms, EPS, False),
        _with(fused("norms over all ranks' heads", where=middle), scale, *[None] * 5, *of_ranks),
    ]


KERNELS = {
    "rope_and_cache": rope.rope_and_cache, "rope_decode_attention": rope_decode_attention.run,
}  # fmt: skip


def _with(form: Form, *rest: Any) -> Form:
    """The form with more operands behind its own."""
    return Form(form.name, form.ours, form.torchs, (*form.args, *rest))


def top_k_forms(batch: int, v: int, dtype: str, device: str, run: Callable = vocab_top_k_kernel.run) -> list[Form]:
    """Of so many logits in 16 bits many are equal: ids say whether the first of them was taken."""
    logits = torch.randn(batch, v, dtype=getattr(torch, dtype), device=device)
    return [
        Form(
            f"k={k}",
            {"vocab_top_k": functools.partial(run, k=k, offset=7)},
            lambda x, k=k: _exact_top_k(x, k, 7),
            (logits,),
        )
        for k in KS
    ]


def _exact_top_k(logits: torch.Tensor, k: int, offset: int) -> list[torch.Tensor]:
    """The definition: sorted stably, larger ones first."""
    values, places = logits.float().sort(dim=-1, descending=True, stable=True)
    return [values[:, :k], places[:, :k] + offset]


def steady(options: Options, device: str = "cuda") -> Iterator[Row]:
    for size in ATTENTIONS:
        yield check_steady(f"attention {of(size)}, lengths growing", attention_calls(*size, device), device)
    for m, n in NORMS:
        yield check_steady(f"rms_norm {m}x{n}", {"rms_norm": functools.partial(_norm_call, m, n, device)}, device)
    for (batch, v), k in itertools.product(TOP_KS, KS):
        makers = {"vocab_top_k": functools.partial(_top_k_call, batch, v, k, device)}
        yield check_steady(f"vocab_top_k {batch}x{v}, k={k}", makers, device)


def attention_calls(
    batch: int, heads: int, kv_heads: int, capacity: int, head_dim: int, device: str, dtype: str = "bfloat16"
) -> dict[str, Callable[[], Call]]:
    """Every candidate of decode_attention, and the launch that makes q, k and v as well: lengths lie on the device."""
    options = {"dtype": getattr(torch, dtype), "device": device}
    shape, scale = (batch, kv_heads, capacity, head_dim), head_dim**-0.5

    def split(config: Any) -> Call:
        q, keys, values = torch.empty(batch, heads, 1, head_dim, **options), *torch.empty(2, *shape, **options)
        lengths = torch.empty(batch, dtype=torch.int64, device=device)

        def draw(seed: int) -> None:
            normal(seed, device, q, keys, values)
            lengths.random_(1, capacity + 1, generator=seeded(seed, device))

        return Call(draw, lambda: decode_attention_launch.run(q, keys, values, scale, lengths=lengths, config=config))

    def fused() -> Call:
        qkv = torch.empty(batch, 1, (heads + 2 * kv_heads) * head_dim, **options)
        keys, values = torch.empty(2, *shape, **options)
        cos, signed_sin = torch.empty(2, batch, 1, 1, head_dim, **options)
        positions = torch.empty(batch, 1, dtype=torch.int64, device=device)

        def draw(seed: int) -> None:
            normal(seed, device, qkv, keys, values, cos, signed_sin)
            positions.random_(0, capacity, generator=seeded(seed, device))

        def run() -> list[torch.Tensor]:
            op = KERNELS["rope_decode_attention"]
            return [op(qkv, cos, signed_sin, keys, values, positions, scale), keys, values]

        return Call(draw, run)

    configs = decode_attention_launch.CANDIDATES["split"]
    every = {label("split", config): functools.partial(split, config) for config in configs}
    return {**every, "rope_decode_attention": fused}


def _norm_call(m: int, n: int, device: str, dtype: str = "bfloat16") -> Call:
    x, residual = torch.empty(2, m, n, dtype=getattr(torch, dtype), device=device)
    weight = torch.empty(n, dtype=x.dtype, device=device)
    return Call(
        lambda seed: normal(seed, device, x, residual, weight), lambda: rms_norm_kernel.run(x, weight, EPS, residual)
    )


def _top_k_call(batch: int, v: int, k: int, device: str, dtype: str = "bfloat16") -> Call:
    logits = torch.empty(batch, v, dtype=getattr(torch, dtype), device=device)
    return Call(lambda seed: normal(seed, device, logits), lambda: vocab_top_k_kernel.run(logits, k))


def normal(seed: int, device: str, *tensors: torch.Tensor) -> None:
    """Fills the tensors."""
    generator = seeded(seed, device)
    for tensor in tensors:
        tensor.normal_(generator=generator)

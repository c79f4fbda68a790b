"""What is compiled without a GPU, and what is claimed of it: for `compile_report` and the compile tests.

To add an op: one line in OPS, its name and a function arch -> cases.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from bench.compile_claims import TENSOR_CORES, Case
from bench.compiled import recording


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _gemm_cases(op: str, stacked: int, arch: int) -> Iterator[Case]:
    """Every candidate, for each size of tile that M makes; one of each kernel for a matrix that no tile divides.

    And in every form, which all differ in the registers that they want: each of prefill, where these are rarest; of the
    other kernels the last one, whose tile is the largest.
    """
    kernels = importlib.import_module(f"tp_runtime.kernels.{op}")
    launched = importlib.import_module("tp_runtime.kernels.gemm_launch").launched
    tokens = {"vector": (1,), "decode": (16, 64, 128), "prefill": (4096,)}
    odd = {"vector": (1, 4090, 4090), "decode": (5, 4090, 4090), "prefill": (1000, 4088, 4088)}
    for kernel, ms in tokens.items():
        sizes: list[tuple] = [(m, 4096, 4096, torch.bfloat16, slice(None), {}) for m in ms]
        sizes.append((*odd[kernel], torch.float16, slice(1), {}))
        some = slice(None) if kernel == "prefill" else slice(-1, None)
        _, *forms = _gemm_forms(ms[-1], 4096, stacked)
        sizes += [(ms[-1], 4096, 4096, torch.bfloat16, some, form) for form in forms]
        for m, n, k, dtype, some, form in sizes:
            configs = [config for name, config in kernels.candidates(m, n, k, dtype) if name == kernel]
            names = [what if isinstance(what, str) else name for name, what in form.items()]
            for config in configs[some]:
                x, w = meta(m, k, dtype=dtype), meta(stacked * n, k, dtype=dtype)
                yield Case(
                    op, kernel, arch, dtype, " ".join((f"M={m} N={n} K={k}", *names)),
                    functools.partial(kernels.run, x, w, **form, kernel=kernel, config=config), config,
                    tensor_cores=_tensor_cores(kernel, config, arch), has_wide_loads=k % 8 == 0,
                    is_specialized=getattr(launched(config, form.get("activation")), "specialize", False),
                    may_spill=k % 8 != 0,
                )  # fmt: skip


def _gemm_forms(m: int, n: int, stacked: int) -> Iterator[dict[str, Any]]:
    """What a GEMM takes besides x and w, in all combinations, of which the first is nothing."""
    bias, residual = meta(stacked * n, dtype=torch.bfloat16), meta(m, n, dtype=torch.bfloat16)
    activations = (None, "silu", "gelu", "gelu_tanh") if stacked == 1 else (None, "gelu", "gelu_tanh")  # None: silu
    for several in itertools.product((None, bias), (None, residual) if stacked == 1 else (None,), activations):
        yield {name: what for name, what in zip(("bias", "residual", "activation"), several) if what is not None}


def _tensor_cores(kernel: str, config: Any, arch: int) -> str:
    """Those of the chip; sm_80's for tiles of less than 64 rows of w, which later ones do not take."""
    if kernel == "vector":
        return ""
    return TENSOR_CORES[arch if config.block_n >= 64 else 80]


def _experts_cases(arch: int) -> Iterator[Case]:
    """Both GEMMs of every candidate: Mixtral's experts at tp 8 for few tokens, Qwen3-30B-A3B's for many; Llama 4's
    layout; widths that are not whole 16 bytes, and of one column. In float32, which is not measured, what runs."""
    kernels = importlib.import_module("tp_runtime.kernels.grouped_gemm")
    launch_of = importlib.import_module("tp_runtime.kernels.grouped_gemm_launch")
    shapes = {  # tokens, experts, choices, I, H, whether input features come first; where the two GEMMs stand
        "decode": ([(16, 8, 2, 1792, 4096, False), (64, 8, 2, 1792, 4096, True), (5, 4, 1, 1, 45, False)], (0, 1)),
        "prefill": (
            [(2048, 128, 8, 768, 2048, False), (2048, 16, 1, 1024, 5120, True), (300, 60, 4, 389, 2048, False)], (1, 2)
        ),
    }  # fmt: skip
    most = {5: 1, 64: 2}  # configurations; else all
    untuned = dict(kernels.UNTUNED[True])
    for kernel, (sizes, places) in shapes.items():
        every = [(torch.bfloat16, *size) for size in sizes] + [(torch.float32, *sizes[0])]
        for dtype, m, e, top_k, n, k, is_transposed in every:
            x, index = meta(m, k, dtype=dtype), meta(m, top_k, dtype=torch.int64)
            shapes_of_w = ((k, 2 * n), (n, k)) if is_transposed else ((2 * n, k), (k, n))
            gate_up, down = (meta(e, *shape, dtype=dtype) for shape in shapes_of_w)
            given = x, index, meta(m, top_k, dtype=dtype), gate_up, down, "silu", is_transposed
            in_16_bits = [c for name, c in kernels.candidates(m, n, k, dtype) if name == kernel]
            configs = in_16_bits if dtype == torch.bfloat16 else [untuned[kernel]]
            taken = [c for c in configs if not launch_of.takes(c, x, index, gate_up, down, is_transposed)]
            for config in taken[: most.get(m)]:
                launch = functools.partial(kernels.run, *given, kernel=kernel, config=config)
                shape = f"T={m} E={e} k={top_k} I={n} H={k}" + is_transposed * " transposed"
                for place, gemm in zip(places, ("gate_up", "down")):
                    yield Case(
                        "grouped_gemm", f"{kernel} {gemm}", arch, dtype, shape, launch, config, place,
                        tensor_cores=_tensor_cores(kernel, config, arch) if dtype == torch.bfloat16 else "",
                        has_wide_loads=n % 8 == 0,
                    )  # fmt: skip


def _attention_cases(arch: int) -> Iterator[Case]:
    """One new token, 32 query heads on 8 key/value heads of 128, as in Llama-3-8B; lengths on the device."""
    kernels = importlib.import_module("tp_runtime.kernels.decode_attention_launch")
    for dtype, most in ((torch.bfloat16, None), (torch.float16, 1)):
        q, keys = meta(1, 32, 1, 128, dtype=dtype), meta(1, 8, 4096, 128, dtype=dtype)
        lengths = meta(1, dtype=torch.int32)
        for config in kernels.CANDIDATES["split"][:most]:
            launch = functools.partial(kernels.run, q, keys, keys, 0.1, lengths=lengths, config=config)
            yield Case(
                "decode_attention", "split", arch, dtype, "B=1 H=32 D=128 S=4096", launch, config,
                tensor_cores=TENSOR_CORES[80], has_wide_loads=True,
            )  # fmt: skip
    yield from _attention_shape_cases(arch)


def _attention_shape_cases(arch: int) -> Iterator[Case]:
    """The other head sizes, each with something that some model asks for; and 4 new tokens of one key/value head."""
    kernels = importlib.import_module("tp_runtime.kernels.decode_attention_launch")
    dtype = torch.bfloat16
    mask, sinks = meta(2, 1, 1, 4096, dtype=torch.bool), meta(8, dtype=dtype)
    several: dict[int, dict] = {
        64: {"sinks": sinks},
        80: {"mask": mask},
        96: {"window": 2047},
        128: {"kv_of_query": (0, 0, 0, 0, 1, 1, 2, 3)},
        256: {"softcap": 50.0, "window": 4096},
    }
    for d, options in several.items():
        q, keys = meta(2, 8, 1, d, dtype=dtype), meta(2, 4, 4096, d, dtype=dtype)
        launch = functools.partial(kernels.run, q, keys, keys, 0.1, **options)
        yield Case(
            "decode_attention", "split", arch, dtype, f"B=2 H=8 D={d} {'+'.join(options)}", launch,
            tensor_cores=TENSOR_CORES[80], has_wide_loads=True,
        )  # fmt: skip
    q, keys = meta(1, 8, 4, 128, dtype=dtype), meta(1, 1, 8192, 128, dtype=dtype)
    launch = functools.partial(kernels.run, q, keys, keys, 0.1)
    yield Case(
        "decode_attention", "split", arch, dtype, "B=1 H=8 S_q=4 D=128", launch,
        tensor_cores=TENSOR_CORES[arch], has_wide_loads=True,
    )  # fmt: skip


def _rope_attention_cases(arch: int) -> Iterator[Case]:
    """As in Llama-3-8B; with the norm of heads, as in Qwen3-8B; of all heads, as in OLMo 2, alone and as a rank; in
    pairs, as in Command R; with a window and its mask, as in Gemma 2; positions on the device."""
    kernels = importlib.import_module("tp_runtime.kernels.decode_attention_launch")
    dtype = torch.bfloat16
    qkv, cos = meta(1, 48, 1, 128, dtype=dtype), meta(1, 1, 1, 128, dtype=dtype)
    keys, place = meta(1, 8, 4096, 128, dtype=dtype), meta(1, dtype=torch.int64)
    window = {"window": 1024, "mask": meta(1, 1, 1, 4096, dtype=torch.bool)}
    for name, of_shape, norm in (*_norms(1, dtype), ("window", "", (None, None, 0.0, False))):
        given = {"lengths": place, "new": kernels.New(cos, cos, *norm), "ahead": 1}
        given |= window if name == "window" else {}
        launch = functools.partial(kernels.run, qkv[:, :32], keys, keys, 0.1, **given)
        yield Case(
            "rope_decode_attention", name, arch, dtype, f"B=1 H=32+8+8 D=128 S=4096{of_shape}", launch,
            tensor_cores=TENSOR_CORES[80], has_wide_loads=True,
        )  # fmt: skip


def _norms(tokens: int, dtype: torch.dtype) -> Iterator[tuple[str, str, tuple]]:
    """Name, what it adds to the shape, and the arguments of rope from q_weight on: 32 query heads, 8 key heads."""
    each, q_weight, k_weight = (meta(heads * 128, dtype=dtype) for heads in (1, 32, 8))
    yield "plain", "", (None, None, 1e-6, False)
    yield "norm", "", (each, each, 1e-6, False)
    yield "pairs", "", (None, None, 1e-6, False, True)
    yield "wide norm", "", (q_weight, k_weight, 1e-6, False)
    means = meta(1, tokens, 2, dtype=torch.float32)
    yield "wide norm", " of 8 ranks", (q_weight, k_weight, 1e-6, False, False, means)


def _row_cases(arch: int) -> Iterator[Case]:
    """RMSNorm with its residual addition."""
    kernels = importlib.import_module("tp_runtime.kernels.rms_norm_kernel")
    dtype = torch.bfloat16
    for m, n in ((1, 4096), (4096, 8192), (33, 70)):
        x, weight = meta(m, n, dtype=dtype), meta(n, dtype=dtype)
        for name, *options in (
            ("plain",), ("residual", x), ("post-norm", x, True, 1.0, weight),
            ("layer norm", x, False, 1.0, None, weight), ("without bias", x, False, 1.0, None, None, True),
            ("x_bias, layer norm", x, False, 1.0, None, weight, False, weight),
        ):  # fmt: skip
            launch = functools.partial(kernels.run, x, weight, 1e-5, *options)
            yield Case("rms_norm", name, arch, dtype, f"M={m} N={n}", launch, has_wide_loads=n > 70)


def _rope_cases(arch: int) -> Iterator[Case]:
    """q and k turned, k and v into the cache, as in Llama-3-8B; in pairs (Command R); with norms (Qwen3-8B, OLMo 2)."""
    kernels = importlib.import_module("tp_runtime.kernels.rope_kernel")
    dtype = torch.bfloat16
    for s in (1, 512):
        qkv, cos = meta(1, s, 48 * 128, dtype=dtype), meta(1, 1, s, 128, dtype=dtype)
        cache, where = meta(1, 8, 4096, 128, dtype=dtype), (meta(1, dtype=torch.int64), 0) if s == 1 else (None, 7)
        for name, of_shape, norm in _norms(s, dtype):
            launch = functools.partial(kernels.run, qkv, cos, cos, cache, cache, *where, *norm)
            yield Case("rope", name, arch, dtype, f"S={s} H=32+8+8 D=128{of_shape}", launch)


def _mean_squares_cases(arch: int) -> Iterator[Case]:
    """All heads of OLMo-2-7B, for a prompt; a rank's part of 13B at tp 8, and of 7B, too little for wide loads."""
    run = importlib.import_module("tp_runtime.kernels.mean_squares_kernel").run
    for m, heads in ((512, 32), (1, 5), (1, 4)):
        x, width = meta(m, 3 * heads * 128, dtype=torch.bfloat16), heads * 128
        launch = functools.partial(run, x, (0, width, width, 2 * width), (8 * width, 8 * width))
        shape, is_wide = f"M={m} H={heads} D=128", heads > 4
        yield Case("mean_squares", "mean_squares", arch, x.dtype, shape, launch, has_wide_loads=is_wide)


def _routing_cases(arch: int) -> Iterator[Case]:
    """The choice of experts, and their slots in order."""
    kernels = importlib.import_module("tp_runtime.kernels.routing_kernels")
    dtype = torch.bfloat16
    for m, e, top_k in ((1, 8, 2), (2048, 128, 8)):
        logits, index = meta(m, e, dtype=dtype), meta(m, top_k, dtype=torch.int64)
        route = functools.partial(kernels.run_route, logits, top_k, "softmax", True, None)
        yield Case("routing", "route", arch, dtype, f"T={m} E={e} k={top_k}", route)
        sort = functools.partial(kernels.run_sort, index, e)
        yield Case("routing", "sort", arch, torch.int64, f"T={m} E={e} k={top_k}", sort)


def _top_k_cases(arch: int) -> Iterator[Case]:
    """The largest logits of a rank's part of Llama-3's vocabulary at tp 8."""
    kernels = importlib.import_module("tp_runtime.kernels.vocab_top_k_kernel")
    for b, k in ((1, 1), (16, 50)):
        logits = meta(b, 16032, dtype=torch.bfloat16)
        yield Case(
            "vocab_top_k",
            "top_k",
            arch,
            logits.dtype,
            f"B={b} V=16032 k={k}",
            functools.partial(kernels.run, logits, k),
        )


def _all_reduce_cases(arch: int) -> Iterator[Case]:
    """8 ranks, one token of Llama-3-70B; and with the norms of other families."""
    kernels = importlib.import_module("tp_runtime.kernels.all_reduce")
    of = importlib.import_module("tp_runtime.kernels.rms_norm").AddNorm
    x, weight = meta(1, 8192, dtype=torch.bfloat16), meta(8192, dtype=torch.bfloat16)
    table, calls = meta(8, dtype=torch.int64), meta(kernels.PROGRAMS, dtype=torch.int32)
    peers = kernels.Peers(table, table, calls, half_bytes=1 << 20, rank=3, size=8)
    launches = {
        "one shot": functools.partial(kernels.all_reduce, x, peers),
        "two shots": functools.partial(kernels.all_reduce, x, peers, two_shot=True),
    }
    follow = {
        "rms_norm": of(weight, 1e-5, x),
        "post-norm": of(weight, 1e-5, x, True, 1.0, weight),
        "x_bias, layer norm": of(weight, 1e-5, x, bias=weight, x_bias=weight),
        "no residual": of(weight, 1e-5),
    }
    launches |= {name: functools.partial(kernels.all_reduce_rms_norm, x, peers, then) for name, then in follow.items()}
    for name, launch in launches.items():
        yield Case("all_reduce", name, arch, x.dtype, "R=8 M=1 N=8192", launch, has_wide_loads=True)


OPS: dict[str, Callable[[int], Iterator[Case]]] = {
    "gemm": functools.partial(_gemm_cases, "gemm", 1),
    "gated_gemm": functools.partial(_gemm_cases, "gated_gemm", 2),
    "grouped_gemm": _experts_cases,
    "decode_attention": _attention_cases,
    "rope_decode_attention": _rope_attention_cases,
    "rms_norm": _row_cases,
    "mean_squares": _mean_squares_cases,
    "rope": _rope_cases,
    "routing": _routing_cases,
    "vocab_top_k": _top_k_cases,
    "all_reduce": _all_reduce_cases,
}


def cases(arch: int, ops: Iterable[str] = tuple(OPS)) -> list[Case]:
    """What is compiled of these ops for `arch`."""
    with recording(arch):  # which configurations make sense depends on the chip
        return [case for op in ops for case in OPS[op](arch)]

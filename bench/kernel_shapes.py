"""The matrices that the layers of known models multiply with, by name: "llama-3-70b gate_up tp8" is 7168 x 8192.

Nothing is written down but the models' sizes: every shape is what the runtime's own plan gives a rank, so uneven cuts
come out as they run. A role is a GEMM of the decoder, its weight [N, K] as one rank holds it:

    qkv, o           attention; the rank's query heads and the key/value heads that they read, in one GEMM
    gate_up, down    a dense FFN, gate and up stacked: N = 2 * I_r; without a gate: up, down
    lm_head          the rank's part of the vocabulary
    experts_gate_up, experts_down    one of the `num_experts` matrices of a MoE layer
    shared_gate_up, shared_down      the expert that every token of a MoE layer takes

Decode attention is none of them: its "matrix" is the cache of one sequence and head, [tokens, head size].
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tp_runtime import preflight
from tp_runtime.plan import Plan, make_plan

_LLAMA_3 = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "dtype": "bfloat16"}
_QWEN_3 = {"vocab_size": 151936, "head_dim": 128, "dtype": "bfloat16"}
MODELS: dict[str, dict] = {
    "llama-3.2-1b": {**_LLAMA_3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                     "num_attention_heads": 32, "tie_word_embeddings": True},
    "llama-3-8b": {**_LLAMA_3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_attention_heads": 32},
    "llama-3-70b": {**_LLAMA_3, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                    "num_attention_heads": 64},
    "mixtral-8x7b": {**_LLAMA_3, "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096,
                     "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                     "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3-8b": {**_QWEN_3, "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
                 "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8},
    "qwen3-32b": {**_QWEN_3, "model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 25600,
                  "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8},
    "qwen3-30b-a3b": {**_QWEN_3, "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
                      "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
                      "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
}  # fmt: skip

# role -> the parameters whose rows are stacked, by the ends of their names
ROLES = {
    "qkv": r"self_attn\.(q|k|v|qkv)_proj\.weight",
    "o": r"self_attn\.o_proj\.weight",
    "gate_up": r"\.(mlp|feed_forward)\.(gate|up|gate_up)_proj\.weight",
    "up": r"\.mlp\.c_fc\.weight",
    "down": r"\.(mlp|feed_forward)\.(down_proj|c_proj)\.weight",
    "experts_gate_up": r"experts\.gate_up_proj",
    "experts_down": r"experts\.down_proj",
    "shared_gate_up": r"shared_expert\.(gate|up)_proj\.weight",
    "shared_down": r"shared_expert\.down_proj\.weight",
    "lm_head": r"lm_head\.weight",
}


@dataclass(frozen=True)
class KernelShape:
    """One GEMM of one rank: y[M, n] = x[M, k] @ w[n, k].T.

    Args:
        model: name in `MODELS`, or what the caller calls the model.
        rank: the first rank that has it; not 0 where a cut is uneven.
        count: how many layers run it.
        num_experts: matrices of this shape in a layer, of which `top_k` serve a token; 0 for a dense layer.
        num_heads, num_kv_heads: of attention; else 0.
    """

    model: str
    role: str
    tp_size: int
    n: int
    k: int
    rank: int = 0
    count: int = 1
    num_experts: int = 0
    top_k: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0

    @property
    def num_weights(self) -> int:
        """Of all its layers."""
        return self.count * max(1, self.num_experts) * self.n * self.k

    @property
    def name(self) -> str:
        """`llama-3-70b gate_up tp8`; where a later rank's part is another, ` rank 3` behind it."""
        return f"{self.model} {self.role} tp{self.tp_size}" + (f" rank {self.rank}" if self.rank else "")


def kernel_shapes(model: str, plan: Plan, top_k: int = 0) -> list[KernelShape]:
    """Every GEMM of every rank of a plan, equal ones once, in the order of the forward pass; empty parts left out."""
    found: dict[tuple, KernelShape] = {}
    for role, pattern in ROLES.items():
        stacked = [p for p in plan.parameters if re.search(f"{pattern}$", p.name)]
        if role == "lm_head" and not stacked:  # tied: the embedding's rows
            stacked = [p for p in plan.parameters if p.style == "embedding_rowwise"]
        for rank in range(plan.tp_size if stacked else 0):
            *experts, n, k = stacked[0].local_shape(rank)
            if experts and stacked[0].style in ("packed_rowwise", "colwise"):  # stored input features first
                n, k = k, n
            n += sum(p.local_shape(rank)[-2] for p in stacked[1:])
            if n and k:
                moe = {"num_experts": experts[0], "top_k": top_k} if experts else {}
                shape = KernelShape(model, role, plan.tp_size, n, k, rank, stacked[0].count, **moe)
                found.setdefault((role, n, k), shape)
    return list(found.values())


CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)  # tokens that a cache has room for


def attention_shapes(model: str | os.PathLike, tp_size: int, dtype: str = "bfloat16") -> list[KernelShape]:
    """The decode attention of every rank of a model (see `model_shapes`), equal ones once."""
    config = config_of(model)
    plan = make_plan(config, tp_size, dtype=dtype)
    found: dict[tuple, KernelShape] = {}
    for rank, heads in enumerate(plan.heads):
        for context in CONTEXTS:
            sizes = {"num_heads": heads.num_heads, "num_kv_heads": heads.num_kv_heads}
            name, layers = os.fspath(model), config["num_hidden_layers"]
            shape = KernelShape(name, "attention", tp_size, context, plan.head_dim, rank, layers, **sizes)
            found.setdefault((context, *sizes.values()), shape)
    return list(found.values())


TOP_KS = (1, 50)  # argmax; what generation configs ask for by default


def top_k_shapes(model: str | os.PathLike, tp_size: int, dtype: str = "bfloat16") -> list[KernelShape]:
    """Each rank's part of a model's vocabulary as N, and as K how many of it sampling asks for."""
    heads = [shape for shape in model_shapes(model, tp_size, dtype) if shape.role == "lm_head"]
    return [replace(head, role="top_k", k=k, count=1) for head in heads for k in TOP_KS]


def model_shapes(model: str | os.PathLike, tp_size: int, dtype: str = "bfloat16") -> list[KernelShape]:
    """The GEMMs of a model of `MODELS`, a checkpoint's folder, a Hub id or a `demo:` name.

    Raises:
        ValueError: there is no such model, or tp_size is out of its range.
    """
    config = config_of(model)
    plan = make_plan(config, tp_size, dtype=dtype)
    return kernel_shapes(os.fspath(model), plan, config.get("num_experts_per_tok") or 0)


def config_of(model: str | os.PathLike) -> Mapping:
    """config.json of a model; see `model_shapes`."""
    name = os.fspath(model)
    return MODELS[name] if name in MODELS else preflight.read_config(preflight.resolve(name, weights=False))


def scaled(model: str, scale: int, num_layers: int) -> dict:
    """The config of a model, `scale` times as narrow, with few layers and hardly a vocabulary.

    Raises:
        ValueError: the width cannot be divided by that.
    """
    config = {**MODELS[model], "num_hidden_layers": num_layers, "vocab_size": 256}
    for key in ("hidden_size", "intermediate_size", "num_attention_heads"):
        if config[key] % scale:
            raise ValueError(f"scale={scale} does not divide {model}'s {key}={config[key]}; choose a power of two")
        config[key] //= scale
    return {**config, "num_key_value_heads": max(1, config["num_key_value_heads"] // scale)}


def shape(name: str) -> KernelShape:
    """The shape of this name, of a model in `MODELS`: `shape("llama-3-70b gate_up tp8")`.

    Raises:
        ValueError: there is none.
    """
    model, _, rest = name.partition(" ")
    tp_size = rest.partition("tp")[2].split(" ")[0]
    known = model_shapes(model, int(tp_size)) if model in MODELS and tp_size.isdecimal() else []
    for candidate in known:
        if candidate.name == name:
            return candidate
    names = [s.name for s in known] or [f"{m} ROLE tpN" for m in MODELS]
    raise ValueError(f"no kernel shape is called {name!r}; there are {', '.join(names)}")


# The shapes whose cuBLAS times are published, and on which the project set itself its target for decode GEMMs.
SKINNY = (
    "llama-3-8b o tp1", "llama-3-8b qkv tp1", "llama-3-8b gate_up tp4", "llama-3-8b down tp2", "llama-3-8b down tp4",
    "llama-3-70b qkv tp2", "llama-3-70b qkv tp4", "llama-3-70b o tp2", "llama-3-70b o tp8", "llama-3-70b gate_up tp8",
    "llama-3-70b down tp4", "llama-3-70b down tp8",
)  # fmt: skip

# Published, not measured by this project: cuBLAS, bf16, one H200, CUDA graph, rotating weights: N, K -> M -> us.
PUBLISHED_SOURCE = "NVIDIA's measured operator database (github.com/ai-dynamo/aiconfigurator, snapshot of 2026-08)"
PUBLISHED_DEVICE = "NVIDIA H200"
PUBLISHED_CUBLAS_US: dict[tuple[int, int], dict[int, float]] = {
    shape: dict(zip((1, 16, 64), times))
    for shape, times in {
        (4096, 4096): (12.6, 12.8, 12.0), (6144, 4096): (16.1, 16.0, 17.8), (7168, 4096): (19.0, 17.9, 20.0),
        (4096, 7168): (19.0, 19.7, 18.0), (4096, 3584): (11.5, 11.7, 10.6), (5120, 8192): (25.2, 25.6, 28.1),
        (2560, 8192): (14.9, 15.1, 16.2), (8192, 4096): (19.1, 19.4, 21.7), (8192, 1024): (7.0, 7.0, 7.7),
        (7168, 8192): (32.0, 33.3, 31.4), (8192, 7168): (30.9, 30.4, 32.5), (8192, 3584): (16.7, 16.9, 19.3),
    }.items()
}  # fmt: skip

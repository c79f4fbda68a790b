"""Tiny random models of every family, as Hugging Face builds them: what a sharded model is compared with.

The shapes are chosen to break what divides by luck: odd FFN and vocabulary, a head size that is not hidden / heads,
head counts that few sizes divide. The weights are drawn so that every layer matters and logits are of size 1: a wrong
head, row or sign moves them by far more than the tolerance.
"""

from __future__ import annotations

import copy
import functools
import threading
from dataclasses import dataclass

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from tp_runtime.models.adapter import FAMILIES, adapter_for

HEADS = ((12, 4), (12, 2), (12, 1), (14, 2), (9, 3))  # query heads, key/value heads
FEW_HEADS = ((12, 1), (14, 2), (9, 3))  # for families whose attention is cut as another's
SIZES = {
    "num_hidden_layers": 2,
    "head_dim": 8,
    "vocab_size": 509,
    "intermediate_size": 389,
    "max_position_embeddings": 64,
}
EXPERT_SIZES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 45, "norm_topk_prob": True},
    "qwen2_moe": {
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 45,
        "shared_expert_intermediate_size": 77,
        "head_dim": 4,
    },
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 45, "head_dim": 4, "eos_token_id": None},
    "granitemoe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 45,
        "embedding_multiplier": 1.5,
        "attention_multiplier": 0.5,
        "residual_multiplier": 0.6,
        "logits_scaling": 0.8,
    },
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size": 45,
        "intermediate_size_mlp": 77,
        "moe_layers": [1],
        "no_rope_layers": [1, 0],
        "attention_chunk_size": 4,
        "floor_scale": 3,
        "attn_scale": 0.5,
        "eos_token_id": None,
    },
}
SPARSE = tuple(EXPERT_SIZES)
_NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}  # those of the real vocabulary
# What dense families have beside sizes, so that it shows in models this small. Windows shorter than the prompt.
DENSE_OPTIONS = {
    "gemma2": {
        "sliding_window": 4,
        "query_pre_attn_scalar": 5,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 1.5,
        "tie_word_embeddings": False,
    },
    "gemma3_text": {
        "sliding_window": 4,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 5,
        "final_logit_softcapping": 1.5,
        "tie_word_embeddings": False,
    },
    "granite": {
        "embedding_multiplier": 1.5,
        "attention_multiplier": 0.5,
        "residual_multiplier": 0.6,
        "logits_scaling": 0.8,
    },
    "starcoder2": {"tie_word_embeddings": False, **_NO_IDS},
    "phi3": {"partial_rotary_factor": 0.5, **_NO_IDS},
    "smollm3": {"no_rope_layers": [1, 0], "tie_word_embeddings": False, **_NO_IDS},
    "olmo2": _NO_IDS,
    "cohere": {"logit_scale": 0.8, "tie_word_embeddings": False, **_NO_IDS},
}
EVERY_SIZE = (1, 2, 3, 4, 5)  # tp_size
# The same as parameters of a test; those that others stand for are `slow`.
SIZES_BY_HASTE = [pytest.param(n, marks=() if n in (1, 3) else pytest.mark.slow) for n in EVERY_SIZE]
TOLERANCE = 2e-5  # of float32 logits; seen: 3e-6

_SLIDING = {"use_sliding_window": True, "sliding_window": 4}
# What a config can ask for beside its sizes: name -> family, heads, options.
VARIANTS: dict[str, tuple[str, tuple[int, int], dict]] = {
    "llama-biased": ("llama", (12, 2), {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", (14, 2), {"tie_word_embeddings": True}),
    "llama-gelu": ("llama", (12, 4), {"hidden_act": "gelu_pytorch_tanh"}),
    "qwen2-tied": ("qwen2", (14, 2), {"tie_word_embeddings": True}),
    "qwen3-biased-tied": ("qwen3", (9, 3), {"attention_bias": True, "tie_word_embeddings": True}),
    "mixtral-400": ("mixtral", (12, 2), {"intermediate_size": 400}),
    "mixtral-tied": ("mixtral", (9, 3), {"tie_word_embeddings": True}),
    "qwen3_moe-dense-first": ("qwen3_moe", (12, 2), {"mlp_only_layers": [0]}),
    "qwen3_moe-sparse-second": ("qwen3_moe", (9, 3), {"decoder_sparse_step": 2, "norm_topk_prob": False}),
    "mistral-sliding": ("mistral", (12, 2), {"sliding_window": 4}),
    "qwen2-sliding": ("qwen2", (9, 3), {**_SLIDING, "max_window_layers": 0}),
    "qwen2-mixed": ("qwen2", (14, 2), {**_SLIDING, "layer_types": ["full_attention", "sliding_attention"]}),
    "qwen3-mixed": ("qwen3", (12, 4), {**_SLIDING, "max_window_layers": 1}),
    "qwen3_moe-sliding": ("qwen3_moe", (12, 1), _SLIDING),
    "mixtral-sliding": ("mixtral", (14, 2), {"sliding_window": 4}),
    "qwen2_moe-dense-first": ("qwen2_moe", (12, 1), {"mlp_only_layers": [0], "norm_topk_prob": True}),
    "qwen2_moe-mixed": ("qwen2_moe", (14, 2), {**_SLIDING, "qkv_bias": False}),
    "olmoe-clipped": ("olmoe", (9, 3), {"clip_qkv": 0.7, "attention_bias": True, "norm_topk_prob": True}),
    "granitemoe-tied": ("granitemoe", (14, 2), {"tie_word_embeddings": True, "attention_bias": True}),
    "llama4_text-sparse": ("llama4_text", (9, 3), {"moe_layers": [0, 1], "num_experts_per_tok": 2}),
    "llama4_text-plain": ("llama4_text", (12, 1), {"use_qk_norm": False, "attn_temperature_tuning": False}),
}
ROPE = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 32},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
}
_LOCAL = {"rope_type": "default", "rope_theta": 100.0}
_LONGROPE = {
    "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]},
    "partial_rotary_factor": 1.0,
    "head_dim": 4,
    "original_max_position_embeddings": 8,  # the prompt has 9
}
VARIANTS |= {
    "gemma2-plain": ("gemma2", (12, 2), {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma2-tied": ("gemma2", (9, 3), {"tie_word_embeddings": True, "attention_bias": True}),
    "gemma3_text-tied": ("gemma3_text", (14, 2), {"tie_word_embeddings": True, "hidden_activation": "silu"}),
    "gemma3_text-ropes": (
        "gemma3_text",
        (9, 3),
        {
            "rope_parameters": {
                "sliding_attention": _LOCAL,
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
            }
        },
    ),
    "granite-tied": ("granite", (9, 3), {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "starcoder2-sliding": ("starcoder2", (9, 3), {"sliding_window": 4, "tie_word_embeddings": True}),
    "starcoder2-unbiased": ("starcoder2", (14, 2), {"use_bias": False, "hidden_act": "relu"}),
    "phi3-sliding": ("phi3", (9, 3), {"sliding_window": 4, "partial_rotary_factor": 1.0}),
    "phi3-tied": ("phi3", (14, 2), {"tie_word_embeddings": True, "hidden_act": "gelu_fast"}),
    "phi3-longrope": ("phi3", (12, 4), _LONGROPE),
    "phi3-longrope-switch": ("phi3", (12, 2), {**_LONGROPE, "original_max_position_embeddings": 11}),
    "smollm3-sliding": ("smollm3", (9, 3), {**_SLIDING, "tie_word_embeddings": True}),
    "cohere-biased": (
        "cohere",
        (14, 2),
        {"attention_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu_fast"},
    ),
    "olmo2-biased": ("olmo2", (9, 3), {"attention_bias": True, "tie_word_embeddings": True}),
}
for _type, _scaling in ROPE.items():
    _rope = {"rope_parameters": {"rope_type": _type, "rope_theta": 10000.0, **_scaling}}
    VARIANTS[f"llama-{_type}"] = (
        "llama",
        (12, 2),
        {**_rope, "max_position_embeddings": 8 if _type == "dynamic" else 64},
    )

_BUILDING = threading.Lock()  # Hugging Face builds a model under a default dtype that all threads share

_HEADS_OF = dict.fromkeys(FAMILIES[:6], HEADS) | dict.fromkeys(DENSE_OPTIONS, FEW_HEADS[2:])
CASES = [f"{family}-{q}/{kv}" for family in FAMILIES for q, kv in _HEADS_OF.get(family, FEW_HEADS)] + [*VARIANTS]


@pytest.fixture(scope="module")
def one_thread():
    """Models this small only lose by more threads; and unsharded models then round as those on ranks do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(
    model_type: str,
    heads: tuple[int, int] = (12, 2),
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options,
) -> PreTrainedModel:
    """A model with random weights, the same for equal arguments up to the rounding to `dtype`.

    Args:
        heads: query heads, key/value heads.
        options: config values, beside or instead of `SIZES`.
    """
    num_heads, num_kv_heads = heads
    sizes = {
        **SIZES,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "hidden_size": 4 * num_heads,
    }
    of_family = {**EXPERT_SIZES, **DENSE_OPTIONS}.get(model_type, {})
    config = CONFIG_MAPPING[model_type](**copy.deepcopy({**sizes, **of_family, **options}))  # it writes into dicts
    with _BUILDING:  # Hugging Face's default experts take no width that is not a multiple of 16 bytes
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager").eval()
    if adapter_for(model_type).attention_softcap:  # transformers 5.17 takes sdpa, which does not cap; `load` does not
        model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            values = 1 + values / 8
        elif values.dim() > 1 and ("embed_tokens" not in name or config.tie_word_embeddings):
            values = values / parameter.shape[-1] ** 0.5
        parameter.data.copy_(values)
    model.generation_config.pad_token_id = 0
    return model


@dataclass(frozen=True)
class Reference:
    """A model that nobody runs (some rotary embeddings remember the longest sequence), and what a copy of it says.

    Args:
        ids: [2, 9].
        logits: of `ids`, [2, 9, V].
        tokens: `ids` and what follows greedily, [2, 13].
    """

    model: PreTrainedModel
    ids: torch.Tensor
    logits: torch.Tensor
    tokens: torch.Tensor

    def copy(self) -> PreTrainedModel:
        """The model of one rank."""
        return copy.deepcopy(self.model)


@functools.cache
def reference(name: str) -> Reference:
    """The unsharded model of a name: a key of `VARIANTS`, or family and heads: `llama-12/4`."""
    if name in VARIANTS:
        model_type, heads, options = VARIANTS[name]
    else:
        model_type, _, text = name.partition("-")
        heads, options = tuple(map(int, text.split("/"))), {}
    model = tiny(model_type, heads, **options)
    return Reference(model, prompt(), *answers(copy.deepcopy(model), prompt()))


def answers(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of `ids`; `ids` with four tokens more, chosen greedily."""
    with torch.no_grad():
        return model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)


def prompt(batch: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    """Random token ids [batch, length] without the padding token 0."""
    return torch.randint(1, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))

"""config.json of a checkpoint, checked: can the model that it describes be built and run? Standard library alone.

A wrong value would otherwise end as the traceback of some rank, as gigabytes of memory, or as wrong text.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint_folder import read_json
from .models.adapter import Adapter, adapter_for

MAX_CONFIG_BYTES = 1_000_000

# What config.json and its rope_parameters may hold, where they hold it: kind, least, most. Kinds are as strict as in
# transformers, which takes no whole number for a decimal one.
INT, FLOAT, NUMBER, BOOL = (int,), (float,), (int, float), (bool,)
WORDS = {
    INT: "a whole number from {} to {}",
    FLOAT: "a decimal number from {} to {}",
    NUMBER: "a number from {} to {}",
    BOOL: "true or false",
}
LIMITS: dict[str, tuple[tuple[type, ...], float, float]] = {
    **dict.fromkeys(("vocab_size", "intermediate_size", "moe_intermediate_size"), (INT, 1, 2**24)),
    **dict.fromkeys(("shared_expert_intermediate_size", "intermediate_size_mlp"), (INT, 1, 2**24)),
    **dict.fromkeys(("hidden_size", "head_dim"), (INT, 1, 2**20)),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), (INT, 1, 2**12)),
    **dict.fromkeys(("num_local_experts", "num_experts_per_tok", "decoder_sparse_step"), (INT, 1, 2**12)),
    **dict.fromkeys(("interleave_moe_layer_step", "no_rope_layer_interval"), (INT, 1, 2**12)),
    **dict.fromkeys(("num_experts", "max_window_layers", "pretraining_tp"), (INT, 0, 2**12)),
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings", "sliding_window"), (INT, 1, 2**32)),
    **dict.fromkeys(("attention_chunk_size", "floor_scale"), (INT, 1, 2**32)),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "attention_multiplier"), (NUMBER, -1e6, 1e6)),
    **dict.fromkeys(("logits_scaling", "clip_qkv"), (NUMBER, 1e-6, 1e6)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), (FLOAT, 1e-6, 1e6)),
    **dict.fromkeys(("query_pre_attn_scalar", "sliding_window_pattern"), (INT, 1, 2**20)),
    "attn_scale": (FLOAT, 0, 1e6),
    "logit_scale": (FLOAT, 1e-6, 1e6),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_epsilon"), (FLOAT, 0, 1)),
    **dict.fromkeys(("initializer_range", "router_jitter_noise"), (FLOAT, 0, 1)),
    **dict.fromkeys(("attention_dropout", "partial_rotary_factor"), (NUMBER, 0, 1)),
    **dict.fromkeys(("rope_theta", "factor", "low_freq_factor", "high_freq_factor"), (NUMBER, 1e-6, 1e15)),
    "rope_local_base_freq": (NUMBER, 1e-6, 1e15),
    **dict.fromkeys(("attention_factor", "beta_fast", "beta_slow"), (NUMBER, 0, 1e6)),
    "router_aux_loss_coef": (FLOAT, 0, 1e6),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"), (BOOL, 0, 1)),
    **dict.fromkeys(("qkv_bias", "use_bias", "use_qk_norm", "attn_temperature_tuning"), (BOOL, 0, 1)),
    **dict.fromkeys(("norm_topk_prob", "output_router_logits", "use_cache"), (BOOL, 0, 1)),
}
MAY_BE_NULL = {
    *("head_dim", "num_key_value_heads", "sliding_window", "attention_dropout", "pretraining_tp", "clip_qkv"),
    *("original_max_position_embeddings", "partial_rotary_factor", "attention_factor", "beta_fast", "beta_slow"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
DTYPES = ("bfloat16", "float16", "float32")
# Hugging Face's name of an activation -> that of `gated_gemm` and `experts`.
FUSED_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
ACTIVATIONS = tuple("gelu gelu_fast gelu_new gelu_pytorch_tanh quick_gelu relu relu2 sigmoid silu swish tanh".split())
ROPE_NEEDS = {  # rope_type -> what it cannot do without
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}


def read_config(path: str | os.PathLike) -> dict:
    """The checked config.json of a checkpoint's folder, as it stands there; of a model that also sees, its text part.

    Raises:
        ValueError: there is none, or `check_config` refuses it.
    """
    folder = Path(path)
    config = read_json(folder, "config.json", MAX_CONFIG_BYTES)
    if config is None:
        raise ValueError(f"{folder} holds no config.json: it is not the folder of a Hugging Face checkpoint")
    config = text_part(config)
    try:
        check_config(config)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    return config


def text_part(config: Mapping) -> dict:
    """The config of the language model alone: `text_config` of one that also sees (llama4), else the config itself."""
    text = config.get("text_config")
    if config.get("model_type") != "llama4" or not isinstance(text, dict):
        return dict(config)
    dtypes = {key: config[key] for key in ("dtype", "torch_dtype") if key in config}
    return {**dtypes, "model_type": "llama4_text", **text}


def check_config(config: Mapping) -> None:
    """Check a config.json.

    Raises:
        ValueError: its family or dtype is not supported, it is quantised, or a value is missing, out of range or at
            odds with another.
    """
    adapter = adapter_for(str(config.get("model_type"))[:80])
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ValueError(f"quantised weights ({method!r:.40}) are not supported yet; take the bf16 or fp16 checkpoint")
    if missing := [key for key in REQUIRED if config.get(key) is None]:
        raise ValueError(f"{missing[0]} is missing; download the file again")
    # Qwen2MoeConfig writes a window of 0 where none is in use.
    no_window = config.get("use_sliding_window") is False and config.get("sliding_window") == 0
    _check_limits({**config, "sliding_window": None} if no_window else config)
    _check_choice(adapter.activation, config.get(adapter.activation, "silu"), ACTIVATIONS)
    _check_choice("dtype", config_dtype(config), DTYPES)
    _check_heads(adapter, config)
    _check_layers(adapter, config)
    _check_rope(adapter, config)
    _check_token_ids(config)


def config_dtype(config: Mapping, otherwise: str = "float32") -> str:
    """The dtype that a config names, under its present key or the one before it; where it names none, `otherwise`."""
    named = [config[key] for key in ("dtype", "torch_dtype") if config.get(key) is not None]
    return str(named[0] if named else otherwise).removeprefix("torch.")


def context_length(config: Mapping) -> int | None:
    """The tokens that the positions of a model reach, None where the config does not say."""
    positions = config.get("max_position_embeddings")
    rope, *of_other_layers = _ropes(config)
    # These three stretch the context of the training; with llama3, and where kinds of layers turn by angles of their
    # own, max_position_embeddings is what was reached by it.
    if positions and not of_other_layers and rope.get("rope_type") in ("linear", "dynamic", "yarn"):
        trained = rope.get("original_max_position_embeddings") or positions
        return max(positions, int(trained * rope["factor"]))
    return positions


def rope_switch(config: Mapping) -> int | None:
    """The longest sequence that longrope turns by its short factors: one that is longer is turned by other angles from
    its first token on. None where positions are encoded otherwise."""
    if _ropes(config)[0]["rope_type"] != "longrope":
        return None
    return adapter_for(config["model_type"]).resolve(config)["original_max_position_embeddings"]


def _check_choice(key: str, value: object, supported: tuple[str, ...]) -> None:
    if value not in supported:
        raise ValueError(f"{key} {value!r:.80} is not supported; supported: {', '.join(supported)}")


def _check_limits(values: Mapping) -> None:
    """Raise ValueError where a value is not of the kind and range that `LIMITS` gives it."""
    for key, (kind, least, most) in LIMITS.items():
        value: Any = values.get(key)
        is_absent = key not in values or (value is None and key in MAY_BE_NULL)
        if not is_absent and not (type(value) in kind and least <= value <= most):
            raise ValueError(f"{key} is {value!r:.80}; it must be {WORDS[kind].format(least, most)}")


def _check_heads(adapter: Adapter, config: Mapping) -> None:
    values = adapter.resolve(config)
    hidden, heads, kv_heads = values["hidden_size"], values["num_attention_heads"], values["num_key_value_heads"]
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
    # These config classes of transformers demand it, the others do not.
    if adapter.model_type in ("llama", "gemma2", "gemma3_text") and hidden % heads:
        raise ValueError(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}")
    width = heads * values["head_dim"]
    if adapter.model_type == "olmoe" and width != hidden:  # transformers normalises over hidden_size
        raise ValueError(
            f"num_attention_heads={heads} of head_dim={values['head_dim']} are {width} wide, the norm of all heads "
            f"hidden_size={hidden}; they must be equal"
        )
    if values["head_dim"] < 2 or values["head_dim"] % 2:
        raise ValueError(f"head_dim={values['head_dim']} is not even and positive; rotary embedding turns pairs")


def _check_layers(adapter: Adapter, config: Mapping) -> None:
    """What is said of single layers, and of the experts."""
    num_layers, types = config["num_hidden_layers"], config.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != num_layers:
            raise ValueError(f"layer_types {types!r:.80} is not a list of num_hidden_layers={num_layers} names")
        for name in types:
            _check_choice("layer type", name, adapter.layer_types)
    window = config.get("sliding_window", default := adapter.defaults.get("sliding_window"))
    if window is None and "sliding_attention" in (types or (["sliding_attention"] if default else [])):
        raise ValueError("some layers attend within a sliding window, but sliding_window is not given")
    for key in adapter.refused:
        if config.get(key):
            raise ValueError(f"{key} is not supported in models of type {adapter.model_type}; take one without")
    if config.get("use_bidirectional_attention"):
        raise ValueError(
            "use_bidirectional_attention makes this an encoder; models that see what follows do not generate"
        )
    for key in ("mlp_only_layers", "moe_layers", "no_rope_layers"):
        listed = config.get(key)
        if listed is not None and not (isinstance(listed, list) and all(type(layer) is int for layer in listed)):
            raise ValueError(f"{key} {listed!r:.80} is not a list of whole numbers")
    if adapter.flag("no_rope_layers", {}) and len(config.get("no_rope_layers") or range(num_layers)) < num_layers:
        raise ValueError(f"no_rope_layers {config['no_rope_layers']!r:.80} says nothing of some of {num_layers} layers")
    num_experts, chosen = adapter.letters(config).get("experts"), config.get("num_experts_per_tok")
    if num_experts:
        _check_choice("hidden_act of experts", config.get("hidden_act", "silu"), tuple(FUSED_ACTIVATIONS))
        if chosen and chosen > num_experts:
            raise ValueError(f"num_experts_per_tok={chosen} exceeds the {num_experts} experts")


def _ropes(config: Mapping) -> list[dict]:
    """How positions are encoded, under the present keys; older configs say `rope_scaling` and `type`. Of a model whose
    kinds of layers turn by angles of their own, one for each kind."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters {rope!r:.80} is not an object")
    kinds = [of_kind for of_kind in rope.values() if isinstance(of_kind, dict)] or [rope]
    return [{"rope_type": of_kind.get("type") or "default", **of_kind} for of_kind in kinds]


def _check_rope(adapter: Adapter, config: Mapping) -> None:
    for rope in _ropes(config):
        _check_choice("rope_type", rope["rope_type"], adapter.rope_types)
        if missing := [key for key in ROPE_NEEDS[rope["rope_type"]] if rope.get(key) is None]:
            raise ValueError(f"rope_type {rope['rope_type']!r} needs {missing[0]}, which the config does not give")
        _check_limits(rope)
        if rope["rope_type"] == "longrope":
            _check_factors({**adapter.resolve(config), **rope})


def _check_factors(values: Mapping) -> None:
    """Of longrope: a factor for each pair of elements that is turned."""
    size = int(values["head_dim"] * (values.get("partial_rotary_factor") or 1.0)) // 2
    for key in ("short_factor", "long_factor"):
        factors = values[key]
        if not isinstance(factors, list) or not all(type(f) in NUMBER and 1e-6 <= f <= 1e15 for f in factors):
            raise ValueError(f"{key} {factors!r:.80} is not a list of positive numbers")
        if len(factors) != size:
            raise ValueError(f"{key} lists {len(factors)} factors, the rotary embedding turns {size} pairs of elements")


def _check_token_ids(config: Mapping) -> None:
    vocab_size = config["vocab_size"]
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key)
        ids = value if isinstance(value, list) and key == "eos_token_id" else [] if value is None else [value]
        # Old Llama configs pad with -1, which Python and torch count from the end.
        if not all(type(i) is int and -vocab_size <= i < vocab_size for i in ids):
            raise ValueError(f"{key} is {value!r:.80}; it must lie in the vocabulary of {vocab_size}")

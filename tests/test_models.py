"""The tables of `models/` against the live Hugging Face classes: names, shapes, presence, names on disk."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tp_runtime.loading import import_model_code
from tp_runtime.models.adapter import FAMILIES, adapter_for
from tp_runtime.preflight import check_checkpoint, check_config

TINY = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VARIANTS = [
    {},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"tie_word_embeddings": True},
    {"num_key_value_heads": 1},
    {"num_key_value_heads": 2, "head_dim": 8},
]
CASES = [(family, variant) for family in FAMILIES for variant in VARIANTS]
CASES.remove(("olmoe", {"num_key_value_heads": 2, "head_dim": 8}))  # its norms are hidden_size wide
CASES += [(family, {"mlp_only_layers": [0]}) for family in ("qwen3_moe", "qwen2_moe")]
CASES += [(family, {"decoder_sparse_step": 2}) for family in ("qwen3_moe", "qwen2_moe")]
CASES += [("qwen2_moe", {"qkv_bias": False}), ("qwen2_moe", {"shared_expert_intermediate_size": 24})]
CASES += [("llama4_text", {"moe_layers": [2]}), ("llama4_text", {"moe_layers": []}), ("llama4_text", {"head_dim": 8})]
CASES += [("llama4_text", {"interleave_moe_layer_step": 2}), ("llama4_text", {"intermediate_size_mlp": 40})]
CASES += [("starcoder2", {"use_bias": False}), ("phi3", {"partial_rotary_factor": 0.5})]
# Keys of other families, which transformers keeps in the config and does not read.
CASES += [("llama", {"num_experts": 4})]
CASES += [("mixtral", {"mlp_only_layers": [0]}), ("mixtral", {"moe_intermediate_size": 8})]
# What config.json may leave out: removed from a config, the class's own default holds.
OPTIONAL = (
    *("num_key_value_heads", "head_dim", "num_local_experts", "num_experts", "moe_intermediate_size"),
    *("attention_bias", "mlp_bias", "tie_word_embeddings", "decoder_sparse_step", "mlp_only_layers"),
    *(
        "shared_expert_intermediate_size",
        "intermediate_size_mlp",
        "qkv_bias",
        "interleave_moe_layer_step",
        "moe_layers",
    ),
    *("use_bias", "sliding_window", "layer_types"),
)


def live_shapes(config) -> dict[str, tuple[int, ...]]:
    """Every parameter of transformers' causal-LM class for this config, built on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def table_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """The same from the table of the family."""
    parameters = adapter_for(config["model_type"]).parameters(config)
    return {name: parameter.shape for parameter in parameters for name in parameter.names()}


@pytest.mark.parametrize("family, variant", CASES, ids=[" ".join([family, *variant]) for family, variant in CASES])
def test_tables_equal_the_live_parameters(family, variant):
    """Catches a weight that a table lacks, has too many, or shapes otherwise, under any flag, and a config that
    `check_config` refuses though transformers wrote it."""
    config = CONFIG_MAPPING[family](**{**TINY, **variant})
    live = live_shapes(config)
    for written in (config.to_dict(), config.to_diff_dict()):
        check_config(written)
        assert table_shapes(written) == live


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_the_config_class(family):
    """Catches a default in a table that is not the config class's: published configs leave values out."""
    sizes = {**TINY, "num_attention_heads": 32}  # a multiple of every default number of key/value heads
    config = CONFIG_MAPPING[family](**sizes)
    short = {key: value for key, value in config.to_dict().items() if key not in OPTIONAL}
    check_config(short)
    assert table_shapes(short) == live_shapes(CONFIG_MAPPING[family].from_dict(dict(short)))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_is_read_whole(family, tmp_path):
    """Catches names on disk that differ from the live ones and that a table does not know: weights would be missing."""
    config = CONFIG_MAPPING[family](**TINY, dtype="bfloat16")
    if hasattr(config, "num_experts_per_tok"):
        config.num_experts, config.num_local_experts, config.num_experts_per_tok = 4, 4, 2
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    checkpoint = check_checkpoint(tmp_path)
    assert (checkpoint.unused, checkpoint.dtype, checkpoint.model_type) == ((), "bfloat16", family)
    assert len({entry.file for entry in checkpoint.tensors.values()}) > 1
    assert sum(entry.stop - entry.start for entry in checkpoint.tensors.values()) == 2 * model.num_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_code_is_where_its_table_says(family):
    """Catches a launcher that imports a module of transformers that is not there: llama4_text lies in llama4."""
    import_model_code(family)
    module = AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[family]].__module__
    assert module.split(".")[-2] == (adapter_for(family).module or family)


def test_an_unsupported_family_is_answered_with_the_supported():
    with pytest.raises(ValueError, match="'gpt2' is not supported; supported: llama, mistral, mixtral, qwen2, qwen3, "):
        adapter_for("gpt2")

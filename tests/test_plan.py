"""The plan against its three rules, restated here in the plainest form, over families, head counts and odd widths."""

import json
import math
import random
import subprocess
import sys

import pytest

from tp_runtime.plan import ITEM_BYTES, Plan, cut, cut_heads, make_plan

HEADS = [(12, 4), (12, 2), (12, 1), (14, 2), (9, 3), (8, 4), (64, 8), (5, 5), (1, 1), (40, 8)]

TINY = {
    "model_type": "llama", "vocab_size": 509, "hidden_size": 96, "intermediate_size": 389, "num_hidden_layers": 2,
    "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 8, "torch_dtype": "float32",
}  # fmt: skip
MIXTRAL = {**TINY, "model_type": "mixtral", "intermediate_size": 400, "num_local_experts": 3, "num_experts_per_tok": 2}
QWEN3_MOE = {**MIXTRAL, "model_type": "qwen3_moe", "moe_intermediate_size": 40, "mlp_only_layers": [0]}
LLAMA4 = {**MIXTRAL, "model_type": "llama4_text", "num_experts_per_tok": 1, "intermediate_size_mlp": 211}
FAMILIES = [
    TINY,
    {**TINY, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    {**TINY, "model_type": "mistral"},
    {**TINY, "model_type": "qwen2"},
    {**TINY, "model_type": "qwen3"},
    MIXTRAL,
    {**MIXTRAL, "intermediate_size": 389},
    QWEN3_MOE,
    {**QWEN3_MOE, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 203},
    {**MIXTRAL, "model_type": "olmoe", "hidden_size": 96, "head_dim": 8},
    {**MIXTRAL, "model_type": "granitemoe"},
    {**LLAMA4, "interleave_moe_layer_step": 2},
    *({**TINY, "model_type": family} for family in ("gemma2", "starcoder2", "phi3", "olmo2", "cohere")),
]

LLAMA_70B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "torch_dtype": "bfloat16",
}  # fmt: skip


def indices(ranges) -> list[int]:
    return [i for start, stop in ranges for i in range(start, stop)]


# -- rule 1 and 2: heads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_heads, num_kv_heads", HEADS)
def test_heads(num_heads, num_kv_heads):
    """Catches a query head on no rank or on two, uneven parts, a key/value head missing or held idly, a wrong map."""
    group = num_heads // num_kv_heads
    for tp_size in range(1, num_heads + 1):
        heads = cut_heads(num_heads, num_kv_heads, tp_size)
        assert [q for h in heads for q in range(*h.query)] == list(range(num_heads))
        counts = [h.num_heads for h in heads]
        assert min(counts) >= 1 and max(counts) - min(counts) <= 1
        for h in heads:
            read = [q // group for q in range(*h.query)]  # Hugging Face's repeat_kv
            assert list(range(*h.kv)) == sorted(set(read)) and h.num_kv_heads == len(set(read))
            assert [h.kv[0] + local for local in h.kv_of_query] == read


# -- rule 3: widths ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1, 4, 8])
def test_cut_is_even_in_units(unit):
    """Catches a part off the 16-byte boundary, a part more than one unit larger than another, and a lost remainder."""
    for length in (0, 1, 3, 7, 8, 9, 40, 389, 400, 509, 1000):
        for parts in range(1, 20):
            ranges = cut(length, parts, unit)
            assert len(ranges) == parts and indices(ranges) == list(range(length))
            assert all(start % unit == 0 or start == length for start, _ in ranges)
            units = [-(-(stop - start) // unit) for start, stop in ranges]
            assert max(units) - min(units) <= 1 and units == sorted(units, reverse=True)


def test_cut_gives_ranks_without_a_unit_nothing():
    """Catches an error, or a division of a unit, where there are fewer 16-byte units than ranks."""
    assert cut(10, 4, unit=8) == ((0, 8), (8, 10), (10, 10), (10, 10))
    plan = make_plan({**TINY, "vocab_size": 5, "intermediate_size": 17}, 12, dtype="bfloat16")
    down_proj = plan.parameter("model.layers.0.mlp.down_proj.weight")
    assert [down_proj.local_shape(rank)[1] for rank in range(12)] == [8, 8, 1] + [0] * 9
    assert plan.parameter("lm_head.weight").local_shape(11) == (0, 96)


# -- whole plans ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c["model_type"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_parameter_is_covered(config, dtype):
    """Catches an index on no rank, one on two ranks (those of key/value heads may be), and parts off the boundary."""
    unit = 16 // ITEM_BYTES[dtype]
    for tp_size in range(1, 13):
        plan = make_plan(config, tp_size, dtype=dtype)
        for p in plan.parameters:
            held = [indices(ranges) for ranges in p.ranges]
            assert len(held) == tp_size
            if p.dim is None:
                assert held == [list(range(p.shape[0]))] * tp_size
                continue
            size = p.shape[p.dim]
            is_kv = any(f".{module}." in p.name for module in ("k_proj", "v_proj", "k_norm", "qkv_proj"))
            everyone = [i for part in held for i in part]
            assert sorted(set(everyone)) == list(range(size)), p.name
            assert is_kv or len(everyone) == size, p.name
            for rank, ranges in enumerate(p.ranges):
                shape = list(p.shape)
                shape[p.dim] = len(held[rank])
                assert p.local_shape(rank) == tuple(shape)
                is_in_heads = is_kv or any(f".{module}." in p.name for module in ("q_proj", "q_norm", "o_proj"))
                if not is_in_heads and not p.style.startswith("packed"):
                    assert all(start % unit == 0 or start == stop for start, stop in ranges), p.name


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c["model_type"])
def test_outputs_of_a_column_cut_are_inputs_of_the_row_cut(config):
    """Catches a rank that computes features that its row-parallel weight does not take: a wrong sum, not an error."""
    for tp_size in (1, 2, 3, 5, 8, 12):
        plan = make_plan(config, tp_size)
        for p in plan.parameters:
            into = {"gate_proj": "down_proj", "up_proj": "down_proj", "q_proj": "o_proj", "c_fc": "c_proj"}
            module = p.name.split(".")[-2]
            if module in into:
                after = p.name.rsplit(".", 2)[0] + f".{into[module]}.weight"
                assert p.ranges == next(o.ranges for o in plan.parameters if o.name == after)
            experts = "experts." if "experts" in p.name else ""
            if p.name.endswith("qkv_proj.weight"):
                first = 8 * 12, 8 * (12 + 4)  # of the keys and the values: 12 query heads, 4 key/value heads of 8
                for packed, heads in zip(p.ranges, plan.heads):
                    q, (start, stop) = tuple(8 * i for i in heads.query), (8 * i for i in heads.kv)
                    assert packed == (q, *((offset + start, offset + stop) for offset in first))
            elif p.style.startswith("packed"):
                down = next(o for o in plan.parameters if f".{experts}down_proj" in o.name)
                width = down.shape[down.dim]
                for packed, (own,) in zip(p.ranges, down.ranges):
                    assert packed == (own, (own[0] + width, own[1] + width))
        if "lm_head.weight" in plan.names():
            assert plan.parameter("lm_head.weight").ranges == plan.parameter("model.embed_tokens.weight").ranges


def test_random_configs():
    """Catches what no case above thought of: 200 seeded configs, each parameter covered, all bytes right."""
    rng = random.Random(0)
    for _ in range(200):
        kv_heads, group = rng.randint(1, 6), rng.randint(1, 6)
        config = {
            **rng.choice(FAMILIES),
            "vocab_size": rng.randint(1, 600), "hidden_size": 2 * kv_heads * group * rng.randint(1, 4),
            "intermediate_size": rng.randint(1, 500), "moe_intermediate_size": rng.randint(1, 100),
            "num_attention_heads": kv_heads * group, "num_key_value_heads": kv_heads,
            "head_dim": 2 * rng.randint(1, 9),
        }  # fmt: skip
        if config["model_type"] in ("olmoe", "gemma2"):  # they ask for it, or for whole heads in it
            config["hidden_size"] = config["num_attention_heads"] * config["head_dim"]
        dtype = rng.choice(list(ITEM_BYTES))
        tp_size = rng.randint(1, kv_heads * group)
        plan = make_plan(config, tp_size, dtype=dtype)
        expected = [0] * tp_size
        for p in plan.parameters:
            dim = p.dim or 0
            assert set(range(p.shape[dim])) == {i for ranges in p.ranges for i in indices(ranges)}
            for rank, ranges in enumerate(p.ranges):
                others = math.prod(p.shape) // p.shape[dim]
                expected[rank] += p.count * others * len(indices(ranges)) * ITEM_BYTES[dtype]
        assert [plan.weight_bytes(rank) for rank in range(tp_size)] == expected
        assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("tp_size, gigabytes", [(2, 70.5), (4, 35.3), (8, 17.6)])
def test_known_bytes_of_llama_70b(tp_size, gigabytes):
    """Catches a plan that forgets or doubles a weight: 70B in bf16 is known to take 70.5, 35.3 and 17.6 GB a GPU."""
    plan = make_plan(LLAMA_70B, tp_size)
    assert plan.dtype == "bfloat16"
    for rank in range(tp_size):
        assert plan.weight_bytes(rank) / 1e9 == pytest.approx(gigabytes, abs=0.06)
        # 8 KV heads of 128 in 80 layers, keys and values: 327 680 bytes a token on one GPU
        assert plan.kv_cache_bytes_per_token(rank) == 327_680 // tp_size


def test_known_size_of_llama_70b():
    """Catches any missing element: the model has 70 553 706 496 parameters."""
    assert make_plan(LLAMA_70B, 1).weight_bytes(0) == 2 * 70_553_706_496


def test_collectives():
    """Catches a missing or a third all-reduce in a layer, wrong bytes, and collectives of a single rank."""
    assert make_plan(LLAMA_70B, 1).collectives == ()
    embedding, o_proj, down_proj, head = make_plan(LLAMA_70B, 8).collectives
    assert (embedding.name, embedding.op, embedding.layers) == ("model.embed_tokens", "all_reduce", ())
    assert (o_proj.name, o_proj.op) == ("model.layers.*.self_attn.o_proj", "all_reduce")
    assert o_proj.layers == down_proj.layers == tuple(range(80))
    assert embedding.bytes_per_token == o_proj.bytes_per_token == down_proj.bytes_per_token == 8192 * 2
    assert (head.op, head.bytes_per_token) == ("all_gather", 128256 * 2)
    names = [c.name for c in make_plan(QWEN3_MOE, 2).collectives if c.layers == (1,)]
    assert names == ["model.layers.*.mlp.experts.down_proj"]  # layer 0 is dense
    qwen2_moe, olmoe, _, llama4 = (make_plan(config, 2) for config in FAMILIES[-9:-5])
    for plan, block in (qwen2_moe, "mlp"), (llama4, "feed_forward"):
        (merged,) = (c for c in plan.collectives if "expert" in c.name)
        assert merged.name == f"model.layers.*.{block}.experts.down_proj + shared_expert.down_proj"
        assert (merged.layers, merged.bytes_per_token) == ((1,), 96 * 4)
    names = [c.name for c in make_plan(FAMILIES[-4], 2).collectives if c.layers]  # starcoder2
    assert names == ["model.layers.*.self_attn.o_proj", "model.layers.*.mlp.c_proj"]
    (both,) = (c for c in make_plan(FAMILIES[-1], 2).collectives if c.layers)  # cohere
    assert (both.name, both.layers) == ("model.layers.*.self_attn.o_proj + mlp.down_proj", (0, 1))
    assert (both.op, both.bytes_per_token) == ("all_reduce", 96 * 4)
    (norms,) = (c for c in olmoe.collectives if "norm" in c.name)
    assert (norms.name, norms.bytes_per_token) == ("model.layers.*.self_attn.q_norm + k_norm", 8)


def test_parameter_by_name():
    """Catches layer 11 taken for layer 1, and a wrong name that yields another parameter."""
    plan = make_plan({**TINY, "num_hidden_layers": 12}, 2)
    assert plan.parameter("model.layers.11.mlp.up_proj.weight").shape == (389, 96)
    assert len(plan.names()) == len(set(plan.names())) == 3 + 12 * 9
    with pytest.raises(ValueError, match="llama plan has no parameter 'model.layers.12.mlp.up_proj.weight'"):
        plan.parameter("model.layers.12.mlp.up_proj.weight")


# -- where a plan comes from ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c["model_type"])
def test_json_round_trip(config):
    """Catches lists where tuples were: the plan would be unequal, or unhashable where it is a key."""
    plan = make_plan(config, 3)
    again = Plan.from_json(json.dumps(json.loads(plan.to_json())))
    assert again == plan and hash(again.parameters) == hash(plan.parameters)


@pytest.mark.parametrize("text", ["", "{}", "[]", "3", '{"tp_size": 2}', '{"heads": [1], "parameters": []}'])
def test_what_is_no_plan_is_refused(text):
    """Catches a traceback for a file that holds something else."""
    with pytest.raises(ValueError, match=r"not a plan written by Plan.to_json"):
        Plan.from_json(text)


def test_sources_of_a_plan_agree(tmp_path):
    """Catches a folder, a dict and Hugging Face's config object that give different plans."""
    from transformers import LlamaConfig

    (tmp_path / "config.json").write_text(json.dumps(TINY))
    hf_config = LlamaConfig(**{**TINY, "torch_dtype": None, "dtype": "float32"})
    plan = make_plan(TINY, 5)
    assert make_plan(tmp_path, 5) == make_plan(str(tmp_path), 5) == make_plan(hf_config, 5) == plan
    assert make_plan(hf_config, 5, dtype="bfloat16").dtype == "bfloat16"


@pytest.mark.parametrize("name", ["demo:llama", "demo:mixtral"])
def test_demo_by_name(name):
    """Catches a demo that cannot be planned for up to its 8 query heads."""
    for tp_size in range(1, 9):
        plan = make_plan(name, tp_size)
        assert (plan.model_type, plan.tp_size, plan.dtype) == (name.removeprefix("demo:"), tp_size, "bfloat16")


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"])
def test_parameters_are_those_of_the_live_model(family):
    """Catches an adapter that Hugging Face's class has outgrown: other names or shapes than the model's own."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    sizes = {k: v for k, v in QWEN3_MOE.items() if k not in ("model_type", "torch_dtype", "num_local_experts")}
    config = CONFIG_MAPPING[family](**sizes, **({"num_local_experts": 3} if family == "mixtral" else {}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    plan = make_plan(config, 3)
    assert {name: plan.parameter(name).shape for name in plan.names()} == {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("tp_size", [0, -1, 13, 2.0, "2", True])
def test_impossible_tp_size(tp_size):
    """Catches a plan with empty or fractional ranks; the message names the size and the valid ones."""
    with pytest.raises(ValueError, match=rf"tp_size={tp_size!r}.* choose 1 to 12"):
        make_plan(TINY, tp_size)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, "model type 'gpt2' is not supported; supported: llama, mistral"),
        ({"model_type": None}, "model type 'None' is not supported"),
        ({"num_attention_heads": None}, "num_attention_heads is missing"),
        ({"num_key_value_heads": 5}, "num_attention_heads=12 is not a multiple of num_key_value_heads=5"),
        ({"torch_dtype": "int8"}, "dtype 'int8' is not supported"),
    ],
)
def test_senseless_config(change, message):
    """Catches a KeyError, or heads that are silently lost, where the config of a dict was not checked."""
    with pytest.raises(ValueError, match=message):
        make_plan({**TINY, **change}, 2)


def test_unknown_dtype():
    """Catches a plan in a dtype whose size nobody knows."""
    with pytest.raises(ValueError, match="dtype 'float8' is not supported; choose one of float32, bfloat16, float16"):
        make_plan(TINY, 2, dtype="float8")


def test_planning_imports_no_torch(tmp_path):
    """Catches `--plan` waiting for torch or transformers."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    program = (
        "import sys; from tp_runtime import make_plan; from tp_runtime.report import plan_table;"
        "plan_table(make_plan(sys.argv[1], 3)); print(*({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", program, str(tmp_path)], text=True).strip() == ""

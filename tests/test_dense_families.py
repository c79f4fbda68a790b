"""What dense families have beside Llama: rounding of norms and embeddings, capped and scaled logits, configs, refusals.

Logits, tokens and unpatching of every family: test_patching.py, test_loading.py and test_torch_compile.py.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
from generation_modes import MODES
from tiny_models import DENSE_OPTIONS, SIZES, TOLERANCE, answers, one_thread, prompt, reference, tiny  # noqa: F401 (a fixture)
from transformers import CONFIG_MAPPING
from transformers.models.cohere import modeling_cohere

import tp_runtime
from tp_runtime.attention import WideRMSNorm
from tp_runtime.comm import NullCommunicator
from tp_runtime.config import GenerationOptions, RuntimeConfig
from tp_runtime.engine import Engine
from tp_runtime.plan import make_plan
from tp_runtime.preflight import check_config
from tp_runtime.report import plan_table

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = [f"{family}-9/3" for family in DENSE_OPTIONS]


@pytest.mark.halved
@pytest.mark.parametrize("mode", ["left-padded batch", "static cache"])
@pytest.mark.parametrize("name", [*NAMES, "starcoder2-sliding", "smollm3-sliding"])
def test_generate_gives_the_unpatched_models_tokens(name, mode):
    """Catches padding that is attended to, and a cache or a window that a family's layers do not fit."""
    (want,) = MODES[mode](reference(name).copy(), None)

    def run(comm):
        model = reference(name).copy()
        tp_runtime.patch(model, comm)
        return MODES[mode](model, None)

    for (tokens,) in tp_runtime.run_local(run, 5):
        assert torch.equal(tokens, want)


@pytest.mark.parametrize("name", [*NAMES, "phi3-sliding"])
def test_the_engine_says_what_generate_says(name):
    """Catches logits that only Hugging Face's forward pass scales, and a cache of ours that windows do not fit."""
    whole, longer, shorter = reference(name), prompt(1, 11)[0].tolist(), prompt(1, 6, seed=3)[0].tolist()
    ids = torch.tensor([longer, [0] * 5 + shorter])
    mask = (torch.arange(11) >= torch.tensor([[0], [5]])).long()
    want = whole.copy().generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)

    def run(comm):
        model = whole.copy()
        tp_runtime.patch(model, comm)
        engine = Engine(model, None, {**model.config.to_dict(), "eos_token_id": None}, {})
        options = GenerationOptions(max_new_tokens=8, do_sample=False)
        return [c.tokens for c in engine.generate(["", ""], [longer, shorter], options)[0]]

    for tokens in tp_runtime.run_local(run, 3):
        assert tokens == want[:, 11:].tolist()


@pytest.mark.parametrize("name", ["gemma2-9/3", "gemma2-plain", "gemma3_text-tied", "granite-9/3", "cohere-9/3"])
def test_logits_of_a_shard_are_the_models(name):
    """Catches logits that the engine samples from uncapped: the same token when greedy, others when not."""
    model, ids = reference(name).copy(), prompt()
    tp_runtime.patch(model)
    with torch.no_grad():
        hidden, logits = model.model(ids).last_hidden_state, model(ids).logits
        torch.testing.assert_close(model.lm_head.logits_shard_v(hidden), logits, rtol=0, atol=0)


@pytest.mark.parametrize("overlap", ["lanes", "columns"])
@pytest.mark.parametrize("name", NAMES)
def test_overlapped_is_the_same(name, overlap):
    """Catches a feed-forward block, a norm over all ranks or an angle that a schedule of the all-reduces forgets."""
    whole = reference(name)

    def run(comm):
        model = whole.copy()
        tp_runtime.patch(model, comm, config=RuntimeConfig(overlap=overlap))
        return answers(model, whole.ids)

    for logits, tokens in tp_runtime.run_local(run, 2):
        assert (logits - whole.logits).abs().max() <= TOLERANCE and torch.equal(tokens, whole.tokens)


class Counting(NullCommunicator):
    """Keeps account of the collectives and their bytes of result."""

    def __init__(self):
        super().__init__(1, 3)
        self.sent: list[tuple[str, int]] = []

    def all_reduce(self, x):
        self.sent.append(("all_reduce", x.nbytes))
        return super().all_reduce(x)

    def all_gather(self, x, lengths):
        self.sent.append(("all_gather", x.nbytes // x.shape[-1] * sum(lengths)))
        return super().all_gather(x, lengths)


@pytest.mark.parametrize("name", NAMES)
def test_the_collectives_are_those_of_the_plan(name):
    """Catches a plan that leaves out the projection of a block with other names, or the norm over all heads."""
    model, comm, num_tokens = reference(name).copy(), Counting(), 18
    tp_runtime.patch(model, comm)
    comm.sent.clear()
    model(prompt(), use_cache=False)
    plan = make_plan(model.config, 3)
    planned = [(c.op, c.bytes_per_token * num_tokens) for c in plan.collectives for _ in (c.layers or (0,))]
    assert sorted(comm.sent) == sorted(planned)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2", "cohere"])
def test_norms_and_embeddings_round_as_hugging_faces(family):
    """Catches 1 + weight rounded to 16 bits, a weight behind the rounding, a scale that is not rounded before it."""
    theirs = tiny(family, (9, 3), dtype=torch.bfloat16, hidden_size=45)  # whose root 16 bits do not hold
    ours, ids = copy.deepcopy(theirs), prompt(4, 30)
    tp_runtime.patch(ours)
    x = torch.randn(4, 30, 72, generator=torch.Generator().manual_seed(4)).bfloat16()
    with torch.no_grad():
        assert torch.equal(ours.model.embed_tokens(ids), theirs.model.embed_tokens(ids))
        norms = [path for path, _ in theirs.named_modules() if path.endswith("norm")]
        assert len(norms) >= (3 if family == "cohere" else 9)
        for path in norms:
            our_norm, their_norm = ours.get_submodule(path), theirs.get_submodule(path)
            part = x[..., : their_norm.weight.numel()]
            is_wide = isinstance(our_norm, WideRMSNorm)
            got = our_norm(part, part.float().square().mean(-1, keepdim=True)) if is_wide else our_norm(part)
            different = (got != their_norm(part)).float().mean()
            assert got.dtype == torch.bfloat16 and different < 1e-3, path  # sums of squares in another order


@pytest.mark.parametrize("tp_size", [2, 3, 5])
def test_a_parallel_layer_reduces_once(tp_size):
    """Catches a second all-reduce, and biases of the two projections that are added by every rank."""
    whole, num_layers = reference("cohere-biased"), SIZES["num_hidden_layers"]
    plan = make_plan(whole.model.config, tp_size)
    assert plan_table(plan).endswith("collectives per layer: 1")

    def run(comm):
        model = whole.copy()
        tp_runtime.patch(model, comm)
        sums, all_reduce = [], comm.all_reduce

        def counted(x):
            sums.append(tuple(x.shape))
            return all_reduce(x)

        comm.all_reduce = counted
        with torch.no_grad():
            return model(whole.ids).logits, sums

    for logits, sums in tp_runtime.run_local(run, tp_size):
        assert sums == [(*whole.ids.shape, whole.model.config.hidden_size)] * (1 + num_layers)  # the embedding's, too
        assert (logits - whole.logits).abs().max() <= TOLERANCE


def test_pairs_turn_in_float32():
    """Catches products that are rounded to 16 bits before they are added: Hugging Face turns in float32."""
    theirs = tiny("cohere", (9, 3), dtype=torch.bfloat16)
    ours = copy.deepcopy(theirs)
    tp_runtime.patch(ours)
    positions = torch.arange(30)[None]
    qk = torch.randn(1, 12, 30, 8, generator=torch.Generator().manual_seed(4)).bfloat16()
    cos, sin = theirs.model.rotary_emb(qk, positions)
    attention = ours.model.layers[0].self_attn
    got = attention._turned(qk, ours.model.rotary_emb(qk, positions), None)
    want, _ = modeling_cohere.apply_rotary_pos_emb(qk, qk, cos, sin)
    assert got.dtype == torch.bfloat16 and (got != want).float().mean() < 1e-3  # a fused multiply-add rounds once


def test_the_engine_refuses_to_turn_anew():
    """Catches tokens behind a switch of angles that attend to keys which were turned by those before it."""
    model = reference("phi3-longrope-switch").copy()
    tp_runtime.patch(model)
    engine, ids = Engine(model, None, {**model.config.to_dict(), "eos_token_id": None}, {}), prompt(1)[0].tolist()
    with pytest.raises(ValueError, match="a prompt of 9 tokens and max_new_tokens=4 go past .*=11, .* up to 3, or"):
        engine.generate([""], [ids], GenerationOptions(max_new_tokens=4, do_sample=False))
    (completion,), _ = engine.generate([""], [ids], GenerationOptions(max_new_tokens=3, do_sample=False))
    assert completion.tokens == reference("phi3-longrope-switch").tokens[0, 9:12].tolist()


# Configs

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# As they are published, in the words of their time.
GEMMA_3 = {
    "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912,
    "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 32768, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": 512, "sliding_window_pattern": 6, "final_logit_softcapping": None,
    "attn_logit_softcapping": None, "torch_dtype": "bfloat16", **IDS,
}  # fmt: skip
GEMMA_2 = {
    "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 3584, "intermediate_size": 14336,
    "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096, **IDS,
}  # fmt: skip
PHI_3 = {
    "model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "sliding_window": 2047,
    "original_max_position_embeddings": 4096, "rope_scaling": None, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
}  # fmt: skip
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
STARCODER_2 = {
    "model_type": "starcoder2", "vocab_size": 49152, "hidden_size": 3072, "intermediate_size": 12288,
    "num_hidden_layers": 30, "num_attention_heads": 24, "num_key_value_heads": 2, "norm_epsilon": 1e-5,
    "use_bias": True, "hidden_act": "gelu_pytorch_tanh", "sliding_window": 4096, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
SMOLLM_3 = {
    "model_type": "smollm3", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008,
    "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4, "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9, "use_sliding_window": False, "sliding_window": None,
}  # fmt: skip
COMMAND_R = {
    "model_type": "cohere", "vocab_size": 256000, "hidden_size": 8192, "intermediate_size": 22528,
    "num_hidden_layers": 40, "num_attention_heads": 64, "num_key_value_heads": 64, "logit_scale": 0.0625,
    "layer_norm_eps": 1e-5, "rope_theta": 8000000.0, "use_qk_norm": False, "max_position_embeddings": 8192,
    "bos_token_id": 5, "eos_token_id": 255001, "pad_token_id": 0, "torch_dtype": "float16",
}  # fmt: skip
PARAMETERS = {  # as the model cards give them
    "gemma3_text": (GEMMA_3, 999_885_952),
    "gemma2": (GEMMA_2, 9_241_705_984),
    "phi3": (PHI_3, 3_821_079_552),
    "phi3 128k": ({**PHI_3, "rope_scaling": LONGROPE, "max_position_embeddings": 131072}, 3_821_079_552),
    "starcoder2": (STARCODER_2, 3_030_371_328),
    "smollm3": (SMOLLM_3, 3_075_098_624),
    "cohere": (COMMAND_R, 34_980_831_232),
}


@pytest.mark.parametrize("config, count", PARAMETERS.values(), ids=PARAMETERS)
def test_known_sizes_of_published_models(config, count):
    """Catches a weight that is left out or doubled, and a published config that is refused."""
    assert make_plan(config, 1, dtype="bfloat16").weight_bytes(0) == 2 * count
    check_config(CONFIG_MAPPING[config["model_type"]](**copy.deepcopy(config)).to_dict())


def test_a_null_is_no_default():
    """Catches a family's number of key/value heads where the config says null: as many as there are query heads."""
    null, full = ({**SMOLLM_3, "num_key_value_heads": heads} for heads in (None, 16))
    assert make_plan(null, 4) == make_plan(full, 4) != make_plan(SMOLLM_3, 4)
    assert CONFIG_MAPPING["smollm3"](**null).num_key_value_heads == 16


@pytest.mark.parametrize(
    "config, change, message",
    [
        (GEMMA_2, {"use_bidirectional_attention": True}, "use_bidirectional_attention makes this an encoder"),
        (GEMMA_3, {"use_bidirectional_attention": True}, "use_bidirectional_attention makes this an encoder"),
        (GEMMA_2, {"final_logit_softcapping": 0.0}, "final_logit_softcapping is 0.0; it must be a decimal number from"),
        (GEMMA_2, {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping is -1.0"),
        (GEMMA_2, {"hidden_activation": "geglu"}, "hidden_activation 'geglu' is not supported; supported: gelu"),
        (GEMMA_2, {"sliding_window": None}, "some layers attend within a sliding window, but sliding_window is not"),
        (GEMMA_2, {"num_attention_heads": 24}, "hidden_size=3584 is not a multiple of num_attention_heads=24"),
        (GEMMA_3, {"model_type": "gemma3"}, "model type 'gemma3' is not supported; supported: llama, "),
        (GEMMA_3, {"rope_scaling": {"full_attention": {"rope_type": "ntk"}}}, "rope_type 'ntk' is not supported"),
        (
            GEMMA_3,
            {"rope_parameters": {"sliding_attention": {}, "full_attention": {"rope_type": "linear"}}},
            "rope_type 'linear' needs factor",
        ),
        (PHI_3, {"rope_scaling": {**LONGROPE, "long_factor": ["2"] * 48}}, "is not a list of positive numbers"),
        (PHI_3, {"rope_scaling": {"type": "longrope"}}, "rope_type 'longrope' needs short_factor"),
        (
            PHI_3,
            {"rope_scaling": LONGROPE, "partial_rotary_factor": 0.75},
            "short_factor lists 48 factors, the rotary embedding turns 36 pairs of elements",
        ),
        (STARCODER_2, {"rope_scaling": LONGROPE}, "rope_type 'longrope' is not supported; supported: default, linear"),
        (PHI_3, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported"),
        (PHI_3, {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5; it must be a number from 0 to 1"),
        (SMOLLM_3, {"no_rope_layers": [1, 0]}, "no_rope_layers [1, 0] says nothing of some of 36 layers"),
        (STARCODER_2, {"use_bias": 1}, "use_bias is 1; it must be true or false"),
        (COMMAND_R, {"use_qk_norm": True}, "use_qk_norm is not supported in models of type cohere; take one without"),
        (COMMAND_R, {"logit_scale": None}, "logit_scale is None; it must be a decimal number"),
        (COMMAND_R, {"layer_norm_eps": None}, "layer_norm_eps is None; it must be a decimal number"),
        (STARCODER_2, {"norm_epsilon": 1}, "norm_epsilon is 1; it must be a decimal number"),
    ],
)
def test_configs_that_cannot_be_right_are_refused(config, change, message):
    """Catches what transformers would fail on in some layer, or what we would compute as something else."""
    check_config(config)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_config({**config, **change})

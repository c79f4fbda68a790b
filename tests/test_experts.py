"""The sparse blocks of all families, cut over ranks, against Hugging Face's; and our experts in models not patched.

Ranks are threads. The blocks within whole models, as threads and as processes: test_patching.py and test_loading.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import EVERY_SIZE, TOLERANCE, answers, one_thread, prompt, reference, tiny  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM, GptOssConfig

import tp_runtime
import tp_runtime.experts
from tp_runtime.comm import NullCommunicator
from tp_runtime.config import GenerationOptions
from tp_runtime.engine import Engine
from tp_runtime.models.adapter import adapter_for
from tp_runtime.plan import make_plan

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "llama4_text")
SHAPES = ((389, 2, 1), (400, 7, 3), (768, 64, 2))  # width, experts, experts a token
TOKENS = (1, 7, 300)


def sparse(family: str, width: int, num_experts: int, top_k: int):
    """A model whose one layer is sparse."""
    key = (
        "intermediate_size" if family in ("mixtral", "olmoe", "granitemoe", "llama4_text") else "moe_intermediate_size"
    )
    count = "num_experts" if family.startswith(("qwen", "olmoe")) else "num_local_experts"
    options = {key: width, count: num_experts, "num_experts_per_tok": top_k, "num_hidden_layers": 1}
    return tiny(
        family, (9, 3), **options, **({"moe_layers": [0], "no_rope_layers": [1]} if family == "llama4_text" else {})
    )


def block_of(model):
    return getattr(model.model.layers[0], adapter_for(model.config.model_type).feed_forward)


def batches(model) -> list[torch.Tensor]:
    """Inputs of the block: 1 to 300 tokens that choose evenly, and 300 that nearly all choose the same experts."""
    adapter = adapter_for(model.config.model_type)
    router = getattr(block_of(model), adapter.routing.router).weight.data
    generator = torch.Generator().manual_seed(2)
    even = [torch.randn(1, count, router.shape[1], generator=generator) for count in TOKENS]
    towards = router[0] / router[0].norm()  # where the first expert's logit grows fastest
    return [*even, even[-1] + 6 * towards]


def outputs(model, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    block = block_of(model)
    with torch.no_grad():
        out = [block(x) for x in inputs]
    return [y[0].view(x.shape) if isinstance(y, tuple) else y for y, x in zip(out, inputs)]


@pytest.mark.halved
@pytest.mark.parametrize("width, num_experts, top_k", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_block_is_the_whole_one(family, width, num_experts, top_k):
    """Catches a wrong scoring, weight, column or shared part, tokens lost to an expert that all choose, ranks that add
    their parts twice, and sums whose order is not fixed."""
    model = sparse(family, width, num_experts, top_k)
    inputs = batches(model)
    want = outputs(copy.deepcopy(model), inputs)

    def run(comm):
        ours = copy.deepcopy(model)
        tp_runtime.patch(ours, comm)
        return outputs(ours, inputs), outputs(ours, inputs)

    for tp_size in EVERY_SIZE:
        ranks = tp_runtime.run_local(run, tp_size)
        for first, second in ranks:
            assert all(torch.equal(a, b) for a, b in zip(first, ranks[0][0]))
            assert all(torch.equal(a, b) for a, b in zip(first, second))
            assert all((a - b).abs().max() <= TOLERANCE * b.abs().max() for a, b in zip(first, want))


class Counting(NullCommunicator):
    """One rank of three that notes what it would have sent."""

    def __init__(self):
        super().__init__(1, 3)
        self.sent: list[tuple[str, int]] = []

    def all_reduce(self, x):
        self.sent.append(("all_reduce", x.nbytes))
        return x

    def all_gather(self, x, lengths):
        self.sent.append(("all_gather", x.nbytes // x.shape[-1] * sum(lengths)))
        return super().all_gather(x, lengths)


NAMES = [f"{family}-12/1" for family in FAMILIES]


@pytest.mark.parametrize("name", ["llama-12/1", *NAMES, "qwen2_moe-dense-first", "llama4_text-sparse"])
def test_the_collectives_are_those_of_the_plan(name):
    """Catches a second all-reduce for the shared expert, and a plan that promises fewer bytes than are sent."""
    model, comm, num_tokens = reference(name).copy(), Counting(), 18
    tp_runtime.patch(model, comm)
    comm.sent.clear()
    model(prompt(), use_cache=False)
    plan = make_plan(model.config, 3)
    planned = [(c.op, c.bytes_per_token * num_tokens) for c in plan.collectives for _ in (c.layers or (0,))]
    assert sorted(comm.sent) == sorted(planned)


@pytest.mark.parametrize("name", ["granitemoe-12/1", "granitemoe-tied", "mixtral-12/1"])
def test_logits_of_a_shard_are_the_models(name):
    """Catches logits that the engine samples from unscaled: the same token when greedy, others when not."""
    model, ids = reference(name).copy(), prompt()
    tp_runtime.patch(model)
    with torch.no_grad():
        hidden, logits = model.model(ids).last_hidden_state, model(ids).logits
        torch.testing.assert_close(model.lm_head.logits_shard_v(hidden), logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", [*NAMES[1:], "llama4_text-sparse"])
def test_the_engine_says_what_generate_says(name):
    """Catches a cache of ours that chunks, windows or growing scales do not fit, with a prompt that is padded."""
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


# Bad input


ERRORS = {
    "expert 4": (torch.tensor([[0, 1], [2, 4]]), torch.ones(2, 2), r"token 1 is given expert 4: .* experts 0 to 3"),
    "expert -1": (torch.tensor([[-1, 1]]), torch.ones(1, 2), r"token 0 is given expert -1: .* experts 0 to 3"),
    "NaN": (torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 1], [1, torch.nan]]), "token 1 is given .* weight nan"),
}


@pytest.mark.parametrize("index, weights, message", ERRORS.values(), ids=ERRORS)
def test_routing_that_cannot_be_is_named(index, weights, message):
    """Catches weights that are read past their end, a token that silently loses an expert, and NaN in all rows."""
    patched, whole = reference("mixtral-12/1").copy(), reference("mixtral-12/1").copy()
    tp_runtime.patch(patched, NullCommunicator(1, 3))
    whole.set_experts_implementation("tp_runtime")
    for model in (patched, whole):
        with pytest.raises(ValueError, match=message):
            block_of(model).experts(torch.ones(len(index), 48), index, weights)


def test_a_block_without_tokens():
    """Catches an empty batch that the router or the sort of its tokens cannot take."""
    for name in NAMES:
        model = reference(name).copy()
        tp_runtime.patch(model, NullCommunicator(1, 3))
        layer = model.model.layers[1]
        y = getattr(layer, adapter_for(model.config.model_type).feed_forward)(torch.ones(1, 0, 48))
        assert (y[0] if isinstance(y, tuple) else y).shape == (1, 0, 48)


# Models that are not patched


@pytest.mark.parametrize("name", ["qwen2_moe-mixed", "qwen3_moe-12/1", "olmoe-12/1", "granitemoe-12/1", "mixtral-400"])
def test_the_experts_implementation_says_what_eager_says(name):
    """Catches an implementation that transformers does not call, or calls with other arguments in another version."""
    whole, called = reference(name), []
    model = whole.copy()
    model.set_experts_implementation("tp_runtime")
    experts = tp_runtime.experts.experts
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(tp_runtime.experts, "experts", lambda *args: called.append(1) or experts(*args))
        logits, tokens = answers(model, whole.ids)
    assert called and torch.equal(tokens, whole.tokens)
    assert (logits - whole.logits).abs().max() <= TOLERANCE


def test_the_experts_implementation_is_for_inference():
    """Catches a gradient that silently leaves the experts out."""
    model = reference("mixtral-12/1").copy()
    model.set_experts_implementation("tp_runtime")
    loss = model(prompt(), labels=prompt()).loss
    assert loss.requires_grad
    with pytest.raises(ValueError, match="the experts of tp_runtime have no backward pass"):
        loss.backward()


def test_experts_of_another_kind_are_refused():
    """Catches experts with biases, or gate and up interleaved, that are computed as if they had neither."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    config = GptOssConfig(
        **sizes, num_hidden_layers=1, vocab_size=509, num_local_experts=4, experts_implementation="eager"
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.set_experts_implementation("tp_runtime")
    kinds = "biases and interleaved gate and up and a gating function of their own"
    with pytest.raises(ValueError, match=f"GptOssExperts has {kinds}, which .* does not support; call model.set_exp"):
        model(prompt())

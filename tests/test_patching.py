"""A patched model says what the unsharded one says, on every rank, and unpatch gives it back bit for bit.

Ranks are threads, except in the last section: there the same functions run once as gloo processes.
"""

import copy
import functools
import itertools

import pytest
import torch
from generation_modes import MODES, SAMPLED, Collector
from gloo_ranks import run_gloo
from tiny_models import (
    CASES,
    SIZES_BY_HASTE,
    SPARSE,
    TOLERANCE,
    VARIANTS,
    answers,
    one_thread,  # noqa: F401 (a fixture)
    prompt,
    reference,
    tiny,
)
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    MaxTimeCriteria,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import tp_runtime
from tp_runtime.comm import NullCommunicator
from tp_runtime.config import RuntimeConfig
from tp_runtime.models.adapter import FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")


def patched(name: str, comm, **options):
    """This rank's part of the model of that name."""
    model = reference(name).copy()
    tp_runtime.patch(model, comm, **options)
    return model


def error_of(fn, *args, **kwargs) -> str:
    """What a ValueError of fn(*args) says; a rank that is not refused says so."""
    try:
        fn(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return "no error"


# Logits and tokens


@pytest.mark.halved
@pytest.mark.parametrize("tp_size", SIZES_BY_HASTE)
@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_are_those_of_the_whole_model(name, tp_size):
    """Catches a wrong head, column, window, angle or expert on any rank, and ranks that go apart."""
    whole = reference(name)
    ranks = tp_runtime.run_local(lambda comm: answers(patched(name, comm), whole.ids), tp_size)
    for logits, tokens in ranks:
        assert torch.equal(logits, ranks[0][0])
        assert (logits - whole.logits).abs().max() <= TOLERANCE
        assert torch.equal(tokens, whole.tokens)


def test_every_option_of_a_variant_changes_the_logits():
    """Catches variants that test nothing: a window longer than the prompt, a scaling that does not scale."""
    for name, (family, heads, options) in VARIANTS.items():
        plain = reference(f"{family}-{heads[0]}/{heads[1]}")
        assert (plain.logits - reference(name).logits).abs().max() > 100 * TOLERANCE, (name, options)


@pytest.mark.parametrize(
    "name",
    [
        *("llama-biased", "mixtral-sliding", "qwen3_moe-dense-first", "qwen2_moe-mixed", "llama4_text-sparse"),
        *("gemma3_text-tied", "phi3-tied", "starcoder2-sliding", "cohere-9/3"),
    ],
)
def test_the_models_own_outputs_stay(name):
    """Catches outputs and arguments that a replaced module swallows: loss, states, router logits, positions."""
    whole, ids = reference(name), prompt()
    router = {"output_router_logits": True} if name.startswith(SPARSE) else {}

    def run(model) -> list[torch.Tensor]:
        out = model(ids, labels=ids, output_hidden_states=True, **router)
        kept = model(ids, logits_to_keep=2, position_ids=torch.arange(3, 12)[None], use_cache=False)
        assert kept.past_key_values is None
        recorded = getattr(out, "router_logits", None) or ()  # Llama 4's came later
        return [out.loss, out.logits, *out.hidden_states, *recorded, kept.logits]

    want = run(whole.copy())
    for got in tp_runtime.run_local(lambda comm: run(patched(name, comm)), 3):
        assert len(got) == len(want) and all(a.shape == b.shape for a, b in zip(got, want))
        assert all((a - b).abs().max() <= TOLERANCE for a, b in zip(got, want))


@pytest.mark.filterwarnings("ignore")  # of flex attention without its compiler
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("name", ["llama-14/2", "mistral-sliding"])
def test_attention_implementations(name, implementation):
    """Catches an implementation that is fixed by patching, and heads that are grouped by the unsharded counts."""
    whole = reference(name)

    def run(comm):
        before, after = whole.copy(), whole.copy()
        before.set_attn_implementation(implementation)
        tp_runtime.patch(before, comm)
        tp_runtime.patch(after, comm)
        after.set_attn_implementation(implementation)
        with torch.no_grad():
            return before(whole.ids).logits, after(whole.ids).logits

    torch.compiler.set_stance("force_eager")  # compiling flex attention takes a minute
    try:
        for logits in itertools.chain(*tp_runtime.run_local(run, 3)):
            assert (logits - whole.logits).abs().max() <= TOLERANCE
    finally:
        torch.compiler.set_stance("default")


@pytest.mark.parametrize(
    "name",
    [
        *("llama-12/2", "qwen2-mixed", "mistral-sliding", "mixtral-sliding", "qwen3_moe-sliding"),
        *("qwen2_moe-mixed", "olmoe-clipped", "granitemoe-tied", "llama4_text-12/1"),
        *("gemma2-tied", "gemma3_text-14/2", "granite-tied", "starcoder2-sliding", "phi3-sliding", "smollm3-sliding"),
        *("olmo2-biased", "cohere-9/3"),
    ],
)
def test_attention_functions_are_told_what_hugging_face_tells_them(name):
    """Catches a window that only the mask knows: flash attention takes it from the module's call, and has no mask."""
    told = []

    def spy(module, q, k, v, mask, **options):
        known = ("scaling", "dropout", "sliding_window", "softcap", "use_cache", "position_ids")
        about = {key: options.get(key) for key in known}
        told.append({**about, "layer": module.layer_idx, "causal": module.is_causal, "head_dim": q.shape[-1]})
        options.pop("softcap", None)
        return sdpa_attention_forward(module, q, k, v, mask, **options)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", sdpa_mask)
    for patch in (lambda model: None, lambda model: tp_runtime.patch(model, NullCommunicator(1, 3))):
        model = reference(name).copy()
        patch(model)
        model.set_attn_implementation("spy")
        model(prompt(), position_ids=None, use_cache=False)
    theirs, ours = told[:2], told[2:]
    assert len(ours) == 2 and str(ours) == str(theirs)  # as text: positions are tensors


@functools.cache
def in_bfloat16(family: str) -> list[tuple]:
    """Of two seeds: a bf16 model, ids, and what the same weights say in float32. Not for threads, as `other`."""
    found = []
    for seed in (0, 1):
        half, whole, ids = tiny(family, dtype=torch.bfloat16, seed=seed), tiny(family, seed=seed), prompt(8, 60, seed)
        whole.load_state_dict(half.state_dict())
        with torch.no_grad():
            found.append((half, ids, whole(ids).logits))
    return found


def rms_error(family: str, patch) -> float:
    """Of a bf16 model's logits, after patch(model), against float32."""
    squares = []
    for half, ids, exact in in_bfloat16(family):
        model = copy.deepcopy(half)
        patch(model)
        with torch.no_grad():
            squares.append((model(ids).logits.double() - exact).square().mean())
    return torch.stack(squares).mean().sqrt().item()


@functools.cache
def rms_error_on_one_rank(family: str) -> float:
    """The smaller one of Hugging Face's and ours: a ratio to either is at most the ratio to this."""
    return min(rms_error(family, lambda model: None), rms_error(family, tp_runtime.patch))


def assert_about_as_exact(family: str, errors: list[float]) -> None:
    """D3 of the fault board. Where two experts nearly tie, any rounding is a large error: hence the wider limit."""
    limit = 1.5 if family in SPARSE else 1.10
    assert all(error == errors[0] for error in errors)
    assert errors[0] <= limit * rms_error_on_one_rank(family)


@pytest.mark.halved
@pytest.mark.parametrize("tp_size", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 5))])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_about_as_exact_as_on_one_rank(family, tp_size):
    """Catches partial sums that are rounded more than once."""
    in_bfloat16(family)
    errors = tp_runtime.run_local(lambda comm: rms_error(family, lambda m: tp_runtime.patch(m, comm)), tp_size)
    assert_about_as_exact(family, errors)


# Hugging Face's generate()


def assistant_of(name: str):
    """A model that often, but not always, guesses what the model of that name will say."""
    model = reference(name).copy()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * parameter.std().nan_to_num() / 10
    return model


@functools.cache
def said(name: str, mode: str) -> list[torch.Tensor]:
    """What the unpatched model gives in a mode, the draws seeded with 3."""
    models = reference(name).copy(), assistant_of(name)  # building them draws, too
    torch.manual_seed(3)
    return {**MODES, **SAMPLED}[mode](*models)


def assert_same(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    """Tokens equal, numbers within the tolerance."""
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).abs().max() <= (TOLERANCE if a.is_floating_point() else 0)


@pytest.mark.halved
@pytest.mark.parametrize("mode", [*MODES, *SAMPLED])
@pytest.mark.parametrize("name, tp_size", [("qwen2-mixed", 2), ("mixtral-sliding", 4), ("gemma3_text-9/3", 3)])
def test_generate_gives_the_unpatched_models_tokens(name, tp_size, mode):
    """Catches a cache for all heads, draws or stops that differ between ranks, padding that is attended to."""
    want = said(name, mode)
    torch.manual_seed(3)
    run = {**MODES, **SAMPLED}[mode]
    for got in tp_runtime.run_local(lambda comm: run(patched(name, comm), assistant_of(name)), tp_size):
        assert_same(got, want)


@pytest.mark.parametrize("mode", ["assisted", "assisted sampling"])
def test_the_assistant_may_be_patched_too(mode):
    """Catches a generate() within generate() that checks or draws apart."""
    want = said("qwen3-mixed", mode)
    torch.manual_seed(3)

    def run(comm):
        assistant = assistant_of("qwen3-mixed")
        tp_runtime.patch(assistant, comm)
        return {**MODES, **SAMPLED}[mode](patched("qwen3-mixed", comm), assistant)

    for got in tp_runtime.run_local(run, 3):
        assert_same(got, want)


def test_unseeded_draws_are_the_same_on_every_rank_and_others_in_the_next_call():
    """Catches a seed that is fixed to keep ranks in step."""

    def run(comm):
        model = patched("llama-9/3", comm)
        return [model.generate(prompt(), max_new_tokens=8, do_sample=True) for _ in range(2)]

    first, *others = tp_runtime.run_local(run, 4)
    assert not torch.equal(*first)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


def test_rank_zero_alone_may_stream():
    """Catches a streamer that every rank must have, or None that is taken for another value than nothing."""

    def run(comm):
        streamer = Collector() if comm.rank == 0 else None
        out = patched("llama-12/4", comm).generate(prompt(1), max_new_tokens=3, do_sample=False, streamer=streamer)
        return out, torch.cat(streamer.pieces) if streamer else out[0]

    for out, streamed in tp_runtime.run_local(run, 3):
        assert torch.equal(out[0], streamed) and torch.equal(out[0], reference("llama-12/4").tokens[0, :12])


def test_ranks_stop_together_by_rank_zeros_clock():
    """Catches ranks that stop by clocks of their own: the others would wait for ever in their next collective."""

    class StopAt:
        def __init__(self, length: int):
            self.length = length

        def __call__(self, ids, scores, **kwargs) -> bool:
            return ids.shape[1] >= self.length

    def run(comm):
        model, ids = patched("llama-12/4", comm), prompt()
        clock = MaxTimeCriteria(max_time=1000.0 if comm.rank else -1.0)  # rank 0's has run out before it begins
        stopped = [
            model.generate(ids, max_new_tokens=8, stopping_criteria=criteria)
            for criteria in ([clock], [StopAt(12 + comm.rank)], [StopAt(50), StopAt(14 - comm.rank)])
        ]
        return [out.shape[1] for out in stopped]

    assert tp_runtime.run_local(run, 3) == [[10, 12, 14]] * 3
    message = error_of(
        lambda: tp_runtime.run_local(lambda c: patched("llama-12/4", c).generate(prompt(), max_time=9.0), 2)
    )
    assert message.startswith("max_time: each rank would stop by its own clock")


# Ranks that disagree, and what cannot be done


GENERATE_ALIKE = {
    "inputs": lambda model, odd: model.generate(prompt(seed=odd), max_new_tokens=2),
    "input_ids": lambda model, odd: model.generate(input_ids=prompt(1, 70, seed=odd), max_new_tokens=2),
    "attention_mask": lambda model, odd: model.generate(
        input_ids=prompt(), attention_mask=torch.ones(2, 9).index_fill(1, torch.tensor([0]), 1 - odd), max_new_tokens=2
    ),
    "inputs_embeds": lambda model, odd: model.generate(inputs_embeds=torch.zeros(1, 4, 48) + odd, max_new_tokens=2),
    "max_new_tokens": lambda model, odd: model.generate(prompt(), max_new_tokens=2 + odd),
    "temperature": lambda model, odd: model.generate(prompt(), do_sample=True, temperature=1.0 + odd),
    "num_beams": lambda model, odd: model.generate(prompt(), **({"num_beams": 2} if odd else {})),
    "eos_token_id": lambda model, odd: model.generate(prompt(), eos_token_id=[5, 6 + odd]),
    "generation_config": lambda model, odd: model.generate(prompt(), GenerationConfig(max_new_tokens=2 + odd)),
}


def disagreements(comm, name: str = "llama-12/4") -> dict[str, str]:
    """What each rank is told when rank 1 calls generate() otherwise, by what is different there."""
    model, odd = patched(name, comm), int(comm.rank == 1)
    told = {field: error_of(call, model, odd) for field, call in GENERATE_ALIKE.items()}
    model.generation_config.top_k = 7 + odd
    told["model.generation_config"] = error_of(model.generate, prompt())
    return told


def assert_told(everyone: list[dict[str, str]]) -> None:
    for told in everyone:
        assert told == everyone[0]
        for field, message in told.items():
            assert message.startswith(f"ranks disagree on {field} (ranks 0, 2: "), (field, message)
            assert "; rank 1: " in message


def test_ranks_that_generate_otherwise_are_named():
    """Catches ranks that run on with other inputs: garbage on all of them, or a hang."""
    everyone = tp_runtime.run_local(disagreements, 3)
    assert everyone[0].keys() == {*GENERATE_ALIKE, "model.generation_config"}
    assert_told(everyone)


def gpt2():
    """A model of a family without support."""
    return AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=509)).eval()


OTHER_THAN_LLAMA_12_4 = {
    "model": gpt2,
    "dtype": lambda: tiny("llama", (12, 4), dtype=torch.bfloat16),
    "config.num_hidden_layers": lambda: tiny("llama", (12, 4), num_hidden_layers=3),
    "config.rms_norm_eps": lambda: tiny("llama", (12, 4), rms_norm_eps=1e-3),
    "weights": lambda: tiny("llama", (12, 4), seed=1),
}


@functools.cache
def other(field: str):
    """A model that differs from llama-12/4 in that field first. Not for threads: they share torch's default dtype."""
    return OTHER_THAN_LLAMA_12_4[field]()


def other_models(comm) -> dict[str, str]:
    """What each rank is told when rank 1 patches something else, by the field that is different there."""
    model, odd = reference("llama-12/4").model, comm.rank == 1
    told = {field: error_of(tp_runtime.patch, other(field) if odd else model, comm) for field in OTHER_THAN_LLAMA_12_4}
    plan = tp_runtime.make_plan(model.config, comm.size)
    told["plan"] = error_of(tp_runtime.patch, model, comm, plan=plan if odd else None)
    config = RuntimeConfig(overlap="lanes") if odd else None
    told["option overlap"] = error_of(tp_runtime.patch, model, comm, config=config)
    assert not hasattr(model, "_tp_runtime")
    return told


def test_ranks_that_patch_another_model_are_named():
    """Catches ranks that each take part in another model: garbage, or a hang where one rank alone is refused."""
    for field in OTHER_THAN_LLAMA_12_4:
        other(field)
    everyone = tp_runtime.run_local(other_models, 3)
    assert everyone[0].keys() == {*OTHER_THAN_LLAMA_12_4, "plan", "option overlap"}
    assert_told(everyone)


def test_models_and_plans_that_cannot_work_are_refused():
    """Catches a model that is cut by another's plan, and a family that nobody has tested."""
    make_plan, llama = tp_runtime.make_plan, reference("llama-12/4").model
    two_kv_heads, mistral = reference("llama-12/2").model, reference("mistral-12/4").model
    differ = (
        "model and plan differ in 4 parameters, first model.layers.0.self_attn.k_proj.weight: (32, 48) in the model"
    )
    refused = {
        "model type 'gpt2' is not supported; supported: " + ", ".join(FAMILIES): {"model": gpt2()},
        "Linear is no Hugging Face causal language model": {"model": nn.Linear(2, 2)},
        "the model's dtype is float64; supported: float32": {"model": reference("llama-12/4").copy().double()},
        "the plan is for 4 ranks, the group has 2": {"plan": make_plan(llama.config, 4)},
        "the plan is for 'mistral', the model is 'llama'": {"plan": make_plan(mistral.config, 2)},
        "the plan is for float16 weights, the model's are float32": {
            "plan": make_plan(llama.config, 2, dtype="float16")
        },
        differ + ", (16, 48) in the plan": {"plan": make_plan(two_kv_heads.config, 2)},
        "dtype='bfloat16', but the model is float32; call model.to(": {"config": RuntimeConfig(dtype="bfloat16")},
        "device='cuda', but the group is on cpu": {"config": RuntimeConfig(device="cuda")},
        "the model is on cpu, the group on cuda; move": {"group": NullCommunicator(0, 2, device="cuda")},
        "group is a str; pass a process group, a DeviceMesh or a Communicator": {"group": "tp"},
        "tp_size=13 exceeds 12 query heads; choose 1 to 12": {"group": NullCommunicator(0, 13)},
    }
    for message, arguments in refused.items():
        arguments = {"model": llama, "group": NullCommunicator(0, 2), **arguments}
        assert error_of(tp_runtime.patch, **arguments).startswith(message)
        assert not hasattr(arguments["model"], "_tp_runtime")


def test_a_patched_model_refuses_what_is_cut():
    """Catches half an attention map, a rank's weights saved as a checkpoint, a training step on local gradients."""

    def run(comm) -> list[str]:
        model, ids = patched("llama-12/4", comm), prompt()
        told = [error_of(model, ids, output_attentions=True), error_of(model.save_pretrained, "nowhere")]
        told.append(
            error_of(model.generate, ids, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
        )
        model.set_attn_implementation("eager")  # with others, Hugging Face refuses by itself
        model.config.output_attentions = True
        told.append(error_of(model, ids))
        model.config.output_attentions = False
        model.train()
        told.append(error_of(model, ids))
        model.eval()
        return [*told, error_of(model, ids)]

    attention = "attention maps are cut across ranks by heads; unpatch the model to read them"
    save = "a patched model holds one rank's part; unpatch(model) before save_pretrained()"
    train = "a patched model is for inference: call model.eval(), or unpatch it to train"
    told = [attention, save, attention, attention, train, "no error"]
    assert tp_runtime.run_local(run, 2) == [told] * 2


def test_calls_without_a_token_are_refused():
    """Catches torch's "cannot reshape tensor of 0 elements" from some layer, which is what the whole model says."""
    whole, empty = reference("llama-12/4"), prompt()[:0]
    with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
        whole.copy()(empty)

    def run(comm) -> list[str]:
        model = patched("llama-12/4", comm)
        embeds = torch.zeros(1, 0, 48)
        told = [error_of(model, empty), error_of(model, input_ids=prompt()[:, :0])]
        told += [error_of(model.generate, empty, max_new_tokens=2), error_of(model, inputs_embeds=embeds)]
        return [*told, error_of(model, prompt())]

    shapes = ("input_ids is [0, 9]", "input_ids is [2, 0]", "input_ids is [0, 9]", "inputs_embeds is [1, 0, 48]")
    told = [f"{shape}: there is no token to compute; give each call one at least" for shape in shapes]
    assert tp_runtime.run_local(run, 3) == [[*told, "no error"]] * 3


@pytest.mark.parametrize("name", ["llama-12/4", "mixtral-9/3"])
def test_a_patched_model_is_not_copied(name):
    """Catches a copy that computes with the original's layers, router or look-ahead: in silence, and wrongly as soon as
    one of the two is changed."""

    def run(comm):
        model = patched(name, comm)
        layer = model.model.layers[0]
        router = [layer.mlp.gate] if name.startswith("mixtral") else []
        modules = [model, model.model, model.model.layers, layer, model.model.norm, *router]
        told = {error_of(copy.deepcopy, module) for module in modules}
        tp_runtime.unpatch(model)
        twin = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.data.zero_()
        with torch.no_grad():
            return told, twin(prompt()).logits

    message = "a copy would compute with the patched model's parts; copy it before patch(), or after unpatch()"
    for told, logits in tp_runtime.run_local(run, 2):
        assert told == {message}
        assert torch.equal(logits, reference(name).logits)


# In and out


def bytes_of(tensors) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("tp_size", [1, 3, 5])
@pytest.mark.parametrize(
    "name",
    [
        *("llama-biased", "qwen2-tied", "qwen3-9/3", "mixtral-400", "qwen3_moe-dense-first", "llama4_text-sparse"),
        *("gemma2-tied", "starcoder2-14/2", "phi3-9/3", "olmo2-14/2", "cohere-biased"),
    ],
)
def test_the_weights_of_other_ranks_are_released(name, tp_size):
    """Catches full weights that stay behind a name: a model that fits on two GPUs would not."""

    def run(comm):
        model = reference(name).copy()
        whole = list(model.parameters())
        report = tp_runtime.patch(model, comm)
        kept = {id(parameter) for parameter in model.parameters()}
        assert bytes_of(p for p in whole if id(p) not in kept) == 0
        embedding = model.model.embed_tokens
        zeros = (len(embedding.weight) - len(embedding.rows())) * embedding.weight[0].nbytes
        assert zeros <= 2 * embedding.weight[0].nbytes
        assert report.weight_bytes == tp_runtime.make_plan(model.config, comm.size).weight_bytes(comm.rank)
        assert bytes_of(model.parameters()) == report.weight_bytes + zeros
        return report.weight_bytes

    shares = tp_runtime.run_local(run, tp_size)
    whole_bytes = bytes_of(reference(name).model.parameters())
    assert (
        max(shares) < 1.8 * whole_bytes / tp_size
    )  # norms and routers are on every rank; heads and units are not divided


def test_the_report_and_the_printed_model_say_what_was_replaced():
    """Catches a module that was forgotten, and shapes that are shown whole."""
    model = reference("qwen3_moe-dense-first").copy()
    report = tp_runtime.patch(model, NullCommunicator(2, 5))
    assert (report.model_type, report.tp_rank, report.tp_size) == ("qwen3_moe", 2, 5)
    assert [entry for entry in report.replaced if ".1." not in entry[0]] == [
        ("model.embed_tokens", "Embedding", "VocabParallelEmbedding"),
        ("model.rotary_emb", "Qwen3MoeRotaryEmbedding", "RotaryEmbedding"),
        ("model.layers.0.input_layernorm", "Qwen3MoeRMSNorm", "RMSNorm"),
        ("model.layers.0.post_attention_layernorm", "Qwen3MoeRMSNorm", "RMSNorm"),
        ("model.layers.0.self_attn.q_norm", "Qwen3MoeRMSNorm", "RMSNorm"),
        ("model.layers.0.self_attn.k_norm", "Qwen3MoeRMSNorm", "RMSNorm"),
        ("model.layers.0.self_attn", "Qwen3MoeAttention", "ParallelAttention"),
        ("model.layers.0.mlp", "Qwen3MoeMLP", "ParallelMLP"),
        ("model.norm", "Qwen3MoeRMSNorm", "RMSNorm"),
        ("lm_head", "Linear", "ParallelLMHead"),
    ]
    assert ("model.layers.1.mlp", "Qwen3MoeSparseMoeBlock", "ParallelMoE") in report.replaced
    assert "qwen3_moe, rank 2 of 5, 0.1 MiB of weights" in str(report)
    assert "model.layers.*.self_attn: Qwen3MoeAttention -> ParallelAttention (2)" in str(report)
    shown = repr(model)
    for text in (
        "vocab=[208, 312) of 509",
        "num_heads_local=2, num_kv_heads_local=1, head_dim=8",
        "out_features_local=32 (q_proj 16 + k_proj 8 + v_proj 8)",
        "in_features_local=16, out_features=48",
        "out_features_local=160 (gate_proj 80 + up_proj 80)",
        "num_experts=4, hidden_size=48, width_local=8",
    ):
        assert text in shown
    assert tp_runtime.patch(model, NullCommunicator(2, 5)) is report  # and nothing happens
    assert repr(model) == shown and len(model._forward_pre_hooks) == 1


@pytest.mark.halved
@pytest.mark.parametrize("tp_size", [1, 3])
@pytest.mark.parametrize(
    "name",
    [
        *("llama-biased", "llama-yarn", "qwen2-tied", "qwen3-9/3", "mixtral-tied", "qwen3_moe-dense-first"),
        *("qwen2_moe-dense-first", "olmoe-clipped", "granitemoe-tied", "llama4_text-14/2"),
        *("gemma2-tied", "gemma3_text-14/2", "granite-9/3", "starcoder2-sliding", "phi3-tied", "smollm3-9/3"),
        *("olmo2-biased", "cohere-biased"),
    ],
)
def test_unpatch_gives_the_model_back_bit_for_bit(name, tp_size, tmp_path):
    """Catches weights that were rounded, untied, frozen or put into the wrong rows; hooks and methods that stay."""
    whole = reference(name)

    def run(comm):
        model = whole.copy()
        model.model.embed_tokens.weight.requires_grad_(False)
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        attributes = vars(model).keys() | vars(type(model)).keys()
        frozen = [parameter.requires_grad for parameter in parameters.values()]
        tp_runtime.patch(model, comm)
        model.generate(whole.ids, max_new_tokens=2)
        tp_runtime.unpatch(model)
        assert vars(model).keys() | vars(type(model)).keys() == attributes
        assert not model._forward_pre_hooks and "_tp_runtime" not in vars(model)
        now = dict(model.named_modules()), dict(model.named_parameters())
        for before, after in zip((modules, parameters), now):
            assert before.keys() == after.keys() and all(after[key] is before[key] for key in before)
        assert [parameter.requires_grad for parameter in parameters.values()] == frozen
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
        state, want = model.state_dict(), whole.model.state_dict()
        assert state.keys() == want.keys() and all(torch.equal(state[key], want[key]) for key in want)
        assert error_of(tp_runtime.unpatch, model) == "the model is not patched: call tp_runtime.patch(model) first"
        logits, tokens = answers(model, whole.ids)
        assert torch.equal(logits, whole.logits) and torch.equal(tokens, whole.tokens)
        model.train()(whole.ids, labels=whole.ids).loss.backward()
        assert all(
            (p.grad is not None) == p.requires_grad for p in parameters.values() if p.dim() < 3
        )  # experts: if chosen
        model.save_pretrained(tmp_path / str(comm.rank))
        report = tp_runtime.patch(model.eval(), comm)  # and in again
        return report, answers(model, whole.ids)[1]

    for rank, (report, tokens) in enumerate(tp_runtime.run_local(run, tp_size)):
        assert report.tp_rank == rank
        assert torch.equal(tokens, whole.tokens)
        assert (tmp_path / str(rank) / "model.safetensors").exists()


# The same as gloo processes

GLOO_TP = 3
GLOO_CASES = ["llama-biased", "mistral-sliding", "mixtral-14/2", "qwen2-tied", "qwen3-9/3", "qwen3_moe-dense-first"]
GLOO_CASES += ["qwen2_moe-mixed", "olmoe-clipped", "granitemoe-tied", "llama4_text-sparse"]
GLOO_CASES += ["gemma3_text-tied", "phi3-longrope-switch", "starcoder2-sliding", "olmo2-biased", "cohere-biased"]


def everything(comm) -> dict:
    """Every section above, on one rank."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (comm.size, 1), mesh_dim_names=("tp", "dp"))
    groups = itertools.cycle([comm, None, dist.group.WORLD, mesh["tp"]])
    got = {"2-D mesh": error_of(tp_runtime.patch, reference("llama-12/4").model, mesh)}
    for name in GLOO_CASES:
        model = patched(name, next(groups))
        got["answers", name] = answers(model, prompt())
        tp_runtime.unpatch(model)
        got["unpatched", name] = answers(model, prompt())
    for mode, run in {**MODES, **SAMPLED}.items():
        torch.manual_seed(3 if comm.rank == 0 else 100 + comm.rank)
        assistant = assistant_of("llama-14/2")
        if "sampl" in mode:
            tp_runtime.patch(assistant, comm)
        got["mode", mode] = run(patched("llama-14/2", comm), assistant)
    got["otherwise"], got["other models"] = disagreements(comm), other_models(comm)
    got["bfloat16"] = {
        family: rms_error(family, lambda m: tp_runtime.patch(m, comm)) for family in ("llama", "qwen3_moe")
    }
    return got


@functools.cache
def gloo() -> list[dict]:
    return run_gloo(everything, GLOO_TP)


@pytest.mark.parametrize("name", GLOO_CASES)
def test_processes_give_the_whole_models_logits_and_tokens(name):
    """Catches what threads hide: a communicator that the model does not use, a group that is not passed on."""
    whole = reference(name)
    for rank in gloo():
        logits, tokens = rank["answers", name]
        assert (logits - whole.logits).abs().max() <= TOLERANCE and torch.equal(logits, gloo()[0]["answers", name][0])
        assert torch.equal(tokens, whole.tokens)
        assert all(torch.equal(a, b) for a, b in zip(rank["unpatched", name], (whole.logits, whole.tokens)))


@pytest.mark.parametrize("mode", [*MODES, *SAMPLED])
def test_processes_generate_the_unpatched_models_tokens(mode):
    """Catches draws from a generator that only rank 0 has seeded."""
    for rank in gloo():
        assert_same(rank["mode", mode], said("llama-14/2", mode))


def test_processes_that_disagree_are_named():
    """Catches a rank that raises while the others wait."""
    for told in ([rank["otherwise"] for rank in gloo()], [rank["other models"] for rank in gloo()]):
        assert_told(told)
    assert all(rank["2-D mesh"].startswith("the DeviceMesh has 2 dimensions") for rank in gloo())


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_processes_are_as_exact_in_bfloat16(family):
    """Catches a backend that rounds each addition of its sum."""
    assert_about_as_exact(family, [rank["bfloat16"][family] for rank in gloo()])

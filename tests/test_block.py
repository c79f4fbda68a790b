"""The fused decoder block against Hugging Face's layers: hooks, what is normed ahead, one-launch attention, launches.

Every family's logits and tokens at every tp_size, and unpatching: test_patching.py; under torch.compile:
test_torch_compile.py.
"""

from __future__ import annotations

import functools
import itertools
import operator
import weakref

import pytest
import torch
from generation_modes import left_padded
from tiny_models import TOLERANCE, one_thread, prompt, reference, tiny  # noqa: F401 (a fixture)
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import tp_runtime
from tp_runtime import attention, block
from tp_runtime.cache import KVCache
from tp_runtime.comm import NullCommunicator
from tp_runtime.models.adapter import FAMILIES, adapter_for
from tp_runtime.patching import patch_of

pytestmark = pytest.mark.usefixtures("one_thread")

# Of norms, one of each kind.
PLACEMENTS = ("llama-12/4", "gemma2-9/3", "olmo2-9/3", "starcoder2-9/3", "granite-9/3", "cohere-9/3")


def patched(name: str, comm=None) -> PreTrainedModel:
    model = reference(name).copy()
    tp_runtime.patch(model, comm)
    return model


@torch.no_grad()
def logits_of(model: PreTrainedModel, **options) -> torch.Tensor:
    return model(prompt(), use_cache=False, **options).logits


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)


@pytest.fixture
def norms(monkeypatch) -> list[bool]:
    """Of each launch of `rms_norm` behind a sum: whether it norms as well."""
    seen: list[bool] = []
    original = block.AddNorm.of

    def recorded(then, *x):
        seen.append(then.weight is not None)
        return original(then, *x)

    monkeypatch.setattr(block.AddNorm, "of", recorded)
    return seen


# What is normed ahead


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_sum_and_the_norm_behind_it_are_one_launch(name, norms):
    """Catches a norm that is computed twice, or by a launch of its own."""
    model = patched(name)
    calls: list[str] = []
    for path, module in model.model.named_modules():
        if path.endswith("norm") and "self_attn" not in path:

            def forward(x, path=path, original=module.forward):
                calls.append(path)
                return original(x)

            module.forward = forward
    assert_close(logits_of(model), reference(name).logits)
    adapter = adapter_for(model.config.model_type)
    has_norm_in = bool(adapter.norms[0])
    assert calls == (["layers.0.input_layernorm", "norm"] if has_norm_in else ["norm"])
    in_a_layer = 2 - adapter.flag("parallel", {})
    assert norms == ([True] * 2 * in_a_layer if has_norm_in else [False] * 3 + [True])


@torch.no_grad()
def hooked(model: PreTrainedModel, path: str, kind: str) -> torch.Tensor:
    """Logits, and once more without the hook: one that changes, in place, what a module is given or gives."""

    def before(module, args, kwargs):
        (args[0] if args else kwargs["hidden_states"])[..., ::2].mul_(2)

    def behind(module, args, output):
        (output[0] if isinstance(output, tuple) else output)[..., ::2].mul_(2)

    module = model.get_submodule(path)
    if kind == "before":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(behind)
    first = logits_of(model)
    handle.remove()
    return torch.stack((first, logits_of(model)))


@pytest.mark.parametrize("kind", ["before", "behind"])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_hooks_that_change_what_they_are_given(name, kind):
    """Catches a norm of what h was before a hook changed it, and a module with hooks that is not called."""
    whole, model = reference(name).copy(), patched(name)
    assert_close(hooked(whole, "model.layers.0", kind)[1], reference(name).logits)
    norms = [norm for norm in adapter_for(model.config.model_type).norms if norm]
    ends = [f".self_attn.{model.model.layers[0].self_attn.ends_in}", f".mlp.{model.model.layers[0].mlp.ends_in}"]
    parts = ["", ".self_attn", ".mlp", *ends, *(f".{norm}" for norm in norms)]
    for path in ("model.norm", *(f"model.layers.{i}{part}" for i in (0, 1) for part in parts)):
        want, got = hooked(whole, path, kind), hooked(model, path, kind)
        assert (want[0] - want[1]).abs().max() > 100 * TOLERANCE, path
        torch.testing.assert_close(got, want, rtol=1e-5, atol=TOLERANCE, msg=lambda text, path=path: f"{path}: {text}")


@pytest.mark.parametrize("kind", ["before", "behind"])
def test_hooks_within_a_block_without_a_gate(kind):
    """Catches a hook on what is fused: the GEMM and its activation would be called as one, and the hook not at all."""
    whole, model = reference("starcoder2-9/3").copy(), patched("starcoder2-9/3")
    for theirs, ours in (("c_fc", "c_fc"), ("act", "act_fn"), ("c_proj", "c_proj")):
        want = hooked(whole, f"model.layers.1.mlp.{theirs}", kind)
        got = hooked(model, f"model.layers.1.mlp.{ours}", kind)
        assert (want[0] - want[1]).abs().max() > 100 * TOLERANCE, theirs
        torch.testing.assert_close(got, want, rtol=1e-5, atol=TOLERANCE)


@torch.no_grad()
def test_recorded_hidden_states_do_not_end_the_look_ahead(norms):
    """Catches the hooks that transformers leaves behind for good, at the first call that asks for states, taken for
    some that may change what they see; and one that does so beside them, not honoured."""
    whole, model = reference("llama-12/4").copy(), patched("llama-12/4")
    assert_close(logits_of(model), reference("llama-12/4").logits)
    launches = norms.copy()
    want, got = (each(prompt(), use_cache=False, output_hidden_states=True).hidden_states for each in (whole, model))
    assert all(len(layer._forward_hooks) == 1 for layer in model.model.layers)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)
    assert_close(logits_of(model), reference("llama-12/4").logits)
    assert norms == 3 * launches
    want, got = (hooked(each, "model.layers.0", "behind") for each in (whole, model))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=TOLERANCE)
    assert norms.count(False) == launches.count(False) * 5 + 1


def test_hooks_on_every_module():
    """Catches norms that tools which follow all modules, as profilers do, do not see."""
    model = patched("llama-12/4")
    seen = []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, args: seen.append(module))
    try:
        assert_close(logits_of(model), reference("llama-12/4").logits)
    finally:
        handle.remove()
    norms = [module for path, module in model.named_modules() if path.endswith("norm")]
    assert [module for module in seen if module in norms] == norms


class Seen(list):
    """Outputs of attention, the feed-forward block and the layers that they end in, as others see them."""

    def by_hooks(self, model: PreTrainedModel) -> None:
        for module in ends_of(model):
            module.register_forward_hook(lambda module, args, output: self.keep(output))

    def by_wrappers(self, model: PreTrainedModel) -> None:
        for module in ends_of(model):
            module.forward = functools.partial(self.kept, module.forward)

    def by_calls(self, model: PreTrainedModel) -> None:
        layer = model.model.layers[1]
        x = torch.randn(2, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        embeddings = model.model.rotary_emb(x, torch.arange(5)[None])
        self.keep(layer.self_attn(hidden_states=x, position_embeddings=embeddings, attention_mask=None))
        self.keep(layer.mlp(x))

    def kept(self, forward, *args, **kwargs):
        output = forward(*args, **kwargs)
        self.keep(output)
        return output

    def keep(self, output) -> None:
        self.append((output[0] if isinstance(output, tuple) else output).clone())


def ends_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    return [attention.o_proj, attention, mlp.c_proj if hasattr(mlp, "c_proj") else mlp.down_proj, mlp]


@pytest.mark.parametrize("way", ["by_hooks", "by_wrappers", "by_calls"])
@pytest.mark.parametrize("name", ["starcoder2-9/3", "granite-tied"])
@torch.no_grad()
def test_what_others_see_is_reduced_and_has_its_bias(name, way):
    """Catches a sum that is left to the launch behind it, bias and all, where someone looks at it."""

    def run(model) -> list[torch.Tensor]:
        seen = Seen()
        getattr(seen, way)(model)
        return [*seen, logits_of(model), *seen]

    want = run(reference(name).copy())
    for got in tp_runtime.run_local(lambda comm: run(patched(name, comm)), 3):
        assert len(got) == len(want) == 5
        for ours, theirs in zip(got, want):
            assert_close(ours, theirs)


@pytest.mark.parametrize("name", PLACEMENTS)
@torch.no_grad()
def test_a_layer_alone(name):
    """Catches a layer that needs its neighbours, that leaves something behind, or reads arguments in another order."""
    whole, model = reference(name).copy(), patched(name)
    hidden = torch.randn(2, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(5)[None]
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    outputs = []
    for each in (whole, model):
        layer = each.model.layers[1]
        embeddings = each.model.rotary_emb(hidden, positions)
        given = (embeddings, mask) if name.startswith("gemma2") else (mask,)
        rest = {} if name.startswith("gemma2") else {"position_embeddings": embeddings}
        outputs.append(layer(hidden, *given, **rest))
    assert_close(outputs[1], outputs[0])
    assert patch_of(model).ahead._left is None


@pytest.mark.parametrize(
    "name, chosen",
    [("llama-12/4", layers) for layers in ([0], [1], [1, 0], [0, 0, 1, 1], [])]
    + [("gemma2-9/3", [1]), ("olmo2-9/3", [1, 0])],
    ids=str,
)
def test_layers_left_out_repeated_or_in_another_order(name, chosen):
    """Catches the norm of another layer taken for one's own."""
    logits = []
    for model in (reference(name).copy(), patched(name)):
        layers = model.model.layers
        model.model.layers = torch.nn.ModuleList([layers[i] for i in chosen])
        model.config.num_hidden_layers = len(chosen)
        logits.append(logits_of(model))
    assert_close(logits[1], logits[0])


def test_what_is_left_is_released(monkeypatch):
    """Catches normed tensors that stay in memory behind their pass: also one that ends early, and one that fails."""
    model = patched("llama-12/4")
    left = []
    leave = block.Ahead.leave

    def recorded(self, norm, h, y):
        left.extend(map(weakref.ref, (h, y)))
        leave(self, norm, h, y)

    monkeypatch.setattr(block.Ahead, "leave", recorded)
    logits_of(model)
    layers = model.model.layers
    model.model.layers = layers[:1]
    logits_of(model)
    model.model.layers = layers
    handle = layers[1].self_attn.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits_of(model)
    handle.remove()
    assert len(left) == 2 * 4 and not any(tensor() is not None for tensor in left)
    assert_close(logits_of(model), reference("llama-12/4").logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_embeddings_sum_is_normed_for_who_takes_it(family, monkeypatch):
    """Catches a first norm that has a launch of its own where the embedding's sum could take it, and one for nobody:
    of what the model scales before the first layer."""
    left, taken = [], []
    leave, take = block.Ahead.leave, block.Ahead.take

    def recorded(ahead, norm, h):
        y = take(ahead, norm, h)
        taken.extend([norm] if y is not None else [])
        return y

    monkeypatch.setattr(block.Ahead, "leave", lambda ahead, norm, *hy: left.append(norm) or leave(ahead, norm, *hy))
    monkeypatch.setattr(block.Ahead, "take", recorded)
    comm = NullCommunicator(0, 2)
    comm.fuses_norm = True
    model = tiny(family, (12, 4))
    tp_runtime.patch(model, comm)
    logits_of(model)
    norms = [layer.input_layernorm for layer in model.model.layers] if adapter_for(family).norms[0] else []
    is_scaled = family.startswith("granite")
    assert left == taken == [*norms[is_scaled:], model.model.norm]


def test_a_forward_that_is_a_layers_own_stays():
    """Catches a wrapper around one layer, as accelerate puts one, that is lost."""
    model, calls = reference("llama-12/4").copy(), []
    forward = model.model.layers[0].forward

    def wrapped(*args, **kwargs):
        calls.append(args)
        return forward(*args, **kwargs)

    model.model.layers[0].forward = wrapped
    tp_runtime.patch(model)
    assert_close(logits_of(model), reference("llama-12/4").logits)
    tp_runtime.unpatch(model)
    assert len(calls) == 1 and model.model.layers[0].forward is wrapped
    for module in (model.model, model.model.layers[1], model.model.norm):
        assert not {"forward", "__deepcopy__"} & vars(module).keys()


def test_a_parallel_layer_with_a_forward_of_its_own():
    """Catches parts of a sum over ranks in the hands of a forward that does not reduce them."""
    whole = reference("cohere-9/3")

    def run(comm):
        model = whole.copy()
        layer = model.model.layers[1]
        layer.forward = functools.partial(layer.forward)
        tp_runtime.patch(model, comm)
        return logits_of(model)

    for logits in tp_runtime.run_local(run, 3):
        assert_close(logits, whole.logits)


# Attention in one launch: on a CPU by its reference, where no one asks for it else

CACHES = {
    "ours": lambda model: KVCache(model.config.num_hidden_layers, 4),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=20),
    "dynamic": lambda model: DynamicCache(config=model.config),
}
# Name -> of two layers, those whose attention is one launch with a static cache; windows and pairs roll or turn on.
TAKEN = {
    **dict.fromkeys(("llama-14/2", "qwen3-9/3", "granite-9/3", "phi3-9/3", "smollm3-9/3"), 2),
    **dict.fromkeys(("starcoder2-9/3", "mixtral-9/3", "cohere-9/3", "olmo2-14/2", "olmoe-clipped"), 2),
    **dict.fromkeys(("gemma2-9/3", "gemma3_text-14/2", "qwen2-mixed"), 1),
    **dict.fromkeys(("mistral-sliding",), 0),
}


@pytest.fixture
def launches(monkeypatch) -> list[int | None]:
    """Makes attention one launch on the CPU; in the list stands the window of each call."""
    calls: list[int | None] = []
    original = attention.rope_decode_attention

    def counted(*args):
        calls.append(args[9])
        return original(*args)

    monkeypatch.setattr(attention, "has_one_launch", lambda qkv: True)
    monkeypatch.setattr(attention, "rope_decode_attention", counted)
    return calls


@pytest.mark.parametrize("name", [*TAKEN, "llama4_text-12/1"])
def test_one_launch_says_what_the_functions_say(name, launches):
    """Catches a token at the wrong place, padding or a window that is not masked, heads mapped anew, a lost cap."""
    whole, steps = reference(name).copy(), 6
    # transformers 5.17 fails at the mask of Llama 4's static caches.
    caches = {kind: make for kind, make in CACHES.items() if kind != "static" or not name.startswith("llama4")}
    options = {"do_sample": False, "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
    want = whole.generate(**left_padded(), max_new_tokens=steps + 1, **options)

    def run(comm):
        model = patched(name, comm)
        return {
            kind: model.generate(**left_padded(), past_key_values=make(model), max_new_tokens=steps + 1, **options)
            for kind, make in caches.items()
        }

    tp_size = 3
    for rank in tp_runtime.run_local(run, tp_size):
        for got in rank.values():
            assert torch.equal(got.sequences, want.sequences)
            assert_close(torch.stack(got.logits), torch.stack(want.logits))
    ours, static = (0, 0) if name.startswith("llama4") else (2, TAKEN[name])
    assert len(launches) == (ours + static) * steps * tp_size
    windows = {layer.self_attn.sliding_window for layer in patched(name).model.layers} if ours else set()
    assert set(launches) == windows


@pytest.mark.parametrize("name", ["llama-12/4", "mistral-sliding"])
@torch.no_grad()
def test_a_mask_of_the_callers_is_honoured(name, launches):
    """Catches causality or a window that is put upon a mask which has neither."""
    mask = torch.rand(2, 1, 1, 10, generator=torch.Generator().manual_seed(2)) < 0.7
    logits = []
    for model, make in ((reference(name).copy(), CACHES["dynamic"]), (patched(name), CACHES["ours"])):
        cache = make(model) if name.startswith("llama") else KVCache(2, 20)  # that keeps what has left the window
        model(prompt(), past_key_values=cache)
        logits.append(model(prompt(2, 1, seed=3), past_key_values=cache, attention_mask=mask).logits)
    assert_close(logits[1], logits[0])
    assert len(launches) == 2


WINDOWED = (
    *("mistral-sliding", "mixtral-sliding", "phi3-sliding", "smollm3-sliding", "starcoder2-sliding"),
    *("qwen2-mixed", "qwen3-mixed", "qwen3_moe-sliding", "gemma3_text-14/2", "gemma2-9/3"),
)


def test_every_family_with_windows_is_tested():
    """Catches a family whose masks have no windows although its attention function is told one."""
    families = {name.split("-")[0] for name in WINDOWED}
    assert families == {family for family in FAMILIES if adapter_for(family).flag("windowed", {})}


@pytest.mark.parametrize(
    "name, implementation", [*itertools.product(WINDOWED[:-1], ("sdpa", "eager")), ("gemma2-9/3", "eager")]
)
@torch.no_grad()
def test_masks_of_transformers_have_the_windows(name, implementation):
    """Catches keys skipped that the mask shows: an edge off by one, a layer without a window, a family without any."""
    model, seen = patched(name), {}
    model.set_attn_implementation(implementation)
    for layer in model.model.layers:

        def hook(module, args, kwargs):
            seen[module] = kwargs["attention_mask"], cache.masks_have_windows

        layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)
    cache = KVCache(2, 20)
    model(prompt(), past_key_values=cache)
    model(prompt(2, 1), past_key_values=cache)
    for attention_module, (mask, is_known) in seen.items():
        window = attention_module.sliding_window
        if mask is not None and mask.dtype != torch.bool:
            mask = mask == 0
        visible = torch.arange(10) > 9 - (window or 10)
        assert is_known and (window is None if mask is None else torch.equal(mask, visible.expand_as(mask)))
    assert {module.sliding_window for module in seen} - {None} == {4} and not cache.masks_have_windows


@torch.no_grad()
def test_what_has_left_the_window_is_not_read(launches):
    """Catches a cache that is read whole, by torch's attention as well, and a token too few or too many of it."""
    whole, model, cache = reference("mistral-sliding").copy(), patched("mistral-sliding"), KVCache(2, 20)
    theirs = DynamicCache(config=whole.config)
    for ids in (prompt(), prompt(2, 1, seed=3)):
        want = whole(ids, past_key_values=theirs).logits
        got = model(ids, past_key_values=cache).logits
        for layer in cache.layers:
            layer.keys[:, :, : -3] = layer.values[:, :, : -3] = torch.nan
    assert_close(got, want)
    assert launches == [4, 4]


@torch.no_grad()
def test_a_window_is_taken_from_transformers_own_masks_only(launches, monkeypatch):
    """Catches keys skipped that another's mask may show: made by the caller or his function, in or out of a pass."""
    model, cache, ids = patched("mistral-sliding"), KVCache(2, 20), prompt(2, 1)
    tokens, keys = torch.ones(2, 11, dtype=torch.int64), torch.ones(2, 1, 1, 14, dtype=torch.bool)
    model(prompt(), past_key_values=cache)
    model(ids, past_key_values=cache)
    model.model(ids, tokens, past_key_values=cache)
    assert launches == [4] * 4
    model.model(ids, keys[..., :12], past_key_values=cache)
    embeddings = model.model.rotary_emb(torch.empty(0), torch.tensor([[12]]))
    hidden = torch.randn(2, 1, model.config.hidden_size)
    model.model.layers[0](hidden, keys, position_embeddings=embeddings, past_key_values=cache)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa", lambda **_: keys)
    model(ids, past_key_values=cache)
    assert launches == [4] * 4 + [None] * 5


@torch.no_grad()
def test_a_token_past_a_static_cache_is_an_error(launches):
    """Catches a write beside the cache, or a token that is lost."""
    model = patched("llama-12/4")
    cache = StaticCache(config=model.config, max_cache_len=9)
    model(prompt(), past_key_values=cache)
    with pytest.raises(ValueError, match=r"outside of a cache of 9 tokens: make it larger \(max_cache_len\)"):
        model(prompt(2, 1), past_key_values=cache)


# Launches

# Ops a layer at decode, as one of two ranks and, where that is another number, alone. Beyond 7: olmo2 norms q and k
# over all ranks' heads, and sums their squares over ranks, which is not counted here.
SEVEN = ("llama", "qwen3", "gemma2", "gemma3_text", "granite", "phi3", "smollm3", "cohere", "starcoder2")
LAUNCHES = {
    **dict.fromkeys(SEVEN, 7),
    "olmo2": 8,
    "olmo2 alone": 7,
}
SAME_LAYERS = {
    "gemma2": {"layer_types": ["full_attention"] * 2},
    "gemma3_text": {"layer_types": ["full_attention"] * 2},
    "smollm3": {"no_rope_layers": [1, 1]},
}


def launched(node: torch.fx.Node) -> bool:
    """Whether a node of a graph computes: not a size, a part of a result, or a view."""
    value = node.meta.get("example_value")
    if node.op not in ("call_function", "call_method") or node.target is operator.getitem or value is None:
        return False
    is_view = isinstance(value, torch.Tensor) and value._is_view() and not str(node.target).endswith("_")
    return isinstance(value, torch.Tensor | list | tuple) and not is_view


@pytest.mark.parametrize("name", LAUNCHES)
@torch.no_grad()
def test_launches_of_a_layer(name, launches):
    """Catches an op more in each layer: at decode, where a launch costs what the work does."""
    family, *alone = name.split()
    model = tiny(family, (9, 3), **SAME_LAYERS.get(family, {}))
    tp_runtime.patch(model, NullCommunicator(0, 1 if alone else 2))
    cache = KVCache(2, 32)
    model(prompt(), past_key_values=cache)
    hidden, positions = torch.randn(2, 1, model.config.hidden_size), torch.full((1, 1), 9)
    of_layer = ("full_attention",) if family == "gemma3_text" else ()
    embeddings = model.model.rotary_emb(hidden, positions, *of_layer)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=backend)
    def layers(hidden):
        for layer in model.model.layers:
            hidden = layer(hidden, position_embeddings=embeddings, past_key_values=cache)
        return model.model.norm(hidden)

    torch._dynamo.reset()
    patch_of(model).ahead.during(layers)(hidden)
    torch._dynamo.reset()
    ops = [str(node.target) for node in graphs[0].graph.nodes if launched(node)]
    first, second = (i for i, op in enumerate(ops) if "rope_decode_attention" in op)
    assert second - first == LAUNCHES[name], ops[first + 1 : second + 1]

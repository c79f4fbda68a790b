"""torch.compile of patched models: one graph of our ops, on every kind of rank, and no graph more for each token."""

import functools
import gc
import re
import shutil
import sysconfig
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gloo_ranks import run_gloo
from tiny_models import SPARSE, TOLERANCE, one_thread, prompt, tiny  # noqa: F401
from transformers import CompileConfig, DynamicCache, PreTrainedModel, StaticCache

import tp_runtime
from tp_runtime.cache import KVCache
from tp_runtime.comm import NullCommunicator
from tp_runtime.models.adapter import FAMILIES

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "one_thread")

# Of each, the modules are those of another family here.
ALIKE = ("mistral", "qwen2", "qwen3", "gemma2", "granite", "smollm3")
DENSE = [family for family in FAMILIES if family not in (*SPARSE, *ALIKE)]
TP, NEW_TOKENS = 2, 10
CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=32),
    "ours": lambda model: KVCache(model.config.num_hidden_layers, 32),
}
CASES = {
    "alone": [("llama", "dynamic"), ("llama", "static"), ("llama", "ours"), ("gemma3_text", "dynamic")],
    "others": [(family, "dynamic") for family in DENSE if family not in ("llama", "gemma3_text")],  # minutes
    "gloo": [("llama", "dynamic"), ("llama", "static")],
}
EVERY_CASE = [
    pytest.param(kind, *case, marks=pytest.mark.slow if kind == "others" else ())
    for kind, cases in CASES.items()
    for case in cases
]
BACKENDS: dict[str, dict] = {"aot_eager": {"backend": "aot_eager"}}
if shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists():
    # Without compiling in processes, which stay, and headers, of which a test uses few.
    BACKENDS["inductor"] = {"options": {"compile_threads": 1, "cpp_cache_precompile_headers": False}}


@pytest.fixture
def fresh_dynamo():
    """torch compiles a function only so often for all of a process: what earlier tests compiled does not count."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def recorder(graphs: list[Counter]) -> Callable:
    """A backend for torch.compile: AOT autograd, which keeps account of our ops in each graph that it is given."""
    compile_graph = torch._dynamo.lookup_backend("aot_eager")

    def backend(graph: torch.fx.GraphModule, inputs: list):
        ops = (re.search(r"tp_runtime\.(\w+)", str(node.target)) for node in graph.graph.nodes)
        graphs.append(Counter(op[1] for op in ops if op))
        return compile_graph(graph, inputs)

    return backend


def small(family: str) -> PreTrainedModel:
    """Of one layer: a layer's Python is read anew for each that a model has."""
    return tiny(family, (12, 4), num_hidden_layers=1)


@torch.no_grad()
def decode(model, forward, make_cache) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the last token at each step, [B, steps, V], and the tokens, [B, steps]: a prompt, then greedily.

    Only the steps behind the prompt go through `forward`, as in Hugging Face's generate().
    """
    cache, ids, logits = make_cache(model), prompt(), []
    for step in range(NEW_TOKENS):
        logits.append((forward if step else model)(ids, past_key_values=cache).logits[:, -1])
        ids = logits[-1].argmax(-1, keepdim=True)
    logits = torch.stack(logits, dim=1)
    return logits, logits.argmax(-1)


def compiled(comm, kind: str = "gloo") -> dict:
    """One rank's results by case: logits of a prompt, then `decode`'s, and the graphs that each took."""
    out = {}
    for family, cache in CASES[kind]:
        model = small(family)
        tp_runtime.patch(model, comm)
        prefill_graphs: list[Counter] = []
        decode_graphs: list[Counter] = []
        torch._dynamo.reset()
        with torch.no_grad():
            prefill = torch.compile(model, fullgraph=True, backend=recorder(prefill_graphs))
            logits = prefill(prompt(), use_cache=False).logits
        forward = torch.compile(model, fullgraph=True, backend=recorder(decode_graphs))
        out[family, cache] = logits, *decode(model, forward, CACHES[cache]), prefill_graphs, decode_graphs
    return out


@functools.cache
def ranks(kind: str) -> list[dict]:
    """Every rank's results: of one alone, or of two processes."""
    return run_gloo(compiled, TP) if kind == "gloo" else [compiled(NullCommunicator(), kind)]


@pytest.mark.parametrize("kind, family, cache", EVERY_CASE)
def test_a_compiled_model_is_the_unsharded_one(kind, family, cache):
    """Catches what cannot be captured, a collective left out of a graph, a sum that functionalisation loses."""
    whole = small(family)
    with torch.no_grad():
        want = whole(prompt(), use_cache=False).logits, *decode(whole, whole, CACHES["dynamic"])
    for rank in ranks(kind):
        prefilled, decoded, tokens, *_ = rank[family, cache]
        torch.testing.assert_close(prefilled, want[0], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(decoded, want[1], rtol=0, atol=TOLERANCE)
        assert torch.equal(tokens, want[2])
        assert torch.equal(decoded, ranks(kind)[0][family, cache][1])


@pytest.mark.parametrize("kind, family, cache", EVERY_CASE)
def test_a_graph_serves_every_token(kind, family, cache):
    """Catches a graph for each token; a second one is due when a size is seen to grow."""
    for rank in ranks(kind):
        *_, prefilled, decoded = rank[family, cache]
        assert (len(prefilled), len(decoded)) == (1, 1 if cache == "static" else 2)


@pytest.mark.parametrize("kind, family, cache", EVERY_CASE)
def test_a_graph_is_made_of_our_ops(kind, family, cache):
    """Catches a layer that leaves its kernel when it is compiled, a collective too few or too many."""
    for rank in ranks(kind):
        *_, prefilled, decoded = rank[family, cache]
        for ops in prefilled + decoded:
            gated = int(family != "starcoder2")
            # q k v, o, down, lm_head, and what goes up; or gate and up.
            assert (ops["gemm"], ops["gated_gemm"]) == (5 - gated, gated)
            # Of the embedding, o and down; of lm_head.
            assert (ops["all_reduce_"], ops["all_gather"]) == ((3, 1) if kind == "gloo" else (0, 0))


def test_ranks_that_are_threads():
    """Catches a graph that meets with the communicator of another rank, whose thread compiled the same function."""

    def run(comm):
        model = small("llama")
        tp_runtime.patch(model, comm)
        return decode(model, torch.compile(model, fullgraph=True, backend="aot_eager"), CACHES["static"])

    whole = small("llama")
    logits, tokens = decode(whole, whole, CACHES["dynamic"])
    for ours, chosen in tp_runtime.run_local(run, TP):
        torch.testing.assert_close(ours, logits, rtol=0, atol=TOLERANCE)
        assert torch.equal(chosen, tokens)


@torch.no_grad()
def test_what_records_hidden_states_is_not_in_the_graph():
    """Catches a break, or a norm that is no longer normed ahead, where transformers has left its hooks behind."""
    model = small("llama")
    graphs: list[Counter] = []
    tp_runtime.patch(model)
    model(prompt(), use_cache=False, output_hidden_states=True)
    torch.compile(model, fullgraph=True, backend=recorder(graphs))(prompt(), use_cache=False)
    assert [ops["rms_norm"] for ops in graphs] == [3]  # before attention; with a sum before it, behind it and at last


def test_hugging_faces_generate_compiles():
    """Catches a patched model that Hugging Face's generate() does not compile, as it does on a GPU, or compiles once
    for all: unpatched, the same model is another program."""
    graphs: list[Counter] = []
    backend = recorder(graphs)

    def run(comm):
        config = CompileConfig(fullgraph=True, backend=backend, mode=None)
        config._compile_all_devices = True
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "cache_implementation": "static"}
        model = small("llama")
        tp_runtime.patch(model, comm)
        patched = model.generate(prompt(), compile_config=config, **options)
        num_graphs = len(graphs)
        tp_runtime.unpatch(model)
        return patched, num_graphs, model.generate(prompt(), compile_config=config, **options)

    want = small("llama").generate(prompt(), max_new_tokens=NEW_TOKENS, do_sample=False)
    for patched, num_graphs, unpatched in tp_runtime.run_local(run, TP):
        assert torch.equal(patched, want) and torch.equal(unpatched, want)
        assert num_graphs > 0
    assert graphs[0]["all_gather"] and not graphs[-1]


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in ("mixtral", "llama4_text") else pytest.mark.slow) for f in SPARSE]
)
def test_experts_are_in_the_graph(family):
    """Catches counts of tokens that the host reads: a break in the graph, or one for each count."""
    model = tiny(family, (12, 4))
    with torch.no_grad():
        want = [model(prompt(seed=seed), use_cache=False).logits for seed in (1, 2)]
        tp_runtime.patch(model)
        graphs: list[Counter] = []
        forward = torch.compile(model, fullgraph=True, backend=recorder(graphs))
        got = [forward(prompt(seed=seed), use_cache=False).logits for seed in (1, 2)]
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)
    assert len(graphs) == 1


def sums_in_place(comm, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What a graph may lose: a result nobody takes, a sum of a view, a whole that holds the view."""
    y = 2 * x
    z = comm.all_reduce(y)
    part = z[:, 1:]
    comm.all_reduce(part)
    return z + y, comm.all_gather(z, [z.shape[1]] * comm.size)


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_in_a_graph_is_in_place(backend, tmp_path, monkeypatch):
    """Catches an op that leaves its input, which eager code has summed, as it was; buffers that inductor reuses."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x = torch.arange(6.0).view(2, 3)
    want = torch.tensor([2.0, 4.0, 4.0]) * 2 * x

    def run(comm):
        compiled = torch.compile(sums_in_place, fullgraph=True, **BACKENDS[backend])
        return sums_in_place(comm, x.clone()), compiled(comm, x.clone())

    for rank in tp_runtime.run_local(run, TP):
        for doubled, gathered in rank:
            assert torch.equal(doubled, 2 * want)
            assert torch.equal(gathered, torch.cat((want, want), dim=-1))


def test_ops_keep_their_word():
    """Catches a fake whose shape or strides differ, and a schema that hides what is written."""
    ops = torch.ops.tp_runtime

    def run(comm):
        for x in (torch.randn(2, 3), torch.randn(3, 2).T, torch.randn(0, 3).to(torch.bfloat16)):
            torch.library.opcheck(ops.all_reduce_, (x, comm.number))

    tp_runtime.run_local(run, 1)
    comm = NullCommunicator(1, 3)
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(ops.all_gather, (torch.randn(2, 3).to(dtype), [1, 3, 0], comm.number))


def test_a_communicator_that_is_gone():
    """Catches communicators, and with them their groups, that live as long as the process."""
    comm = NullCommunicator()
    number = comm.number
    del comm
    gc.collect()
    with pytest.raises(ValueError, match=f"communicator {number} of this graph is gone"):
        torch.ops.tp_runtime.all_reduce_(torch.ones(1), number)

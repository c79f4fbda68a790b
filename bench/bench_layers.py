"""The layers that hold a rank's part, one rank without peers, on the CPU: `pytest bench --benchmark-only`.

Shapes are those of real models, named by model, role and tp_size; each layer beside what Hugging Face or torch has for
the same local shapes. Each call takes the next of several copies of the weights, so that no cache can help. Ours is
compared with the other side's output before it is timed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from tp_runtime.comm import NullCommunicator
from tp_runtime.experts import ParallelExperts
from tp_runtime.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from tp_runtime.overlap import Overlap

NUM_COPIES = 8
SIDES = ("torch", "ours")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# model, role, tp_size -> N, K of one rank
LINEARS = {
    "Llama-3.2-1B qkv tp4": (768, 2048),
    "Llama-3.2-1B o tp4": (2048, 512),
    "Llama-3.2-1B gate_up tp4": (4096, 2048),
    "Llama-3.2-1B down tp4": (2048, 2048),
}
# rows of one rank, hidden
EMBEDDINGS = {"Llama-3.2-1B embed tp8": (128256 // 8, 2048)}
# experts, width, hidden, experts a token
EXPERTS = {"Qwen3-30B-A3B experts tp8": (128, 768 // 8, 2048, 8)}


@pytest.fixture(autouse=True)
def one_thread():
    """As a rank on a machine with as many ranks as cores; no gradients."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(num_threads)


def in_turn(calls: list[Callable]) -> Callable:
    """Calls the next one each time."""
    following = itertools.cycle(calls)
    return lambda: next(following)()


def linear(shape: str, dtype: torch.dtype) -> torch.nn.Module:
    n, k = LINEARS[shape]
    like = torch.empty(0, dtype=dtype)
    if " o " in shape or " down " in shape:
        layer = RowParallelLinear(4 * k, k, n, False, like, Overlap(NullCommunicator(0, 4)))
    else:
        layer = ColumnParallelLinear({"": n}, k, False, like)
    layer.weight.data.uniform_(-0.05, 0.05)
    return layer


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("num_tokens", [1, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LINEARS)
def test_linear(benchmark, shape, dtype, num_tokens, side):
    benchmark.group = f"{shape}, {dtype}, M={num_tokens}"
    layers = [linear(shape, DTYPES[dtype]) for _ in range(NUM_COPIES)]
    x = torch.randn(num_tokens, LINEARS[shape][1], dtype=DTYPES[dtype])
    assert torch.equal(layers[0](x), F.linear(x, layers[0].weight))
    calls = {
        "ours": [lambda layer=layer: layer(x) for layer in layers],
        "torch": [lambda w=layer.weight: F.linear(x, w) for layer in layers],
    }
    benchmark(in_turn(calls[side]))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("num_tokens", [1, 512])
@pytest.mark.parametrize("shape", EMBEDDINGS)
def test_embedding(benchmark, shape, num_tokens, side):
    benchmark.group = f"{shape}, float32, M={num_tokens}"
    rows, hidden = EMBEDDINGS[shape]
    layer = VocabParallelEmbedding((rows, 2 * rows), 8 * rows, hidden, torch.empty(0), Overlap(NullCommunicator(1, 8)))
    local = layer.rows().uniform_()
    everywhere = torch.arange(0, 8 * rows, rows // 2).unsqueeze(0)  # tokens of all ranks, two of them ours
    ours = (everywhere >= rows) & (everywhere < 2 * rows)
    assert torch.equal(layer(everywhere)[ours], local[everywhere[ours] - rows]) and not layer(everywhere)[~ours].any()

    batches = [torch.randint(rows, 2 * rows, (1, num_tokens)) for _ in range(NUM_COPIES)]
    calls = {
        "ours": [lambda ids=ids: layer(ids) for ids in batches],
        "torch": [lambda ids=ids - rows: F.embedding(ids, local) for ids in batches],
    }
    benchmark(in_turn(calls[side]))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("num_tokens", [1, 16])
@pytest.mark.parametrize("shape", EXPERTS)
def test_experts(benchmark, shape, num_tokens, side):
    """Different experts for each call take the place of copies of the weights."""
    benchmark.group = f"{shape}, bfloat16, M={num_tokens}"
    num_experts, width, hidden, top_k = EXPERTS[shape]
    like = torch.empty(0, dtype=torch.bfloat16)
    sizes = {"num_experts": num_experts, "moe_intermediate_size": width, "hidden_size": hidden}
    config = AutoConfig.for_model("qwen3_moe", **sizes, num_experts_per_tok=top_k, experts_implementation="eager")
    theirs = Qwen3MoeExperts(config).to(torch.bfloat16)
    ours = ParallelExperts(num_experts, width, hidden, "silu", like, Overlap(NullCommunicator(0, 8)))
    for name in ("gate_up_proj", "down_proj"):
        getattr(ours, name).data = getattr(theirs, name).data.uniform_(-0.05, 0.05)

    def tokens():
        index = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(num_tokens)])
        return torch.randn(num_tokens, hidden, dtype=torch.bfloat16), index, torch.rand(num_tokens, top_k).bfloat16()

    batches = [tokens() for _ in range(NUM_COPIES)]
    want = theirs.float()(*(t.float() if t.is_floating_point() else t for t in batches[0])).float()
    theirs.to(torch.bfloat16)
    error, their_error = ((experts(*batches[0]).float() - want).abs().max() for experts in (ours, theirs))
    assert error <= 2 * their_error
    experts = {"ours": ours, "torch": theirs}[side]
    benchmark(in_turn([lambda batch=batch: experts(*batch) for batch in batches]))

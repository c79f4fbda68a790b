"""Layers cut over ranks against the whole layer, also where a rank holds nothing of it."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from exactness import assert_as_exact_as
from gloo_ranks import run_gloo
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import tp_runtime
from tp_runtime.comm import NullCommunicator
from tp_runtime.experts import ParallelExperts
from tp_runtime.layers import (
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from tp_runtime.overlap import Overlap
from tp_runtime.plan import cut

SIZES = (1, 2, 3, 4, 5)
GLOO_TP = 3
H, N, K, V, E = 24, 30, 37, 13, 4  # hidden, output and input features, vocabulary, experts
DTYPES = (torch.float32, torch.bfloat16)


def rand(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random numbers of variance 1 / (last dimension), the same on every rank."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5).to(dtype)


def part(comm, length: int, unit: int = 4) -> tuple[int, int]:
    return cut(length, comm.size, unit)[comm.rank]


def fill(layer, name: str, **tensors: torch.Tensor) -> None:
    """Copies into the layer's own views, as loading and patching do."""
    views = layer.shards(name)
    assert views.keys() == {key.replace("__", ".") for key in tensors}
    for key, tensor in tensors.items():
        view = views[key.replace("__", ".")]
        assert view.shape == tensor.shape
        view.copy_(tensor)


def as_float(module_or_args, dtype: torch.dtype = torch.float64):
    return [a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in module_or_args]


# Each function: the layer of this rank, filled, and its output. Below it, the whole layer in plain torch.


def gated_columns(comm, dtype: torch.dtype) -> torch.Tensor:
    """gate and up [2 * K, H] with biases, gathered again."""
    x, gate, up, bias = columns_args(dtype)
    a, b = part(comm, K)
    layer = MergedColumnParallelLinear({"gate_proj": b - a, "up_proj": b - a}, H, True, x)
    weights = {"gate_proj__weight": gate[a:b], "up_proj__weight": up[a:b]}
    fill(layer, "gate_proj", **weights, gate_proj__bias=bias[0, a:b], up_proj__bias=bias[1, a:b])
    y = layer(x)
    assert y.shape == (2, 3, 2 * (b - a))
    lengths = [stop - start for start, stop in cut(K, comm.size, 4)]
    return torch.cat([comm.all_gather(half.contiguous(), lengths) for half in y.chunk(2, dim=-1)], dim=-1)


def columns_args(dtype):
    weights = (rand(seed, K, H, dtype=dtype) for seed in (1, 2))
    return rand(0, 2, 3, H, dtype=dtype), *weights, rand(3, 2, K, dtype=dtype)


def gated_columns_whole(x, gate, up, bias):
    return torch.cat((F.linear(x, gate, bias[0]), F.linear(x, up, bias[1])), dim=-1)


def rows(comm, dtype: torch.dtype) -> torch.Tensor:
    x, weight, bias = rows_args(dtype)
    a, b = part(comm, K)
    layer = RowParallelLinear(K, b - a, N, True, x, Overlap(comm))
    fill(layer, "down_proj", down_proj__weight=weight[:, a:b], down_proj__bias=bias)
    return layer(x[..., a:b])


def rows_args(dtype):
    return rand(4, 40, 5, K, dtype=dtype), rand(5, N, K, dtype=dtype), 3 + rand(6, N, dtype=dtype)


rows_whole = F.linear


def head(comm, dtype: torch.dtype) -> torch.Tensor:
    x, weight = head_args(dtype)
    layer = ParallelLMHead(cut(V, comm.size, 4), H, x, comm)
    a, b = part(comm, V)
    fill(layer, "lm_head", lm_head__weight=weight[a:b])
    assert torch.equal(layer.logits_shard_v(x), F.linear(x, weight[a:b]))
    return layer(x)


def head_args(dtype):
    return rand(7, 2, 3, H, dtype=dtype), rand(8, V, H, dtype=dtype)


head_whole = F.linear


def experts(comm, dtype: torch.dtype, top_k_index: torch.Tensor | None = None) -> torch.Tensor:
    x, index, top_k_weights, gate_up, down = experts_args(dtype, top_k_index)
    a, b = part(comm, K)
    layer = ParallelExperts(E, b - a, H, "silu", x, Overlap(comm))
    rows = torch.cat((gate_up[:, a:b], gate_up[:, K + a : K + b]), dim=1)
    fill(layer, "experts", experts__gate_up_proj=rows, experts__down_proj=down[..., a:b])
    return layer(x, index, top_k_weights)


def experts_args(dtype, top_k_index=None):
    index = torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(t))[:2] for t in range(90)])
    index = index if top_k_index is None else top_k_index
    weights = rand(9, *index.shape).abs().to(dtype)
    gate_up, down = rand(11, E, 2 * K, H, dtype=dtype), rand(12, E, H, K, dtype=dtype)
    return rand(10, len(index), H, dtype=dtype), index, weights, gate_up, down


def experts_whole(x, index, weights, gate_up, down):
    """Token by token: nothing sorted, nothing grouped."""
    y = torch.zeros_like(x)
    for t, chosen in enumerate(index.tolist()):
        for k, e in enumerate(chosen):
            gate, up = F.linear(x[t], gate_up[e]).chunk(2)
            y[t] += weights[t, k] * F.linear(F.silu(gate) * up, down[e])
    return y


LAYERS = {
    "gated columns": (gated_columns, gated_columns_whole, columns_args),
    "rows": (rows, rows_whole, rows_args),
    "head": (head, head_whole, head_args),
    "experts": (experts, experts_whole, experts_args),
}


def embedding(comm, ids: torch.Tensor, dtype: torch.dtype = torch.float32, vocab_size: int = V) -> torch.Tensor:
    table = rand(13, vocab_size, H, dtype=dtype)
    a, b = part(comm, vocab_size)
    layer = VocabParallelEmbedding((a, b), vocab_size, H, table, Overlap(comm))
    layer.weight.data.fill_(math.nan)  # what memory may hold that was only allocated
    layer.zero_other_rows()
    fill(layer, "embed_tokens", embed_tokens__weight=table[a:b])
    tied = ParallelLMHead(cut(vocab_size, comm.size, 4), H, table, comm, tied=layer)
    assert tied.shards("lm_head") == {} and torch.equal(tied.weight, table[a:b]) and not list(tied.parameters())
    return layer(ids)


def every_layer(comm) -> dict:
    """What the layers give on one rank, for each dtype."""
    out = {(name, dtype): fn(comm, dtype) for name, (fn, _, _) in LAYERS.items() for dtype in DTYPES}
    ids = torch.arange(V).flip(0).view(1, V)
    return {**out, **{("embedding", dtype): embedding(comm, ids, dtype) for dtype in DTYPES}}


@functools.cache
def outputs(kind: str, tp_size: int) -> list[dict]:
    """Every rank's outputs, as threads or as gloo processes."""
    return run_gloo(every_layer, tp_size) if kind == "gloo" else tp_runtime.run_local(every_layer, tp_size)


RUNS = [*(("local", n) for n in SIZES), ("gloo", GLOO_TP)]


@pytest.mark.parametrize("kind, tp_size", RUNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_cut_layer_is_as_exact_as_the_whole_one(name, dtype, kind, tp_size):
    """Catches another rank's rows or columns, a bias added by every rank, gate and up mixed up, rough sums."""
    _, whole, args = LAYERS[name]
    exact, torchs_own = whole(*as_float(args(dtype))), whole(*args(dtype))
    ours = [rank[name, dtype] for rank in outputs(kind, tp_size)]
    assert all(y.dtype == dtype and torch.equal(y, ours[0]) for y in ours)
    assert_as_exact_as(ours[0], torchs_own, exact)


@pytest.mark.parametrize("kind, tp_size", RUNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_is_exact(dtype, kind, tp_size):
    """Catches tokens at the edges of a part, and rows of other ranks that were allocated and never zeroed."""
    want = rand(13, V, H, dtype=dtype).flip(0)[None]
    assert all(torch.equal(rank["embedding", dtype], want) for rank in outputs(kind, tp_size))


@pytest.mark.parametrize("tp_size", SIZES)
@pytest.mark.parametrize("token", [-1, V, V + 1, 2**40])
def test_embedding_rejects_ids_outside_the_vocabulary(tp_size, token):
    """Catches an id that belongs to no rank and so is embedded as zeros: garbage text where there was an error."""
    with pytest.raises(IndexError):
        tp_runtime.run_local(embedding, tp_size, torch.tensor([[0, token]]))


@pytest.mark.parametrize("vocab_size", [1, 4, 5, 16])
def test_embedding_with_ranks_that_hold_no_vocabulary(vocab_size):
    """Catches an empty rank that answers for the last token, or one that takes an id outside for another's."""
    table = rand(13, vocab_size, H)
    for tp_size in SIZES:
        ids = torch.arange(vocab_size)
        ranks = tp_runtime.run_local(embedding, tp_size, ids, torch.float32, vocab_size)
        assert all(torch.equal(y, table) for y in ranks)
        with pytest.raises(IndexError):
            tp_runtime.run_local(embedding, tp_size, ids + 1, torch.float32, vocab_size)


def experts_of_hugging_face(x, index, weights, gate_up, down):
    """Expert by expert: a GEMM over many tokens rounds otherwise than one over each of them."""
    sizes = {"num_experts": E, "hidden_size": H, "moe_intermediate_size": K}
    config = Qwen3MoeConfig(**sizes, hidden_act="silu", experts_implementation="eager")
    layer = Qwen3MoeExperts(config)
    layer.gate_up_proj.data, layer.down_proj.data = gate_up, down
    with torch.no_grad():
        return layer(x, index, weights)


@pytest.mark.parametrize("tp_size", SIZES)
@pytest.mark.parametrize(
    "index",
    [
        torch.empty(0, 2, dtype=torch.long),
        torch.full((7, 1), 2),
        torch.tensor([[3, 0]] * 5),
        torch.tensor([[0, 1, 2, 3]]),
    ],
    ids=["no token", "one expert", "two of four experts", "every expert"],
)
def test_experts_hit_by_none_some_and_all(index, tp_size):
    """Catches experts without tokens that shift the others' slots, and a batch without tokens."""
    args = experts_args(torch.float32, index)
    exact, hugging_faces = experts_whole(*as_float(args)), experts_of_hugging_face(*args)
    for y in tp_runtime.run_local(experts, tp_size, torch.float32, index):
        assert_as_exact_as(y, hugging_faces, exact)


def test_more_ranks_than_parts():
    """Catches a rank without rows, columns or experts' width: its GEMM, its gather, its shapes in `print`."""
    counted = tp_runtime.run_local(lambda comm: (part(comm, V), every_layer(comm)), 8)
    assert [b - a for (a, b), _ in counted] == [4, 4, 4, 1, 0, 0, 0, 0]
    for name, dtype in counted[0][1]:
        assert all(torch.equal(out[name, dtype], counted[0][1][name, dtype]) for _, out in counted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_is_as_exact_as_hugging_faces(dtype):
    """Catches eps outside the root, and a mean over the wrong dimension."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight = rand(14, 3, 5, H, dtype=dtype) / 100, 1 + rand(15, H, dtype=dtype)
    ours, theirs = RMSNorm(H, 1e-3, x), LlamaRMSNorm(H, 1e-3).to(dtype)
    fill(ours, "norm", norm__weight=weight)
    theirs.weight.data.copy_(weight)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    assert_as_exact_as(ours(x), theirs(x), exact)


def test_qkv_parts_are_stacked_in_order():
    """Catches q, k and v in the order of a dict that somebody sorted, and a bias where there is none."""
    layer = QKVParallelLinear({"q_proj": 4, "k_proj": 2, "v_proj": 2}, H, False, torch.empty(0))
    q, k, v = rand(0, 4, H), rand(1, 2, H), rand(2, 2, H)
    fill(layer, "q_proj", q_proj__weight=q, k_proj__weight=k, v_proj__weight=v)
    assert torch.equal(layer.weight, torch.cat((q, k, v)))
    assert layer.bias is None and not layer.weight.requires_grad


def test_layers_show_their_local_shapes():
    """Catches a `print(model)` that shows the full shapes, or none."""
    comm, like = NullCommunicator(1, 3), torch.empty(0)
    q_k_v = {"q_proj": 4, "k_proj": 2, "v_proj": 2}
    shown = {
        QKVParallelLinear(q_k_v, H, True, like): "out_features_local=8 (q_proj 4 + k_proj 2 + v_proj 2), bias=True",
        RowParallelLinear(21, 7, N, False, like, Overlap(comm)): f"in_features_local=7, out_features={N}, bias=False",
        VocabParallelEmbedding((4, 8), V, H, like, Overlap(comm)): f"vocab=[4, 8) of {V}, hidden_size={H}",
        ParallelLMHead(cut(V, 3, 4), H, like, comm): f"in_features={H}, vocab=[8, 12) of {V}",
        ParallelExperts(E, 5, H, "silu", like, Overlap(comm)): f"num_experts={E}, hidden_size={H}, width_local=5",
    }
    for layer, text in shown.items():
        assert text in repr(layer)

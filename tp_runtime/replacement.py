"""Which of our modules takes the place of which of Hugging Face's; and the record by which `unpatch` undoes it.

What is replaced, by attribute name, in the instance and never in a class:

    model.embed_tokens         VocabParallelEmbedding          layer.mlp (dense)      ParallelMLP
    model.rotary_emb           RotaryEmbedding                 layer.mlp (no gate)    UngatedMLP
    layer.self_attn            ParallelAttention               layer.mlp (sparse)     ParallelMoE
    every norm but torch's     RMSNorm, UnitOffsetRMSNorm,     lm_head                ParallelLMHead
                               WideRMSNorm, LayerNorm          a router's forward     routed
    a layer's forward          DecoderBlock                    model.norm's forward   LastNorm
    the embedding's forward    FirstNorm
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.activations import ACT2FN

from .attention import ParallelAttention, RotaryEmbedding, WideRMSNorm
from .block import Ahead, DecoderBlock, FirstNorm, LastNorm, ParallelMLP, UngatedMLP
from .comm import Communicator
from .experts import ParallelExperts, ParallelMoE, routed
from .layers import (
    ColumnParallelLinear,
    LayerNorm,
    MergedColumnParallelLinear,
    ParallelLMHead,
    PartialLinear,
    QKVParallelLinear,
    RMSNorm,
    RowParallelLinear,
    UnitOffsetRMSNorm,
    VocabParallelEmbedding,
)
from .models.adapter import Adapter, Source
from .overlap import Overlap
from .plan import Plan
from .shard import copies


@dataclass(frozen=True)
class PatchReport:
    """What `patch` replaced, (path, class before, class after) for each module; the bytes of weights on this rank."""

    model_type: str
    tp_rank: int
    tp_size: int
    replaced: tuple[tuple[str, str, str], ...]
    weight_bytes: int

    def __str__(self) -> str:
        counts: dict[tuple[str, str, str], int] = {}
        for path, before, after in self.replaced:
            key = (re.sub(r"\.\d+\.", ".*.", path), before, after)
            counts[key] = counts.get(key, 0) + 1
        size = f"{self.weight_bytes / 2**20:.1f} MiB of weights"
        lines = [f"{self.model_type}, rank {self.tp_rank} of {self.tp_size}, {size}"]
        lines += [f"  {path}: {before} -> {after} ({n})" for (path, before, after), n in counts.items()]
        return "\n".join(lines)


class OwnForward:
    """`forward` as an attribute of one module, its class untouched, until it is removed like a hook.

    Meanwhile the module refuses to be deep-copied: the copy would compute with the parts of the original.
    """

    def __init__(self, module: nn.Module, forward: Callable):
        self._module = module
        module.forward, module.__deepcopy__ = forward, _refuse_to_be_copied

    def remove(self) -> None:
        del self._module.forward, self._module.__deepcopy__


def _refuse_to_be_copied(memo):
    raise ValueError("a copy would compute with the patched model's parts; copy it before patch(), or after unpatch()")


@dataclass
class Patch:
    """What was done to a model: what runs it, and what `unpatch` needs to undo it."""

    comm: Communicator
    plan: Plan
    adapter: Adapter
    overlap: Overlap
    swaps: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    replaced: list[tuple[str, str, str]] = field(default_factory=list)
    hooks: list = field(default_factory=list)
    ahead: Ahead = field(default_factory=Ahead)
    report: PatchReport | None = None

    def swap(self, model: nn.Module, path: str, new: nn.Module) -> None:
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        old = getattr(parent, name)
        new.train(old.training)
        setattr(parent, name, new)
        self.swaps.append((parent, name, old))
        self.replaced.append((path, type(old).__name__, type(new).__name__))


def replace_modules(model: nn.Module, state: Patch) -> None:
    """Replaces what the table above says; each new module has this rank's part of the weights."""
    state.parameters.update(model.named_parameters())
    _replace_embedding(model, state)
    for index, layer in enumerate(model.model.layers):
        _replace_layer(model, state, f"model.layers.{index}", layer)
    _replace_norm(model, state, "model.norm")
    _fuse_layers(model, state)
    _replace_head(model, state)


def _fill(model_path: str, new: nn.Module, state: Patch) -> nn.Module:
    """Copies this rank's part of the parameters that `new` replaces into it and releases theirs."""
    parent, _, name = model_path.rpartition(".")
    for key, view in new.shards(name).items():
        full_name = f"{parent}.{key}" if parent else key
        parameter = state.parameters[full_name]
        if parameter.is_meta:
            continue
        entry = state.plan.parameter(full_name)
        with torch.no_grad():
            for copy in copies(entry, state.comm.rank, Source(full_name, entry.shape)):
                view[copy.local_index].copy_(parameter[copy.stored_index])
            parameter.data = parameter.data.new_empty(0)
    return new


def _replace_embedding(model: nn.Module, state: Patch) -> None:
    old, entry = model.model.embed_tokens, state.plan.parameter("model.embed_tokens.weight")
    vocab_size, hidden_size = entry.shape
    vocab, scale = entry.ranges[state.comm.rank][0], getattr(old, "scalar_embed_scale", 1.0)
    new = VocabParallelEmbedding(vocab, vocab_size, hidden_size, old.weight, state.overlap, scale)
    state.swap(model, "model.embed_tokens", _fill("model.embed_tokens", new, state))
    state.swap(model, "model.rotary_emb", RotaryEmbedding(model.model.rotary_emb, state.adapter.rope))


def _replace_layer(model: nn.Module, state: Patch, path: str, layer: nn.Module) -> None:
    like = model.model.norm.weight.new_empty(0)
    for name, _ in list(layer.named_children()):
        if name.endswith("norm"):
            _replace_norm(model, state, f"{path}.{name}")
    # Its block adds up the parts; a forward of someone's own, which stays, takes them whole.
    is_partial = state.adapter.flag("parallel", {}) and not _has_own_forward(layer)
    _replace_attention(model, state, f"{path}.self_attn", layer.self_attn, like, is_partial)
    path, block = f"{path}.{state.adapter.feed_forward}", getattr(layer, state.adapter.feed_forward)
    if hasattr(block, "experts"):
        _replace_moe(model, state, path, block, like)
    else:
        mlp = _ungated_mlp if hasattr(block, "c_fc") else _mlp
        state.swap(model, path, mlp(model, state, path, like, is_partial))


def _has_own_forward(layer: nn.Module) -> bool:
    """Whether someone has wrapped this one layer, as accelerate does."""
    return "forward" in vars(layer)


def _fuse_layers(model: nn.Module, state: Patch) -> None:
    layers, norm, norm_in = list(model.model.layers), model.model.norm, state.adapter.norms[0]
    if layers and norm_in and not _has_own_forward(layers[0]) and not state.adapter.flag("scaled_embedding", {}):
        embedding, first_norm = model.model.embed_tokens, layers[0]._modules[norm_in]
        first = FirstNorm(embedding, layers[0], first_norm, state.ahead)
        state.hooks.append(OwnForward(embedding, first.forward))
    for layer, following in zip(layers, [*layers[1:], None]):
        if _has_own_forward(layer):
            continue
        block = DecoderBlock(layer, following, norm, state.adapter, state.ahead, state.overlap)
        state.hooks.append(OwnForward(layer, block.forward))
    state.hooks.append(OwnForward(norm, LastNorm(norm, state.ahead).forward))


def _replace_attention(
    model: nn.Module, state: Patch, path: str, attention: nn.Module, like: torch.Tensor, is_partial: bool
) -> None:
    for norm in ("q_norm", "k_norm"):
        if hasattr(attention, norm):
            _replace_norm(model, state, f"{path}.{norm}")
    adapter, is_packed = state.adapter, hasattr(attention, "qkv_proj")
    names = ("qkv_proj",) if is_packed else ("q_proj", "k_proj", "v_proj")
    qkv_proj = _columns(QKVParallelLinear, state, path, names, like)
    o_proj = _rows(state, f"{path}.o_proj", like, is_partial)
    softcap = getattr(model.config, adapter.attention_softcap) if adapter.attention_softcap else None
    heads, is_windowed = state.plan.heads[state.comm.rank], adapter.flag("windowed", {})
    new = ParallelAttention(attention, heads, qkv_proj, o_proj, adapter.rope, is_windowed, softcap)
    state.swap(model, path, new)


def _mlp(model: nn.Module, state: Patch, path: str, like: torch.Tensor, is_partial: bool) -> ParallelMLP:
    is_packed = f"{path}.gate_up_proj.weight" in state.parameters
    names = ("gate_up_proj",) if is_packed else ("gate_proj", "up_proj")
    gate_up_proj = _columns(MergedColumnParallelLinear, state, path, names, like)
    down_proj = _rows(state, f"{path}.down_proj", like, is_partial)
    activation = getattr(model.config, state.adapter.activation)
    return ParallelMLP(gate_up_proj, down_proj, activation, ACT2FN[activation])


def _ungated_mlp(model: nn.Module, state: Patch, path: str, like: torch.Tensor, is_partial: bool) -> UngatedMLP:
    c_fc = _columns(ColumnParallelLinear, state, path, ("c_fc",), like)
    c_proj = _rows(state, f"{path}.c_proj", like, is_partial)
    activation = getattr(model.config, state.adapter.activation)
    return UngatedMLP(c_fc, c_proj, activation, ACT2FN[activation])


def _replace_moe(model: nn.Module, state: Patch, path: str, block: nn.Module, like: torch.Tensor) -> None:
    routing, config, rank = state.adapter.routing, model.config, state.comm.rank
    entry = state.plan.parameter(f"{path}.experts.down_proj")
    is_transposed = entry.dim == 1
    num_experts, hidden_size, width = entry.local_shape(rank)
    if is_transposed:
        hidden_size, width = width, hidden_size
    experts = ParallelExperts(
        num_experts, width, hidden_size, config.hidden_act, like, state.overlap, is_transposed, routing.weigh_input
    )
    router = getattr(block, routing.router)
    renormalise = state.adapter.flag("renormalised", config.to_dict())
    state.hooks.append(OwnForward(router, routed(router, config.num_experts_per_tok, routing, renormalise)))
    shared = shared_gate = None
    if routing.shared:
        shared = _mlp(model, state, f"{path}.{routing.shared}", like, is_partial=True)  # the block reduces, once
    if routing.shared_gate:
        shared_gate = getattr(block, routing.shared_gate)
    new = ParallelMoE(routing, router, _fill(f"{path}.experts", experts, state), shared, shared_gate)
    state.swap(model, path, new)


def _columns(cls, state: Patch, path: str, names: tuple[str, ...], like: torch.Tensor) -> nn.Module:
    shapes = {name: state.plan.parameter(f"{path}.{name}.weight").local_shape(state.comm.rank) for name in names}
    bias = f"{path}.{names[0]}.bias" in state.parameters
    new = cls({name: rows for name, (rows, _) in shapes.items()}, shapes[names[0]][1], bias, like)
    return _fill(f"{path}.{names[0]}", new, state)


def _rows(state: Patch, path: str, like: torch.Tensor, is_partial: bool) -> RowParallelLinear:
    entry = state.plan.parameter(f"{path}.weight")
    (out_features, in_features), (_, in_features_local) = entry.shape, entry.local_shape(state.comm.rank)
    bias = f"{path}.bias" in state.parameters
    cls = PartialLinear if is_partial else RowParallelLinear
    new = cls(in_features, in_features_local, out_features, bias, like, state.overlap)
    return _fill(path, new, state)


def _replace_norm(model: nn.Module, state: Patch, path: str) -> None:
    old, entry, rank = model.get_submodule(path), state.plan.parameter(f"{path}.weight"), state.comm.rank
    if isinstance(old, nn.LayerNorm):
        return  # torch's own: one op already, and whole on every rank
    eps = old.variance_epsilon if hasattr(old, "variance_epsilon") else old.eps
    if entry.dim is None:
        kinds = {"1 + weight": UnitOffsetRMSNorm, "centered weight": LayerNorm}
        cls = kinds.get(state.adapter.norm, RMSNorm)
        new = cls(old.weight.numel(), eps, old.weight)
    else:
        (start, stop), before = entry.ranges[rank][0], entry.ranges[rank - 1][0][1] if rank else 0
        counted, is_rounded = (max(start, before), stop), state.adapter.norm == "weight"
        new = WideRMSNorm(entry.shape[0], (start, stop), counted, eps, old.weight, is_rounded)
    state.swap(model, path, _fill(path, new, state))


def _replace_head(model: nn.Module, state: Patch) -> None:
    embedding, adapter = model.model.embed_tokens, state.adapter
    is_tied = "lm_head.weight" not in state.parameters
    entry = state.plan.parameter("model.embed_tokens.weight")
    new = ParallelLMHead(
        [ranges[0] for ranges in entry.ranges],
        entry.shape[1],
        embedding.weight,
        state.comm,
        tied=embedding if is_tied else None,
        logits_scaling=getattr(model.config, adapter.logits_scaling) if adapter.logits_scaling else 1.0,
        logits_scale=getattr(model.config, adapter.logits_scale) if adapter.logits_scale else 1.0,
        logits_softcap=getattr(model.config, adapter.logits_softcap) if adapter.logits_softcap else None,
    )
    state.swap(model, "lm_head", _fill("lm_head", new, state))

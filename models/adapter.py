"""What differs between model families, as data: one file a family, one table of weights a file.

A weight's shape is written in letters. Some letters can be cut across ranks; every weight that carries such a letter
is cut by the same partition of it, so that a column-parallel layer's outputs are the inputs of the row-parallel layer
after it:

    vocab       vocabulary                  q    query heads * head size
    ffn         dense intermediate size     kv   key/value heads * head size
    expert_ffn  expert intermediate size    2*expert_ffn  gate and up, stacked in this order

The letters `hidden`, `head_dim` and `experts` are never cut.

This file imports nothing: pre-flight checks and plans are made from it without torch and without transformers.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")

CUT_LETTERS = ("vocab", "q", "kv", "ffn", "expert_ffn")


@dataclass(frozen=True)
class Weight:
    """One parameter of the Hugging Face model.

    Args:
        name: parameter name; `*` stands for the layer index.
        style: how it is cut, in the words of transformers' TP plans (`colwise`, `rowwise`, `packed_colwise`, ...).
        shape: letters, in the order of the tensor's dimensions.
        when: name of the flag (`Adapter.flags`) that must be true for the weight to exist; with `!` in front, false.
        layers: which decoder layers have it: `all`, `dense` or `sparse`.
    """

    name: str
    style: str
    shape: tuple[str, ...]
    when: str = ""
    layers: str = "all"


@dataclass(frozen=True)
class Parameter:
    """A `Weight` of one config: letters resolved to sizes. `layers` is empty for one outside the decoder layers."""

    name: str
    style: str
    letters: tuple[str, ...]
    shape: tuple[int, ...]
    layers: tuple[int, ...]

    def names(self) -> Iterator[str]:
        """Full parameter names, one for each layer."""
        return (self.name.replace("*", str(layer), 1) for layer in self.layers) if self.layers else iter((self.name,))


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint that fills `rows` of (one expert of) a parameter.

    Args:
        name: tensor name on disk.
        shape: its shape on disk.
        expert: the expert that it fills; None where it fills the whole first dimension.
        row: where it starts along the parameter's dimension `-2`.
        transposed: True where the last two dimensions are swapped on disk ([E, H, 2I] for [E, 2I, H]).
    """

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    row: int = 0
    transposed: bool = False


@dataclass(frozen=True)
class Adapter:
    """A model family.

    Args:
        model_type: `model_type` of config.json.
        weights: every parameter of the causal-LM class, in the order of the forward pass.
        defaults: config values that config.json may leave out (the config class's own defaults).
        flags: which optional weights the family has: always (True), or as the named config value says. A flag that is
            not listed is false.
        expert_width: config value that holds the experts' intermediate size.
        on_disk: where published checkpoints use other names or shapes than the live model: suffix of a parameter name
            -> suffixes of the tensors on disk, `{e}` standing for the expert; several are stacked along the rows.
    """

    model_type: str
    weights: tuple[Weight, ...]
    defaults: Mapping[str, object] = field(default_factory=dict)
    flags: Mapping[str, bool | str] = field(default_factory=dict)
    expert_width: str = "intermediate_size"
    on_disk: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def resolve(self, config: Mapping) -> dict:
        """The config with the family's defaults filled in."""
        stated = {k: v for k, v in config.items() if v is not None}
        if "num_experts" in stated:  # one value, two names; transformers writes the other one
            stated["num_local_experts"] = stated.pop("num_experts")
        values = {**self.defaults, **stated}
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
        values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
        return values

    def flag(self, name: str, config: Mapping) -> bool:
        """Whether an optional weight exists under this config."""
        if name.startswith("!"):
            return not self.flag(name[1:], config)
        value = {"tied": "tie_word_embeddings", **self.flags}.get(name, False)
        return bool(self.resolve(config).get(value, False)) if isinstance(value, str) else value

    def letters(self, config: Mapping) -> dict[str, int]:
        """The size that each letter stands for."""
        c = self.resolve(config)
        sizes = {
            "vocab": c["vocab_size"],
            "hidden": c["hidden_size"],
            "head_dim": c["head_dim"],
            "q": c["num_attention_heads"] * c["head_dim"],
            "kv": c["num_key_value_heads"] * c["head_dim"],
            "ffn": c["intermediate_size"],
        }
        if self._has("sparse"):
            sizes["experts"] = c["num_local_experts"]
            sizes["expert_ffn"] = c[self.expert_width]
            sizes["2*expert_ffn"] = 2 * sizes["expert_ffn"]
        return sizes

    def sparse_layers(self, config: Mapping) -> tuple[int, ...]:
        """Indices of the decoder layers that have experts; where a family has both kinds, its config says which."""
        c = self.resolve(config)
        every = range(c["num_hidden_layers"])
        if not self._has("dense"):
            return tuple(every)
        if not self._has("sparse") or not c["num_local_experts"]:
            return ()
        step, dense = c.get("decoder_sparse_step", 1), set(c.get("mlp_only_layers") or ())
        return tuple(i for i in every if i not in dense and (i + 1) % step == 0)

    def _has(self, layers: str) -> bool:
        return any(w.layers == layers for w in self.weights)

    def parameters(self, config: Mapping) -> list[Parameter]:
        """Every parameter that the live model has under this config, tied ones once."""
        c, sizes = self.resolve(config), self.letters(config)
        sparse = self.sparse_layers(config)
        every = tuple(range(c["num_hidden_layers"]))
        layers_of = {"all": every, "sparse": sparse, "dense": tuple(i for i in every if i not in set(sparse))}
        found = []
        for w in self.weights:
            layers = layers_of[w.layers] if "*" in w.name else ()
            if ("*" in w.name and not layers) or (w.when and not self.flag(w.when, c)):
                continue
            found.append(Parameter(w.name, w.style, w.shape, tuple(sizes[letter] for letter in w.shape), layers))
        return found

    def sources(self, name: str, shape: tuple[int, ...], present: Mapping[str, tuple[int, ...]]) -> tuple[Source, ...]:
        """The tensors on disk that make up parameter `name`, whole shape `shape`.

        The parameter's own name comes first, packed experts in either layout; where it is absent, the names that
        published checkpoints use.

        Args:
            present: every tensor of the checkpoint, name -> shape.
        """
        if name in present:
            swapped = (*shape[:-2], shape[-1], shape[-2]) if len(shape) == 3 else shape
            is_transposed = swapped != shape and tuple(present[name]) == swapped
            return (Source(name, swapped if is_transposed else shape, transposed=is_transposed),)
        for suffix, stored in self.on_disk.items():
            if name.endswith(suffix):
                prefix = name.removesuffix(suffix)
                if "{e}" not in stored[0]:
                    return tuple(Source(prefix + s, shape) for s in stored)
                num_experts, rows, columns = shape
                rows //= len(stored)
                return tuple(
                    Source(prefix + s.format(e=e), (rows, columns), expert=e, row=i * rows)
                    for e in range(num_experts)
                    for i, s in enumerate(stored)
                )
        return (Source(name, shape),)


def adapter_for(model_type: str) -> Adapter:
    """The adapter of a family.

    Raises:
        ValueError: the family is not supported; the message lists those that are.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"model type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    return importlib.import_module(f".{model_type}", __package__).ADAPTER


EMBEDDING = Weight("model.embed_tokens.weight", "embedding_rowwise", ("vocab", "hidden"))
HEAD = (
    Weight("model.norm.weight", "replicate", ("hidden",)),
    Weight("lm_head.weight", "colwise_gather_output", ("vocab", "hidden"), when="!tied"),
)
ATTENTION = (
    Weight("model.layers.*.input_layernorm.weight", "replicate", ("hidden",)),
    Weight("model.layers.*.self_attn.q_proj.weight", "colwise", ("q", "hidden")),
    Weight("model.layers.*.self_attn.q_proj.bias", "colwise", ("q",), when="qkv_bias"),
    Weight("model.layers.*.self_attn.k_proj.weight", "colwise", ("kv", "hidden")),
    Weight("model.layers.*.self_attn.k_proj.bias", "colwise", ("kv",), when="qkv_bias"),
    Weight("model.layers.*.self_attn.v_proj.weight", "colwise", ("kv", "hidden")),
    Weight("model.layers.*.self_attn.v_proj.bias", "colwise", ("kv",), when="qkv_bias"),
    Weight("model.layers.*.self_attn.q_norm.weight", "replicate", ("head_dim",), when="qk_norm"),
    Weight("model.layers.*.self_attn.k_norm.weight", "replicate", ("head_dim",), when="qk_norm"),
    Weight("model.layers.*.self_attn.o_proj.weight", "rowwise", ("hidden", "q")),
    Weight("model.layers.*.self_attn.o_proj.bias", "replicate", ("hidden",), when="o_bias"),
    Weight("model.layers.*.post_attention_layernorm.weight", "replicate", ("hidden",)),
)
GATED_FFN = (
    Weight("model.layers.*.mlp.gate_proj.weight", "colwise", ("ffn", "hidden"), layers="dense"),
    Weight("model.layers.*.mlp.gate_proj.bias", "colwise", ("ffn",), when="mlp_bias", layers="dense"),
    Weight("model.layers.*.mlp.up_proj.weight", "colwise", ("ffn", "hidden"), layers="dense"),
    Weight("model.layers.*.mlp.up_proj.bias", "colwise", ("ffn",), when="mlp_bias", layers="dense"),
    Weight("model.layers.*.mlp.down_proj.weight", "rowwise", ("hidden", "ffn"), layers="dense"),
    Weight("model.layers.*.mlp.down_proj.bias", "replicate", ("hidden",), when="mlp_bias", layers="dense"),
)
EXPERTS = (
    Weight("model.layers.*.mlp.gate.weight", "replicate", ("experts", "hidden"), layers="sparse"),
    Weight(
        "model.layers.*.mlp.experts.gate_up_proj",
        "packed_colwise",
        ("experts", "2*expert_ffn", "hidden"),
        layers="sparse",
    ),
    Weight("model.layers.*.mlp.experts.down_proj", "rowwise", ("experts", "hidden", "expert_ffn"), layers="sparse"),
)

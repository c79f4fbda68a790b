"""What differs between model families, as data: one file a family, one table of weights a file.

A weight's shape is written in letters. Some letters can be cut across ranks; every weight that carries such a letter
is cut by the same partition of it, so that a column-parallel layer's outputs are the inputs of the row-parallel layer
after it:

    vocab       vocabulary                      q    query heads * head size
    ffn         dense intermediate size         kv   key/value heads * head size
    expert_ffn  expert intermediate size
    shared_ffn  shared expert's intermediate size

Letters with a plus between them are stacked in this order, and each is cut by itself: `q+kv+kv`, `ffn+ffn`. The letters
`hidden`, `head_dim`, `experts` and `one` are never cut.

This file imports nothing: pre-flight checks and plans are made from it without torch and without transformers.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

FAMILIES = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"),
    *("qwen2_moe", "olmoe", "granitemoe", "llama4_text"),
    *("gemma2", "gemma3_text", "granite", "starcoder2", "phi3", "smollm3", "olmo2", "cohere"),
)


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
class Routing:
    """How the tokens of a sparse layer choose their experts, and what its block has beside them.

    Args:
        scoring: what the weights of the chosen experts are, in the words of `kernels/routing.py`.
        is_rounded: whether the weights are rounded to the model's dtype; else they stay float32.
        weigh_input: whether an expert's input is multiplied by the weight, instead of its output.
        router: the router's name in the block.
        shared: name of the expert in the block that every token takes; empty where there is none.
        shared_gate: name of the linear layer whose sigmoid multiplies the shared expert's output; empty: none.
        returns_logits: whether the block returns a pair, its output and the router's logits.
    """

    scoring: str = "softmax"
    is_rounded: bool = True
    weigh_input: bool = False
    router: str = "gate"
    shared: str = ""
    shared_gate: str = ""
    returns_logits: bool = False


@dataclass(frozen=True)
class Adapter:
    """A model family.

    Args:
        model_type: `model_type` of config.json.
        weights: every parameter of the causal-LM class, in the order of the forward pass.
        defaults: config values that config.json may leave out (the config class's own defaults).
        flags: which optional weights the family has: always (True), or as the named config value says. A flag that is
            not listed is false.
            Beside weights: `renormalised`, whether the weights of a token's experts are made to sum to 1; `windowed`,
            whether the attention function is told the config's sliding window, as the mask of such a layer has it;
            `no_rope_layers`, whether the config's list of that name says which layers know no positions;
            `untold_positions`, whether a layer keeps the position ids from its attention function; `parallel`, whether
            attention and the feed-forward block read the same norm, so that one all-reduce sums both;
            `scaled_embedding`, whether the model multiplies what its embedding returns before the first layer.
        widths: the config value that holds the size of each letter of an intermediate size.
        activation: the config value that names the feed-forward block's activation.
        feed_forward: name of the feed-forward block in a decoder layer.
        routing: how its sparse layers choose experts.
        sparse_step: config value n: every n-th layer is sparse, in a family that has both kinds.
        dense_layers: config value that lists layers which are dense nevertheless.
        sparse_layers_list: config value that, where it is given, lists the sparse layers instead.
        rope: which elements of a head the rotary embedding turns together: `halves`, i and i + D / 2, or `pairs`, 2i
            and 2i + 1; `partial halves`: of a part of the head, which the config gives; `float32 halves`, `float32
            pairs`: in float32; `complex pairs`: so, by cos + i sin.
        rope_types: how a config may stretch the positions.
        norms: names of a layer's norms: before attention, behind it, before the feed-forward block, behind it; empty
            where there is none.
        norm: what a normed row is multiplied with: `weight`, the row rounded to the model's dtype before, or, both in
            float32, `float32 weight` or `1 + weight`; `centered weight`: in float32, the row less its mean.
        residual_multiplier: the layer's attribute that what is added to the residual stream is multiplied with.
        layer_types: what the config may call its layers.
        attention_softcap: the config value that attention scores are capped with before the softmax, softly:
            cap * tanh(score / cap).
        logits_softcap: the same of `lm_head`'s output.
        logits_scaling: the config value that the model divides `lm_head`'s output by, where there is one.
        logits_scale: the config value that it multiplies it with.
        refused: config values that the runtime does not support where they are true.
        prefix: what a tensor's name may begin with on disk, where the checkpoint holds other models too.
        module: folder of transformers that the family's code lies in, where it is not the model type.
        on_disk: where published checkpoints use other names or shapes than the live model: suffix of a parameter name
            -> suffixes of the tensors on disk, `{e}` standing for the expert; several are stacked along the rows.
    """

    model_type: str
    weights: tuple[Weight, ...]
    defaults: Mapping[str, object] = field(default_factory=dict)
    flags: Mapping[str, bool | str] = field(default_factory=dict)
    widths: Mapping[str, str] = field(default_factory=dict)
    activation: str = "hidden_act"
    feed_forward: str = "mlp"
    routing: Routing = Routing()
    sparse_step: str = "decoder_sparse_step"
    dense_layers: str = "mlp_only_layers"
    sparse_layers_list: str = ""
    rope: str = "halves"
    rope_types: tuple[str, ...] = ("default", "linear", "dynamic", "yarn", "llama3")
    norms: tuple[str, str, str, str] = ("input_layernorm", "", "post_attention_layernorm", "")
    norm: str = "weight"
    residual_multiplier: str = ""
    layer_types: tuple[str, ...] = ("full_attention", "sliding_attention")
    attention_softcap: str = ""
    logits_softcap: str = ""
    logits_scaling: str = ""
    logits_scale: str = ""
    refused: tuple[str, ...] = ()
    prefix: str = ""
    module: str = ""
    on_disk: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def resolve(self, config: Mapping) -> dict:
        """The config with the family's defaults filled in."""
        stated = {k: v for k, v in config.items() if v is not None}
        if "num_experts" in stated:  # one value, two names; transformers writes the other one
            stated["num_local_experts"] = stated.pop("num_experts")
        values = {**self.defaults, **stated}
        if config.get("num_key_value_heads", 0) is None:  # a null is no wish for the family's default
            values["num_key_value_heads"] = values["num_attention_heads"]
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
            "one": 1,
        }
        if self._has("sparse"):
            sizes["experts"] = c["num_local_experts"]
        stacks = {letter for w in self.weights for letter in w.shape}
        single = {letter for stack in stacks for letter in stack.split("+")}
        for letter in single & {"ffn", "expert_ffn", "shared_ffn"}:
            sizes[letter] = c[self.widths.get(letter, "intermediate_size")]
        return {**sizes, **{stack: sum(sizes[letter] for letter in stack.split("+")) for stack in stacks}}

    def sparse_layers(self, config: Mapping) -> tuple[int, ...]:
        """Indices of the decoder layers that have experts; where a family has both kinds, its config says which."""
        c = self.resolve(config)
        every = range(c["num_hidden_layers"])
        if not self._has("dense"):
            return tuple(every)
        if not self._has("sparse") or not c["num_local_experts"]:
            return ()
        if (listed := c.get(self.sparse_layers_list)) is not None:
            return tuple(i for i in every if i in set(listed))
        step, dense = c.get(self.sparse_step, 1), set(c.get(self.dense_layers) or ())
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
            return (_whole(name, shape, present),)
        for suffix, stored in self.on_disk.items():
            if name.endswith(suffix):
                prefix = name.removesuffix(suffix)
                if "{e}" not in stored[0]:
                    return (_whole(prefix + stored[0], shape, present),)
                num_experts, rows, columns = shape
                rows //= len(stored)
                return tuple(
                    Source(prefix + s.format(e=e), (rows, columns), expert=e, row=i * rows)
                    for e in range(num_experts)
                    for i, s in enumerate(stored)
                )
        return (Source(name, shape),)


def _whole(name: str, shape: tuple[int, ...], present: Mapping[str, tuple[int, ...]]) -> Source:
    """The source of a parameter that lies in one tensor; packed experts may have their last two dimensions swapped."""
    swapped = (*shape[:-2], shape[-1], shape[-2]) if len(shape) == 3 else shape
    is_transposed = swapped != shape and tuple(present.get(name, ())) == swapped
    return Source(name, swapped if is_transposed else shape, transposed=is_transposed)


def adapter_for(model_type: str) -> Adapter:
    """The adapter of a family.

    Raises:
        ValueError: the family is not supported; the message lists those that are.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"model type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    return importlib.import_module(f".{model_type}", __package__).ADAPTER


EMBEDDING = Weight("model.embed_tokens.weight", "embedding_rowwise", ("vocab", "hidden"))
LM_HEAD = Weight("lm_head.weight", "colwise_gather_output", ("vocab", "hidden"), when="!tied")
HEAD = (Weight("model.norm.weight", "replicate", ("hidden",)), LM_HEAD)
PROJECTIONS = (
    Weight("model.layers.*.self_attn.q_proj.weight", "colwise", ("q", "hidden")),
    Weight("model.layers.*.self_attn.q_proj.bias", "colwise", ("q",), when="qkv_bias"),
    Weight("model.layers.*.self_attn.k_proj.weight", "colwise", ("kv", "hidden")),
    Weight("model.layers.*.self_attn.k_proj.bias", "colwise", ("kv",), when="qkv_bias"),
    Weight("model.layers.*.self_attn.v_proj.weight", "colwise", ("kv", "hidden")),
    Weight("model.layers.*.self_attn.v_proj.bias", "colwise", ("kv",), when="qkv_bias"),
    Weight("model.layers.*.self_attn.q_norm.weight", "replicate", ("head_dim",), when="qk_norm"),
    Weight("model.layers.*.self_attn.k_norm.weight", "replicate", ("head_dim",), when="qk_norm"),
    # Over all heads at once: a mean of which each rank has a part.
    Weight("model.layers.*.self_attn.q_norm.weight", "colwise", ("q",), when="wide_qk_norm"),
    Weight("model.layers.*.self_attn.k_norm.weight", "colwise", ("kv",), when="wide_qk_norm"),
    Weight("model.layers.*.self_attn.o_proj.weight", "rowwise", ("hidden", "q")),
    Weight("model.layers.*.self_attn.o_proj.bias", "replicate", ("hidden",), when="o_bias"),
)


def norm(name: str, part: str = "weight") -> Weight:
    """A norm of a decoder layer, or its bias."""
    return Weight(f"model.layers.*.{name}.{part}", "replicate", ("hidden",))


ATTENTION = (norm("input_layernorm"), *PROJECTIONS, norm("post_attention_layernorm"))
# Of a family with norms before and behind both parts of a layer (Gemma).
NORMS_AROUND = (
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)


def gated_ffn(block: str = "mlp", width: str = "ffn", layers: str = "dense") -> tuple[Weight, ...]:
    """The weights of a gated FFN, one of its own or a shared expert."""
    path = f"model.layers.*.{block}"
    return (
        Weight(f"{path}.gate_proj.weight", "colwise", (width, "hidden"), layers=layers),
        Weight(f"{path}.gate_proj.bias", "colwise", (width,), when="mlp_bias", layers=layers),
        Weight(f"{path}.up_proj.weight", "colwise", (width, "hidden"), layers=layers),
        Weight(f"{path}.up_proj.bias", "colwise", (width,), when="mlp_bias", layers=layers),
        Weight(f"{path}.down_proj.weight", "rowwise", ("hidden", width), layers=layers),
        Weight(f"{path}.down_proj.bias", "replicate", ("hidden",), when="mlp_bias", layers=layers),
    )


def experts(block: str = "mlp", router: str = "gate", is_transposed: bool = False) -> tuple[Weight, ...]:
    """The weights of a router and its packed experts; transposed: [E, H, 2I] and [E, I, H], for x @ w."""
    gate_up, down = ("expert_ffn+expert_ffn", "hidden"), ("hidden", "expert_ffn")
    styles = "packed_colwise", "rowwise"
    if is_transposed:
        gate_up, down, styles = gate_up[::-1], down[::-1], ("packed_rowwise", "colwise")
    path = f"model.layers.*.{block}"
    return (
        Weight(f"{path}.{router}.weight", "replicate", ("experts", "hidden"), layers="sparse"),
        Weight(f"{path}.experts.gate_up_proj", styles[0], ("experts", *gate_up), layers="sparse"),
        Weight(f"{path}.experts.down_proj", styles[1], ("experts", *down), layers="sparse"),
    )


# Names on disk where each expert's projections are tensors of their own.
ONE_BY_ONE = {
    "mlp.experts.gate_up_proj": ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"),
    "mlp.experts.down_proj": ("mlp.experts.{e}.down_proj.weight",),
}

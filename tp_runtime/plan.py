"""The plan: how every parameter is cut, computed from the config alone. No tensors, no processes, no torch.

Three rules cut everything:

1. Query heads go to the ranks in order, as evenly as whole heads allow.
2. A rank holds each key/value head that one of its query heads reads; a head that several ranks read is replicated.
3. FFN width, expert width and vocabulary are cut as evenly as 16-byte units allow, so that every rank's rows and
   columns start where a vector load may; the last part takes what is left, and a rank may get nothing.

Nothing else in the runtime decides how anything is cut: it executes this object.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property

from . import preflight
from .models.adapter import Parameter, adapter_for

Range = tuple[int, int]

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class HeadPlan:
    """Attention heads of one rank.

    Args:
        query: its query heads, [start, stop).
        kv: its key/value heads, [start, stop).
        kv_of_query: for each local query head, the *local* key/value head that it reads.
    """

    query: Range
    kv: Range
    kv_of_query: tuple[int, ...]

    @property
    def num_heads(self) -> int:
        return self.query[1] - self.query[0]

    @property
    def num_kv_heads(self) -> int:
        return self.kv[1] - self.kv[0]


@dataclass(frozen=True)
class ParameterPlan:
    """One parameter, or the same parameter of many layers.

    Args:
        name: parameter name; `*` stands for the layer index.
        style: transformers' word for how it is cut.
        shape: full shape.
        layers: the layers that have it; empty for a parameter outside the decoder layers.
        dim: the dimension that is cut; None where every rank holds all of it.
        ranges: for each rank, the index ranges along `dim` that it holds, in the order in which it stores them.
    """

    name: str
    style: str
    shape: tuple[int, ...]
    layers: tuple[int, ...]
    dim: int | None
    ranges: tuple[tuple[Range, ...], ...]

    @property
    def count(self) -> int:
        """How many tensors this entry stands for."""
        return len(self.layers) or 1

    def local_shape(self, rank: int) -> tuple[int, ...]:
        if self.dim is None:
            return self.shape
        length = sum(stop - start for start, stop in self.ranges[rank])
        return (*self.shape[: self.dim], length, *self.shape[self.dim + 1 :])


@dataclass(frozen=True)
class Collective:
    """A collective of the forward pass; `bytes_per_token` of result for each token, of lm_head for each sequence."""

    name: str
    op: str
    bytes_per_token: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Who holds, reads and sends what, for every rank."""

    model_type: str
    tp_size: int
    dtype: str
    num_layers: int
    head_dim: int
    heads: tuple[HeadPlan, ...]
    parameters: tuple[ParameterPlan, ...]
    collectives: tuple[Collective, ...]

    @cached_property
    def _by_name(self) -> dict[str, ParameterPlan]:
        return {
            p.name.replace("*", str(layer), 1) if p.layers else p.name: p
            for p in self.parameters
            for layer in (p.layers or (0,))
        }

    def names(self) -> list[str]:
        """Every parameter name, layers spelled out."""
        return list(self._by_name)

    def parameter(self, name: str) -> ParameterPlan:
        """The entry of one parameter, by its full name.

        Raises:
            ValueError: the plan has no such parameter.
        """
        try:
            return self._by_name[name]
        except KeyError:
            raise ValueError(f"the {self.model_type} plan has no parameter {name!r}") from None

    def weight_bytes(self, rank: int) -> int:
        """Bytes of weights that `rank` holds."""
        item = ITEM_BYTES[self.dtype]
        return item * sum(p.count * math.prod(p.local_shape(rank)) for p in self.parameters)

    def kv_cache_bytes_per_token(self, rank: int) -> int:
        """Bytes of key/value cache that `rank` writes for one token."""
        return 2 * self.num_layers * self.heads[rank].num_kv_heads * self.head_dim * ITEM_BYTES[self.dtype]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            ValueError: the text is not such a plan.
        """
        try:
            raw = _tuples(json.loads(text))
            raw["heads"] = tuple(HeadPlan(**h) for h in raw["heads"])
            raw["parameters"] = tuple(ParameterPlan(**p) for p in raw["parameters"])
            raw["collectives"] = tuple(Collective(**c) for c in raw["collectives"])
            return cls(**raw)
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"not a plan written by Plan.to_json: {error}") from None


def _tuples(value):
    if isinstance(value, list):
        return tuple(_tuples(v) for v in value)
    return {k: _tuples(v) for k, v in value.items()} if isinstance(value, dict) else value


def cut(length: int, parts: int, unit: int = 1) -> tuple[Range, ...]:
    """[0, length) in `parts` consecutive ranges, as even as whole units allow; earlier parts are never smaller.

    >>> cut(389, 4, unit=8)
    ((0, 104), (104, 200), (200, 296), (296, 389))
    """
    each, extra = divmod(-(-length // unit), parts)
    bounds = [min(length, unit * (each * i + min(i, extra))) for i in range(parts + 1)]
    return tuple(zip(bounds, bounds[1:], strict=False))


def cut_heads(num_heads: int, num_kv_heads: int, tp_size: int) -> tuple[HeadPlan, ...]:
    """Query heads cut evenly; each rank with the key/value heads that they read."""
    group = num_heads // num_kv_heads
    plans = []
    for start, stop in cut(num_heads, tp_size):
        first, last = start // group, (stop - 1) // group
        plans.append(HeadPlan((start, stop), (first, last + 1), tuple(q // group - first for q in range(start, stop))))
    return tuple(plans)


def make_plan(path_or_config, tp_size: int, *, dtype: str = "auto") -> Plan:
    """The plan of a model for `tp_size` ranks. Reads no weights; needs no GPU and no processes.

    Args:
        path_or_config: a checkpoint folder, Hub id or `demo:` name, a config.json as a dict, or a Hugging Face config.
        tp_size: ranks, from 1 to the number of query heads.
        dtype: `float32`, `bfloat16` or `float16`; `auto` takes the config's.

    Raises:
        ValueError: model type without support; tp_size out of range; a config that makes no sense.
    """
    config = path_or_config.to_dict() if hasattr(path_or_config, "to_dict") else path_or_config
    if isinstance(config, Mapping):
        config = preflight.text_part(config)
        preflight.check_config(config)
    else:
        config = preflight.read_config(preflight.resolve(config, weights=False))
    adapter = adapter_for(config["model_type"])
    values = adapter.resolve(config)
    preflight.check_tp_size(config, tp_size)
    if dtype == "auto":
        dtype = preflight.config_dtype(config)
    if dtype not in ITEM_BYTES:
        raise ValueError(f"dtype {dtype!r} is not supported; choose one of {', '.join(ITEM_BYTES)}")

    num_heads, num_kv_heads, head_dim = values["num_attention_heads"], values["num_key_value_heads"], values["head_dim"]
    heads = cut_heads(num_heads, num_kv_heads, tp_size)
    unit = ALIGNMENT_BYTES // ITEM_BYTES[dtype]
    sizes = adapter.letters(config)
    parts: dict[str, tuple[tuple[Range, ...], ...]] = {
        "q": tuple(((h.query[0] * head_dim, h.query[1] * head_dim),) for h in heads),
        "kv": tuple(((h.kv[0] * head_dim, h.kv[1] * head_dim),) for h in heads),
    }
    for letter in ("vocab", "ffn", "expert_ffn", "shared_ffn"):
        if letter in sizes:
            parts[letter] = tuple((part,) for part in cut(sizes[letter], tp_size, unit))
    for stack in sizes:
        if "+" in stack:
            parts[stack] = _stacked(stack.split("+"), parts, sizes)

    parameters = tuple(_cut_parameter(p, parts, tp_size) for p in adapter.parameters(config))
    return Plan(
        model_type=adapter.model_type,
        tp_size=tp_size,
        dtype=dtype,
        num_layers=values["num_hidden_layers"],
        head_dim=head_dim,
        heads=heads,
        parameters=parameters,
        collectives=_collectives(parameters, ITEM_BYTES[dtype], adapter.flag("parallel", {})) if tp_size > 1 else (),
    )


def _stacked(letters: list[str], parts: Mapping, sizes: Mapping[str, int]) -> tuple[tuple[Range, ...], ...]:
    """Each rank's ranges of several cut dimensions that lie one behind the other."""
    ranks: list[tuple[Range, ...]] = [()] * len(parts[letters[0]])
    offset = 0
    for letter in letters:
        moved = [tuple((offset + start, offset + stop) for start, stop in ranges) for ranges in parts[letter]]
        ranks = [before + ranges for before, ranges in zip(ranks, moved, strict=True)]
        offset += sizes[letter]
    return tuple(ranks)


def _cut_parameter(parameter: Parameter, parts: Mapping, tp_size: int) -> ParameterPlan:
    cuttable = [dim for dim, letter in enumerate(parameter.letters) if letter in parts]
    assert len(cuttable) <= 1, f"{parameter.name} has two letters that are cut: {parameter.letters}"
    dim = cuttable[0] if cuttable else None
    whole = (((0, parameter.shape[0]),),) * tp_size
    ranges = whole if dim is None else parts[parameter.letters[dim]]
    return ParameterPlan(parameter.name, parameter.style, parameter.shape, parameter.layers, dim, ranges)


def _collectives(parameters: tuple[ParameterPlan, ...], item_bytes: int, is_parallel: bool) -> tuple[Collective, ...]:
    """One all-reduce after each projection whose input features are cut, routed and shared experts together, and
    all of a parallel layer; one of the sums of squares of a norm whose width is cut; one gather of the logits."""
    vocab, hidden = next(p.shape for p in parameters if p.style == "embedding_rowwise")
    found: dict[tuple[str, tuple[int, ...]], Collective] = {}
    for p in parameters:
        path, _, module = p.name.removesuffix(".weight").rpartition(".")
        if p.dim is None:
            continue
        if module in ("embed_tokens", "o_proj", "down_proj", "c_proj"):
            block = re.sub(r"\.(self_attn|mlp)$" if is_parallel else r"\.(shared_)?experts?$", "", path)
            before = found.get((block, p.layers))
            name = f"{before.name} + {path[len(block) + 1 :]}.{module}" if before else f"{path}.{module}"
            found[block, p.layers] = Collective(name, "all_reduce", hidden * item_bytes, p.layers)
        elif module == "q_norm":
            found[p.name, p.layers] = Collective(f"{path}.q_norm + k_norm", "all_reduce", 2 * 4, p.layers)
    return (*found.values(), Collective("lm_head", "all_gather", vocab * item_bytes, ()))

"""Configuration: two frozen dataclasses. The command's flags come from their fields, so that a default exists once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

_TYPES = {"bool": (bool,), "int": (int,), "float": (float, int), "str": (str,)}


def _option(default, help: str, *aliases: str, choices: tuple[str, ...] | None = None, metavar: str | None = None):
    metadata = {"help": help, "aliases": aliases, "choices": choices, "metavar": metavar}
    return field(default=default, metadata=metadata)


def _check(config) -> None:
    """Makes tuples of lists and single items; ValueError where a value is not of its field's type or not a choice."""
    for spec in dataclasses.fields(config):
        name, value = spec.name, getattr(config, spec.name)
        kind, _, optional = str(spec.type).partition(" | ")
        if optional and value is None:
            continue
        item = kind.removeprefix("tuple[").removesuffix(", ...]")
        if item != kind:
            value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
            object.__setattr__(config, name, value)
        for one in value if item != kind else (value,):
            if not isinstance(one, _TYPES[item]) or (isinstance(one, bool) and item != "bool"):
                raise ValueError(f"{name}={one!r}: must be of type {spec.type}")
        choices = spec.metadata.get("choices")
        if choices and value not in choices:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(choices)}")


def _reject(config, name: str, remedy: str):
    raise ValueError(f"{name}={getattr(config, name)}: must be {remedy}")


@dataclass(frozen=True)
class RuntimeConfig:
    """How a model is run; the same on every rank.

    Raises:
        ValueError: a value of the wrong type or that is none of the choices, or a timeout that is not positive.
    """

    dtype: str = _option(
        "auto", "weights and activations; auto: as stored", choices=("auto", "float32", "bfloat16", "float16")
    )
    device: str = _option("auto", "auto: CUDA where there is a GPU, else the CPU", choices=("auto", "cpu", "cuda"))
    backend: str = _option(
        "auto",
        "collectives; auto: nccl on CUDA, gloo on the CPU; local: all ranks as threads of one process",
        choices=("auto", "nccl", "gloo", "local"),
    )
    overlap: str = _option(
        "auto",
        "hide the all-reduces of a prefill behind its compute; auto: what is measured to be the fastest",
        choices=("auto", "off", "columns", "lanes", "one-shot"),
    )
    timeout_s: float = _option(300.0, "give up when a rank makes no progress for S seconds", "timeout", metavar="S")
    revision: str | None = _option(None, "branch, tag or commit of a Hub id", metavar="REV")
    trust_remote_code: bool = _option(False, "run code that comes with the checkpoint's tokenizer")

    def __post_init__(self):
        _check(self)
        if not 0 < self.timeout_s < float("inf"):
            _reject(self, "timeout_s", "a number of seconds above 0")


@dataclass(frozen=True)
class GenerationOptions:
    """How tokens are chosen. None: as the checkpoint's generation_config.json says, else as Hugging Face's default is.

    `temperature=0` is greedy; a temperature above 0, a top_k or a top_p asks for sampling; else `do_sample` decides.
    A list or a single item will do where a tuple stands.

    Raises:
        ValueError: a value of the wrong type or out of range.
    """

    max_new_tokens: int = _option(64, "at most N new tokens a prompt", metavar="N")
    do_sample: bool | None = field(default=None)
    temperature: float | None = _option(None, "0: greedy; above: sample from the scaled distribution", metavar="T")
    top_k: int | None = _option(None, "sample among the K most probable tokens; 0: no limit", metavar="K")
    top_p: float | None = _option(None, "sample among the fewest tokens of total probability P", metavar="P")
    repetition_penalty: float | None = field(default=None)
    seed: int | None = _option(None, "seed of the draws; without it each run draws anew", metavar="S")
    stop: tuple[str, ...] = _option((), "end a text before TEXT (may be repeated)", metavar="TEXT")
    eos_token_id: tuple[int, ...] | None = field(default=None)

    def __post_init__(self):
        _check(self)
        if self.max_new_tokens < 1:
            _reject(self, "max_new_tokens", "at least 1")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            _reject(self, "temperature", "0 (greedy) or above")
        if self.top_k is not None and self.top_k < 0:
            _reject(self, "top_k", "0 (no limit) or above")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            _reject(self, "top_p", "above 0 and at most 1")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < float("inf"):
            _reject(self, "repetition_penalty", "above 0")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            _reject(self, "seed", "between 0 and 2**63 - 1")
        if "" in self.stop:
            raise ValueError("stop: an empty text would end every answer at once; give it some text or leave it out")

"""Every check that needs no torch: config, weights, arguments, devices. Standard library alone.

They run once, in the launcher, before a rank starts. What cannot work is refused in milliseconds, by a ValueError of
one line that names the file, the values that clash and the remedy. Nothing of a checkpoint is interpreted but JSON.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from .checkpoint_folder import (
    DEMO,
    SUMS,
    file_in,
    hub_repository,
    listed_sums,
    read_json,
    reading,
    resolve,
    verify_sums,
)
from .model_config import (
    MAX_CONFIG_BYTES,
    check_config,
    config_dtype,
    context_length,
    read_config,
    rope_switch,
    text_part,
)
from .models.adapter import Adapter, Source, adapter_for
from .safetensors_header import DTYPE_BYTES, MAX_HEADER_BYTES, TensorEntry, read_header

__all__ = [
    "DTYPE_BYTES",
    "Checkpoint",
    "TensorEntry",
    "check_checkpoint",
    "check_config",
    "check_device",
    "check_prompt_tokens",
    "check_tp_size",
    "config_dtype",
    "count_gpus",
    "read_config",
    "resolve",
    "text_part",
    "verify_sums",
]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # the dtypes that weights may have, in both languages
SUMS_AT_ONCE_BYTES = 64 << 20  # check_checkpoint hashes what has sums and is no larger: 0.1 s at most
DEVICES, PROC_GPUS = Path("/dev"), Path("/proc/driver/nvidia/gpus")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that passed `check_checkpoint`.

    Args:
        path: its folder.
        config: config.json, as `read_config` gives it.
        generation_config: generation_config.json; empty where there is none.
        tensors: what the files hold, by name without the family's prefix; empty where only the config was asked for.
        unused: names of the tensors that no parameter takes.
    """

    path: Path
    config: dict
    generation_config: dict = field(default_factory=dict)
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    @property
    def model_type(self) -> str:
        return self.config["model_type"]

    @property
    def name(self) -> str:
        """For people: `demo:llama`, the Hub id, or the folder's name."""
        folder = self.path.resolve()
        if folder.parent == DEMO.resolve():
            return f"demo:{folder.name}"
        repository = hub_repository(folder)
        return repository.name.removeprefix("models--").replace("--", "/") if repository else folder.name

    @property
    def dtype(self) -> str:
        """The config's dtype, else the one that most bytes are stored in; `float32` where neither says."""
        stored: Counter[str] = Counter()
        for entry in self.tensors.values():
            stored[entry.dtype] += entry.stop - entry.start
        dtypes = [FLOATS[dtype] for dtype, _ in stored.most_common() if dtype in FLOATS]
        return config_dtype(self.config, *dtypes[:1])

    @cached_property
    def _adapter(self) -> Adapter:
        return adapter_for(self.model_type)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.tensors.items()}

    def sources(self, parameter_name: str, shape: tuple[int, ...]) -> tuple[Source, ...]:
        """The stored tensors that make up a parameter of this whole shape."""
        return self._adapter.sources(parameter_name, shape, self._shapes)


def check_checkpoint(path: str | os.PathLike, *, tensors: bool = True) -> Checkpoint:
    """The checkpoint in a folder: config, index, every header and every weight checked; no weight is read.

    Where a SHA256SUMS lists files of at most 64 MiB altogether, they are compared with it: the embedded demos are.

    Args:
        tensors: False: check the configs alone; weights need not be there.

    Raises:
        ValueError: it is no complete, well-formed checkpoint of a supported family.
    """
    folder = Path(path)
    if tensors and file_in(folder, SUMS, "the checkpoint"):
        if sum(os.path.getsize(file) for file, _, _ in listed_sums(folder)) <= SUMS_AT_ONCE_BYTES:
            verify_sums(folder)
    config = read_config(folder)
    generation_config = read_json(folder, "generation_config.json", MAX_CONFIG_BYTES) or {}
    if not tensors:
        return Checkpoint(folder, config, generation_config)
    stored, unlisted = _stored_tensors(folder, config)
    prefix = adapter_for(config["model_type"]).prefix
    stored = {name.removeprefix(prefix): entry for name, entry in stored.items()}
    unlisted = {name.removeprefix(prefix): shard for name, shard in unlisted.items()}
    checkpoint = Checkpoint(folder, config, generation_config, stored)
    used = _check_weights(checkpoint, unlisted)
    return replace(checkpoint, unused=tuple(name for name in stored if name not in used))


def _stored_tensors(folder: Path, config: Mapping) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors that the checkpoint names, and those that only a shard names, with that shard."""
    # JSON takes some twenty times its size in memory: it may be as long as a model of this config needs, and no longer.
    adapter = adapter_for(config["model_type"])
    num_tensors = sum(
        len(adapter.sources(p.name, p.shape, {})) * max(1, len(p.layers)) for p in adapter.parameters(config)
    )
    budget = min(MAX_HEADER_BYTES, 500_000 + 512 * num_tensors)

    weight_map, named_by = {}, "the checkpoint"
    shards = [SINGLE]
    if not file_in(folder, SINGLE, named_by):
        weight_map, named_by = _weight_map(folder, budget), INDEX
        shards = list(dict.fromkeys(weight_map.values()))
    stored: dict[str, TensorEntry] = {}
    unlisted: dict[str, str] = {}
    for shard in shards:
        file = file_in(folder, shard, str(folder / named_by))
        if file is None:
            raise ValueError(f"{folder / shard}, which {named_by} names, is missing; download it again")
        with reading(folder / shard):
            entries, header_bytes = read_header(file, str(folder / shard), budget)
        budget -= header_bytes
        for name, entry in entries.items():
            if not weight_map or weight_map.get(name) == shard:
                stored[name] = entry
            else:
                unlisted[name] = shard
    for name, shard in weight_map.items():
        if name not in stored:
            raise ValueError(f"{folder / shard} lacks {name!r:.200}, which {INDEX} places there; download both again")
    return stored, unlisted


def _weight_map(folder: Path, max_bytes: int) -> dict[str, str]:
    """Tensor name -> file name, as the index of a checkpoint in several files says."""
    index = read_json(folder, INDEX, max_bytes)
    if index is None:
        with reading(folder):
            pickles = sorted(name for name in os.listdir(folder) if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
        if pickles:
            raise ValueError(
                f"{folder} holds its weights as pickle ({pickles[0]!r:.80}), which can run code and is never opened; "
                "convert it where you trust it: from_pretrained(...).save_pretrained(...) writes safetensors"
            )
        raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}: there are no weights to read")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or {type(name) for name in weight_map.values()} != {str}:
        raise ValueError(f"{folder / INDEX} has no weight_map from tensors to files; download it again")
    return weight_map


def _check_weights(checkpoint: Checkpoint, unlisted: Mapping[str, str]) -> set[str]:
    """The names of the tensors that the parameters take; ValueError where one of them cannot be taken."""
    used: set[str] = set()
    for parameter in adapter_for(checkpoint.model_type).parameters(checkpoint.config):
        for name in parameter.names():
            sources = checkpoint.sources(name, parameter.shape)
            for source in sources:
                if source.name not in checkpoint.tensors:
                    raise ValueError(_missing(checkpoint.path, name, source.name, unlisted))
                entry = checkpoint.tensors[source.name]
                if entry.shape != source.shape:
                    raise ValueError(
                        f"{entry.file}: tensor {entry.name!r} has shape {entry.shape}, config.json asks for "
                        f"{source.shape}: they belong to different models; download the checkpoint again"
                    )
                if entry.dtype not in FLOATS:
                    raise ValueError(
                        f"{entry.file}: tensor {entry.name!r} is stored as {entry.dtype}, a weight must be one of "
                        f"{', '.join(FLOATS)}; take or save the checkpoint in one of them"
                    )
            used.update(source.name for source in sources)
    return used


def _missing(folder: Path, parameter_name: str, tensor_name: str, unlisted: Mapping[str, str]) -> str:
    """What to say of a tensor that the checkpoint does not name."""
    if tensor_name in unlisted:
        return f"{folder / INDEX} does not name {tensor_name!r}, which {unlisted[tensor_name]} holds; download it again"
    either = tensor_name if tensor_name == parameter_name else f"{parameter_name}' or '{tensor_name}"
    return f"{folder} holds no tensor '{either}', which its config.json asks for; download the checkpoint again"


def check_tp_size(config: Mapping, tp_size: int) -> None:
    """Raise ValueError unless the query heads of the config can be given to `tp_size` ranks, one at least to each."""
    num_heads = config["num_attention_heads"]
    if type(tp_size) is not int or tp_size < 1:
        raise ValueError(f"tp_size={tp_size!r} is not a number of ranks; choose 1 to {num_heads}")
    if tp_size > num_heads:
        raise ValueError(f"tp_size={tp_size} exceeds {num_heads} query heads; choose 1 to {num_heads}")


def check_prompt_tokens(num_tokens: int, config: Mapping, max_new_tokens: int | None = None) -> None:
    """Raise ValueError where a prompt is empty or, together with `max_new_tokens`, exceeds the model's context."""
    if num_tokens < 1:
        raise ValueError("the prompt is empty: 0 tokens; give some text")
    context = context_length(config)
    if context and num_tokens > context:
        raise ValueError(f"the prompt has {num_tokens} tokens, the model's context {context}; shorten it")
    if context and num_tokens + (max_new_tokens or 0) > context:
        raise ValueError(
            f"a prompt of {num_tokens} tokens and max_new_tokens={max_new_tokens} exceed the model's context of "
            f"{context}; choose max_new_tokens up to {context - num_tokens}, or shorten the prompt"
        )
    switch = rope_switch(config)
    if switch and num_tokens <= switch < num_tokens + (max_new_tokens or 1) - 1:
        raise ValueError(
            f"a prompt of {num_tokens} tokens and max_new_tokens={max_new_tokens} go past "
            f"original_max_position_embeddings={switch}, where longrope turns all tokens anew, which this engine does "
            f"not do; choose max_new_tokens up to {switch - num_tokens + 1}, or patch(model) and model.generate()"
        )


def check_device(device: str, tp_size_on_this_node: int) -> str:
    """The device that this node's ranks run on, `cpu` or `cuda`; for `auto`, CUDA where there are GPUs.

    Raises:
        ValueError: CUDA is asked for and not there, or there are fewer GPUs than ranks.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {device!r} is not supported; choose auto, cpu or cuda")
    num_gpus = count_gpus() if device != "cpu" else 0
    if device == "cpu" or (device == "auto" and not num_gpus):
        return "cpu"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen_through = "" if visible is None else f" through CUDA_VISIBLE_DEVICES={visible!r:.80}"
    if not num_gpus:
        raise ValueError(f"device cuda, but no GPU is visible here{seen_through}; choose --device cpu")
    if not _torch_has_cuda():
        if device == "cuda":
            raise ValueError(
                "device cuda, but the installed torch is built without CUDA; install one with it or choose --device cpu"
            )
        _log.warning("running on the CPU: the installed torch is built without CUDA (GPUs visible: %d)", num_gpus)
        return "cpu"
    if tp_size_on_this_node > num_gpus:
        raise ValueError(
            f"{tp_size_on_this_node} ranks on this node need as many GPUs, visible are {num_gpus}{seen_through}; "
            f"choose --tp {num_gpus} or --device cpu"
        )
    return "cuda"


def count_gpus() -> int:
    """The NVIDIA GPUs that CUDA shows this process, by the driver's files and CUDA_VISIBLE_DEVICES."""
    devices = [path for path in DEVICES.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    present = len(devices) or len(list(PROC_GPUS.glob("*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return present if visible is None else min(present, _count_visible(visible, present))


def _count_visible(visible: str, present: int) -> int:
    """The GPUs that CUDA_VISIBLE_DEVICES lets through: those before its first invalid word; none if one comes twice.

    A word is an index, read as C's strtol reads it, or the beginning of a UUID, believed where the driver's files list
    none. Of the parts of split GPUs (`MIG-...`) CUDA shows a process one.
    """
    information = "".join(file.read_text() for file in PROC_GPUS.glob("*/information"))
    uuids = re.findall("GPU-[0-9a-f-]{36}", information)
    chosen: list[str | int] = []
    for word in map(str.strip, visible.split(",")):
        index = re.match(r"\+?(\d+)", word)
        if index and int(index[1]) < present:
            chosen.append(int(index[1]))
        elif word.startswith("GPU-") and (not uuids or any(uuid.startswith(word) for uuid in uuids)):
            chosen.append(word)
        elif word.startswith("MIG-"):
            return len(chosen) or 1
        else:
            break
    return len(chosen) if len(set(chosen)) == len(chosen) else 0


def _torch_has_cuda() -> bool:
    """Whether the installed torch was built with CUDA, from its version file: importing it takes a second."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return False
    text = Path(spec.origin).with_name("version.py").read_text()
    return re.search(r"^cuda\b.*= *None", text, re.MULTILINE) is None

"""load(path): build the model on meta, patch it there, and read this rank's slices: no rank ever holds a full copy."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from .attention import RotaryEmbedding
from .checkpoint import read_shards
from .comm import Communicator, communicator
from .config import RuntimeConfig
from .layers import VocabParallelEmbedding
from .models.adapter import adapter_for
from .patching import local_views, patch, patch_of
from .plan import Plan, make_plan
from .preflight import Checkpoint, check_checkpoint, resolve

# transformers builds a model under torch's default dtype, which all threads share: one rank of `run_local` at a time.
_BUILDING = threading.Lock()


def load(path_or_id, group=None, config: RuntimeConfig | None = None) -> PreTrainedModel:
    """A patched model with this rank's part of a checkpoint's weights. Every rank calls it; each reads its slices only.

    Args:
        path_or_id: a checkpoint folder, a Hub id (downloaded once if it is not in the cache) or a `demo:` name.
        group: as in `patch`.

    Raises:
        ValueError: the checkpoint is incomplete, damaged or not supported; the message names the file and the remedy.
    """
    config = config or RuntimeConfig()
    comm = communicator(group)
    if config.device not in ("auto", comm.device.type):
        raise ValueError(f"device={config.device!r}, but the group is on {comm.device.type}; pass one of that device")
    checkpoint = check_checkpoint(resolve(path_or_id, revision=config.revision))
    return load_checkpoint(checkpoint, comm, config)


def load_checkpoint(
    checkpoint: Checkpoint,
    comm: Communicator,
    config: RuntimeConfig,
    on_read: Callable[[int], None] = lambda num_bytes: None,
) -> PreTrainedModel:
    """`load` of a checkpoint that was checked already."""
    dtype = checkpoint.dtype if config.dtype == "auto" else config.dtype
    hf_config = AutoConfig.from_pretrained(checkpoint.path)
    # Of transformers' two defaults sdpa does not cap; some releases take it nevertheless.
    options = {"attn_implementation": "eager"} if adapter_for(checkpoint.model_type).attention_softcap else {}
    with _BUILDING, torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config, dtype=getattr(torch, dtype), **options).eval()
    if checkpoint.generation_config:
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)
    patch(model, comm, make_plan(checkpoint.config, comm.size, dtype=dtype), config)
    load_weights(model, checkpoint, on_read)
    return model


def load_weights(
    model: nn.Module, checkpoint: Checkpoint | str | Path, on_read: Callable[[int], None] = lambda num_bytes: None
) -> None:
    """Fills a patched model that was built on meta with this rank's part of a checkpoint's weights.

    Raises:
        ValueError: the model is not patched, or the checkpoint does not fit it.
    """
    state = patch_of(model)
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = check_checkpoint(resolve(checkpoint))
    _check_fit(checkpoint, state.plan)
    model.to_empty(device=state.comm.device)
    for _, _, old in state.swaps:
        if hasattr(old, "scalar_embed_scale"):  # like the angles below: `unpatch` gives it back
            old.embed_scale = torch.tensor(
                old.scalar_embed_scale, dtype=old.embed_scale.dtype, device=state.comm.device
            )
    for module in model.modules():
        if isinstance(module, RotaryEmbedding):  # its frequencies are computed, not stored
            with torch.device(state.comm.device):
                computed = type(module.rotary_emb)(model.config)
            vars(module.rotary_emb).update(vars(computed))  # in place: it is the one that `unpatch` gives back
        elif isinstance(module, VocabParallelEmbedding):
            module.zero_other_rows()
    num_threads = max(1, min(4, len(os.sched_getaffinity(0)) // state.comm.size))
    views = local_views(model)
    read_shards(checkpoint, state.plan, state.comm.rank, views, num_threads=num_threads, on_read=on_read)


def _check_fit(checkpoint: Checkpoint, plan: Plan) -> None:
    stored = {n: p.shape for p in adapter_for(checkpoint.model_type).parameters(checkpoint.config) for n in p.names()}
    needed = {name: plan.parameter(name).shape for name in plan.names()}
    if wrong := sorted(name for name in stored.keys() | needed.keys() if stored.get(name) != needed.get(name)):
        name = wrong[0]
        raise ValueError(
            f"{checkpoint.name} is a checkpoint of another model: {len(wrong)} parameters differ, first {name}: "
            f"{stored.get(name, 'absent')} in the checkpoint, {needed.get(name, 'absent')} in the model"
        )


def import_model_code(model_type: str) -> None:
    """Imports a family's modelling code: a launcher does it once, before it forks the ranks."""
    module = adapter_for(model_type).module or model_type
    importlib.import_module(f"transformers.models.{module}.modeling_{module}")

"""patch(model): a live Hugging Face model becomes this rank's part of a tensor-parallel one; unpatch undoes it.

What is replaced stands at the top of `replacement.py`. The rest of the model is Hugging Face's: its forward pass, its
masks, its caches, its generate().
"""

from __future__ import annotations

import json
from dataclasses import asdict
from hashlib import sha256

import torch
from torch import nn

from .attention import with_known_masks
from .comm import Communicator, communicator
from .config import RuntimeConfig
from .in_step import generate_in_step
from .lanes import in_lanes
from .models.adapter import Source, adapter_for
from .overlap import Overlap
from .plan import ITEM_BYTES, Plan, make_plan
from .replacement import OwnForward, Patch, PatchReport, replace_modules
from .shard import copies


def patch(model: nn.Module, group=None, plan: Plan | None = None, config: RuntimeConfig | None = None) -> PatchReport:
    """Cuts `model` in place to this rank's part. Every rank calls it, with the same model.

    The model may be in memory (its full weights are released as they are cut) or on the meta device (then
    `load_weights` fills it). Afterwards `print(model)` shows local shapes, and `model.generate()` gives every rank the
    same tokens. A second call on the same model changes nothing. The patched model is for inference, and is not copied.

    Args:
        model: a Hugging Face causal language model of a supported family.
        group: process group, 1-D DeviceMesh or Communicator; None: the default group, without one a single rank.
        plan: how to cut; None: `make_plan(model.config, size of the group)`.
        config: must leave dtype and device alone: the model has them.

    Raises:
        ValueError: a family without support; a plan of another model or size; ranks that were given different models.
    """
    if (done := getattr(model, "_tp_runtime", None)) is not None:
        return done.report
    comm = communicator(group)
    comm.check_agreement(_identity(model, plan, config))  # first: what fails below, fails on every rank
    if not hasattr(model, "config") or not hasattr(model, "lm_head"):
        raise ValueError(f"{type(model).__name__} is no Hugging Face causal language model")
    adapter = adapter_for(model.config.model_type)
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in ITEM_BYTES:
        raise ValueError(f"the model's dtype is {dtype}; supported: {', '.join(ITEM_BYTES)}")
    if config is not None and config.dtype not in ("auto", dtype):
        raise ValueError(f"dtype={config.dtype!r}, but the model is {dtype}; call model.to(torch.{config.dtype}) first")
    if config is not None and config.device not in ("auto", comm.device.type):
        raise ValueError(f"device={config.device!r}, but the group is on {comm.device.type}; pass one of that device")
    if comm.size > 1 and model.device.type not in ("meta", comm.device.type):
        raise ValueError(f"the model is on {model.device}, the group on {comm.device}; move the model there first")
    plan = plan or make_plan(model.config, comm.size, dtype=dtype)
    _check_plan(model, plan, comm)

    state = Patch(comm, plan, adapter, Overlap(comm, config.overlap if config else "auto"))
    replace_modules(model, state)
    state.report = PatchReport(
        plan.model_type, comm.rank, comm.size, tuple(state.replaced), plan.weight_bytes(comm.rank)
    )
    object.__setattr__(model, "_tp_runtime", state)
    state.hooks.append(model.register_forward_pre_hook(_check_call, with_kwargs=True))
    forward = with_known_masks(model.model, in_lanes(model.model, state.overlap))
    state.hooks.append(OwnForward(model.model, state.ahead.during(forward)))
    model.generate = generate_in_step(model, comm)
    model.generate_batch = _refuse_continuous_batching
    model.save_pretrained = _refuse_to_save
    # A static cache may be made before the first token, for all heads; without this answer it waits and takes ours.
    model._get_static_cache_init_shape = lambda: None
    return state.report


def unpatch(model: nn.Module) -> None:
    """Gives `model` its own modules and full weights back, bit for bit. Every rank calls it: the parts are gathered.

    Raises:
        ValueError: the model is not patched.
    """
    state = patch_of(model)
    views = local_views(model)
    filled = [name for name in state.parameters if not views[name].is_meta]
    whole = {name: _gather(views[name], state.plan, name, state.comm) for name in filled}
    for parent, name, old in reversed(state.swaps):
        setattr(parent, name, old)
        old.train(model.training)
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            owners.setdefault(id(parameter), []).append((module, name))
    for name, value in whole.items():
        parameter = state.parameters[name]
        if not parameter.is_meta:
            parameter.data = value
        else:  # built on meta, filled since
            new = nn.Parameter(value, requires_grad=parameter.requires_grad)
            for module, attribute in owners.get(id(parameter), ()):
                setattr(module, attribute, new)
    for hook in state.hooks:
        hook.remove()
    del (
        model.generate,
        model.generate_batch,
        model.save_pretrained,
        model._get_static_cache_init_shape,
        model._tp_runtime,
    )


def local_views(model: nn.Module) -> dict[str, torch.Tensor]:
    """This rank's part of every parameter of a patched model, by Hugging Face's name; views, not copies."""
    views: dict[str, torch.Tensor] = {}
    ours: list[str] = []
    for path, module in model.named_modules():
        if hasattr(module, "shards"):
            parent, _, name = path.rpartition(".")
            views |= {f"{parent}.{key}" if parent else key: view for key, view in module.shards(name).items()}
            ours.append(path + ".")
    for name, parameter in model.named_parameters():
        if not name.startswith(tuple(ours)):
            views[name] = parameter.detach()
    return views


def patch_of(model: nn.Module) -> Patch:
    """What `patch` did to this model.

    Raises:
        ValueError: the model is not patched.
    """
    if (state := getattr(model, "_tp_runtime", None)) is None:
        raise ValueError("the model is not patched: call tp_runtime.patch(model) first")
    return state


# Config values that differ between equal models: `save_pretrained` sets `architectures`; the model has its own dtype.
_OF_THE_RANK = ("_name_or_path", "architectures", "transformers_version", "dtype")


def _identity(model: nn.Module, plan: Plan | None, config: RuntimeConfig | None) -> dict[str, object]:
    """What every rank must have been given alike, by the name that an error shows; of the weights, a sample."""
    write_config = getattr(getattr(model, "config", None), "to_json_string", None)
    values = json.loads(write_config(use_diff=False)) if write_config else {}
    samples = [p.detach().flatten()[:: max(1, p.numel() // 64)] for p in model.parameters() if not p.is_meta]
    numbers = torch.cat(samples).float().cpu().numpy().tobytes() if samples else b""
    return {
        "model": type(model).__name__,
        "dtype": str(getattr(model, "dtype", None)),
        **{f"config.{name}": value for name, value in values.items() if name not in _OF_THE_RANK},
        "weights": f"sha256 {sha256(numbers).hexdigest()[:12]}",
        "plan": plan and plan.to_json(),
        **{f"option {name}": value for name, value in asdict(config or RuntimeConfig()).items()},
    }


def _check_plan(model: nn.Module, plan: Plan, comm: Communicator) -> None:
    if plan.tp_size != comm.size:
        raise ValueError(f"the plan is for {plan.tp_size} ranks, the group has {comm.size}")
    if plan.model_type != model.config.model_type:
        raise ValueError(f"the plan is for {plan.model_type!r}, the model is {model.config.model_type!r}")
    if plan.dtype != (dtype := str(model.dtype).removeprefix("torch.")):
        raise ValueError(f"the plan is for {plan.dtype} weights, the model's are {dtype}")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    planned = {name: plan.parameter(name).shape for name in plan.names()}
    if wrong := sorted(name for name in shapes.keys() | planned.keys() if shapes.get(name) != planned.get(name)):
        name = wrong[0]
        raise ValueError(
            f"model and plan differ in {len(wrong)} parameters, first {name}: "
            f"{shapes.get(name, 'absent')} in the model, {planned.get(name, 'absent')} in the plan"
        )


def _gather(view: torch.Tensor, plan: Plan, name: str, comm: Communicator) -> torch.Tensor:
    """The full parameter from all ranks' parts; where several ranks hold the same part, they hold the same bits."""
    entry = plan.parameter(name)
    if entry.dim is None:
        return view.clone()
    whole = torch.empty(entry.shape, dtype=view.dtype, device=view.device)
    for rank in range(comm.size):
        part = view.contiguous().clone() if rank == comm.rank else view.new_empty(entry.local_shape(rank))
        if part.numel():
            comm.broadcast(part, source=rank)
        for copy in copies(entry, rank, Source(name, entry.shape)):
            whole[copy.stored_index] = part[copy.local_index]
    return whole


def _check_call(model: nn.Module, args, kwargs) -> None:
    if model.training:
        raise ValueError("a patched model is for inference: call model.eval(), or unpatch it to train")
    if kwargs.get("output_attentions") or model.config.output_attentions:
        raise ValueError("attention maps are cut across ranks by heads; unpatch the model to read them")
    name = "input_ids" if kwargs.get("inputs_embeds") is None else "inputs_embeds"
    tokens = kwargs.get(name, args[0] if args else None)
    if tokens is not None and tokens.numel() == 0:
        raise ValueError(f"{name} is {list(tokens.shape)}: there is no token to compute; give each call one at least")


def _refuse_continuous_batching(*args, **kwargs):
    raise ValueError("continuous batching keeps a cache of its own, for all heads; use model.generate()")


def _refuse_to_save(*args, **kwargs):
    raise ValueError("a patched model holds one rank's part; unpatch(model) before save_pretrained()")

"""Hugging Face's generate() on a patched model: called, drawing and stopping alike on every rank.

compare     the arguments of all ranks; ranks that were given something else are named, before a token is made
draw        rank 0's random numbers, whatever each rank's generators hold
stop        what follows from the tokens is the same everywhere; a clock or a criterion of the caller's is rank 0's
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from hashlib import sha256

import torch
from torch import nn
from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from .comm import Communicator
from .sampling import draw_in_step


def generate_in_step(model: nn.Module, comm: Communicator) -> Callable:
    """Hugging Face's generate(), checked to be called alike on every rank; drawing and stopping alike on every rank."""
    generate = model.generate
    signature = inspect.signature(generate)

    @functools.wraps(generate)
    def checked(*args, **kwargs):
        if comm.size == 1:
            return generate(*args, **kwargs)
        arguments = signature.bind(*args, **kwargs).arguments
        arguments |= arguments.pop("kwargs", {})
        fields = {**arguments, "model.generation_config": model.generation_config}
        comm.check_agreement({name: text for name, value in fields.items() if (text := _describe(value)) is not None})
        _refuse_clocks(arguments, model.generation_config)
        if criteria := arguments.get("stopping_criteria"):
            told = [c if isinstance(c, _OF_TOKENS) else _AskRankZero(c, comm) for c in criteria]
            arguments["stopping_criteria"] = StoppingCriteriaList(told)
        with draw_in_step(comm):
            return generate(**arguments)

    return checked


_OF_TOKENS = (MaxLengthCriteria, EosTokenCriteria, StopStringCriteria)  # they say the same on every rank


class _AskRankZero(StoppingCriteria):
    """Rank 0's answer, on every rank: a clock or a caller's own criterion may see something else on each."""

    def __init__(self, criterion: Callable, comm: Communicator):
        self.criterion, self.comm = criterion, comm

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        done = torch.as_tensor(self.criterion(input_ids, scores, **kwargs), device=input_ids.device)
        return self.comm.broadcast(done.to(torch.uint8)).bool()


def _refuse_clocks(arguments: dict, default) -> None:
    configs = (arguments.get("generation_config"), default)
    limits = [arguments.get("max_time"), *(getattr(config, "max_time", None) for config in configs)]
    if any(limit is not None for limit in limits):
        raise ValueError(
            "max_time: each rank would stop by its own clock; pass stopping_criteria=[MaxTimeCriteria(seconds)], "
            "of which rank 0's counts"
        )


def _describe(value):
    """A JSON-able stand-in by which two ranks' arguments can be compared; None for what is a rank's own business."""
    if isinstance(value, torch.Tensor):
        about = [str(value.dtype), list(value.shape)]
        if value.numel() <= 64:
            return [*about, value.tolist()]
        return [*about, sha256(value.detach().cpu().contiguous().view(torch.uint8).numpy()).hexdigest()]
    if isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return [_describe(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _describe(v) for k, v in value.items()}
    if hasattr(value, "to_diff_dict"):  # GenerationConfig
        return _describe(value.to_diff_dict())
    return None

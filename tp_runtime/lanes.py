"""Two lanes: the halves of a prompt go through the model together, one's all-reduce under the other's compute.

The program that it equals:

    first  = forward(tokens[:, : S / 2])       with a cache, to which each layer adds its keys and values
    second = forward(tokens[:, S / 2 :])       attends to them
    return first, second

    lane A   compute | start all-reduce |                              wait, compute | start all-reduce |
    lane B                              | compute | start all-reduce |                                  wait, ...

A lane is a thread, of which one runs at a time: it hands over where it has started an all-reduce, and gets its turn
back where the other has. The model's own forward pass runs in both, whatever the model is. B begins when A has come to
its first all-reduce, behind the first layer's attention, and stays behind: when B comes to a layer's attention, A's
keys and values of that layer are in the cache.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling
from transformers import DynamicCache

from .communicator import NullCommunicator
from .overlap import Overlap, room_for_collectives
from .race import race, wins


class _Abandoned(BaseException):
    """Ends a lane whose other lane has failed."""


class Lanes:
    """Runs two functions in turn, once. The second in a thread with this thread's device, stream and autograd mode."""

    def __init__(self):
        self._turn = (threading.Semaphore(0), threading.Semaphore(0))
        self._has_ended = [False, False]
        self._thread: threading.Thread | None = None
        self._result: Any = None
        self._error: BaseException | None = None
        self._is_abandoned = False

    def run(self, first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
        """(first(), second()), which call `switch`. What either raises; the other then ends at its next `switch`."""
        self._thread = threading.Thread(target=self._run_second, args=(second, _here()), name="lane B")
        self._thread.start()
        try:
            result = first()
        except BaseException:
            self._is_abandoned = True
            raise
        finally:
            self._has_ended[0] = True
            self._turn[1].release()
            self._thread.join()
        if self._error is not None:
            raise self._error
        return result, self._result

    def switch(self) -> None:
        """Lets the other lane run until it calls `switch` or ends."""
        me = int(threading.current_thread() is self._thread)
        if not self._has_ended[1 - me]:
            self._turn[1 - me].release()
            self._turn[me].acquire()
        if me and self._is_abandoned:
            raise _Abandoned
        if not me and self._error is not None:
            raise self._error

    def _run_second(self, second: Callable[[], Any], here: contextlib.AbstractContextManager) -> None:
        self._turn[1].acquire()
        try:
            if not self._is_abandoned:
                with here:
                    self._result = second()
        except _Abandoned:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._has_ended[1] = True
            self._turn[0].release()


@contextlib.contextmanager
def _entered(state: tuple) -> Iterator[None]:
    num_threads, is_inference, has_grad, stream = state
    torch.set_num_threads(num_threads)  # OpenMP keeps it for each thread
    with torch.inference_mode(is_inference), torch.set_grad_enabled(has_grad):
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            yield


def _here() -> contextlib.AbstractContextManager:
    """What torch keeps for each thread, as it is in this one, to be entered in another."""
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
    return _entered((torch.get_num_threads(), torch.is_inference_mode_enabled(), torch.is_grad_enabled(), stream))


MIN_TOKENS = 1024  # below, two halves of a GEMM take longer than the whole by more than a collective
_MEASURED_LAYERS = 2

_ROPE_OF_THE_WHOLE = ("dynamic", "longrope")  # these turn all tokens by angles that depend on how many there are
_CUT = ("input_ids", "inputs_embeds", "position_ids")  # [B, S, ...]
_KNOWN = (*_CUT, "attention_mask", "past_key_values", "use_cache")


def in_lanes(model: nn.Module, overlap: Overlap) -> Callable:
    """The forward pass of a decoder, in two lanes where `overlap.mode` says so or, if it is auto, where that is faster.

    Args:
        model: Hugging Face's decoder, without the head.
        overlap: of its row-parallel layers.
    """
    forward = model.forward
    if any(kind in str(getattr(model.config, "rope_parameters", "")) for kind in _ROPE_OF_THE_WHOLE):
        return forward

    names = list(inspect.signature(forward).parameters)

    def laned_forward(*args, **kwargs):
        if overlap.mode not in ("auto", "lanes") or overlap.comm.size == 1 or is_dynamo_compiling():
            return forward(*args, **kwargs)
        kwargs.update(zip(names, args))
        if (halves := _halves(model.config, kwargs)) is None or not _pays(model, forward, halves, overlap):
            return forward(**kwargs)
        return _run(forward, halves, overlap)

    return laned_forward


def _run(forward: Callable, halves: tuple[dict, dict], overlap: Overlap):
    """forward(**halves[0]) and forward(**halves[1]) together, as the output of one forward pass."""
    overlap.lanes = lanes = Lanes()
    try:
        with room_for_collectives(overlap.comm):
            first, second = lanes.run(lambda: forward(**halves[0]), lambda: forward(**halves[1]))
    finally:
        overlap.lanes = None
    second.last_hidden_state = torch.cat((first.last_hidden_state, second.last_hidden_state), dim=1)
    return second


def _halves(config, kwargs: dict) -> tuple[dict, dict] | None:
    """The arguments of the two halves; None where this forward pass can not be cut."""
    given = {name: value for name, value in kwargs.items() if value is not None and value is not False}
    tokens = given.get("input_ids", given.get("inputs_embeds"))
    use_cache = config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
    if tokens is None or tokens.shape[1] < 2 or not use_cache or not given.keys() <= set(_KNOWN):
        return None
    cache, mask = given.get("past_key_values"), given.get("attention_mask")
    if cache is None:
        cache = DynamicCache(config=config)
    # A mask is made before the first layer, from the length that the cache has in one layer of each kind: with two
    # kinds, one of them lies where the first lane has not been yet.
    if len(set(cache.is_sliding)) > 1 or (mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2)):
        return None
    size = tokens.shape[1]
    half = (size + 1) // 2
    first, second = dict(given, past_key_values=cache), dict(given, past_key_values=cache)
    for name in given.keys() & set(_CUT):
        first[name], second[name] = given[name][:, :half], given[name][:, half:]
    if mask is not None:
        first["attention_mask"] = mask[:, : mask.shape[1] - (size - half)]
    return first, second


def _pays(model: nn.Module, forward: Callable, halves: tuple[dict, dict], overlap: Overlap) -> bool:
    """Whether lanes are faster: measured once for a number of tokens, in the first layers."""
    if overlap.mode == "lanes":
        return True
    first = halves[0]
    tokens = first["input_ids"] if "input_ids" in first else first["inputs_embeds"]
    num_tokens = 2 * tokens.shape[0] * tokens.shape[1]
    key = num_tokens.bit_length()
    if num_tokens < MIN_TOKENS:
        return False
    if key not in overlap.lanes_s:
        if first["past_key_values"].get_seq_length() or overlap.is_capturing():
            return False
        overlap.lanes_s[key] = _measure(model, forward, halves, overlap)
    _, whole_s, lanes_s = overlap.lanes_s[key]
    return wins(lanes_s, whole_s)


def _measure(model: nn.Module, forward: Callable, halves: tuple[dict, dict], overlap: Overlap) -> list[list[float]]:
    """Seconds of the first layers, one value a round: of one pass over all tokens whose layers communicate nothing, of
    one pass, and of two lanes."""

    def fresh(lane: dict, cache: DynamicCache) -> dict:
        return dict(lane, past_key_values=cache)

    def whole():
        cut = {name: torch.cat([half[name] for half in halves], dim=1) for name in halves[0].keys() & set(_CUT)}
        forward(**fresh({**halves[1], **cut}, DynamicCache(config=model.config)))

    def laned():
        cache = DynamicCache(config=model.config)
        _run(forward, (fresh(halves[0], cache), fresh(halves[1], cache)), overlap)

    def silent():
        live, overlap.comm = overlap.comm, NullCommunicator(overlap.comm.rank, overlap.comm.size, overlap.comm.device)
        try:
            whole()
        finally:
            overlap.comm = live

    layers = model.layers
    model.layers = layers[:_MEASURED_LAYERS]
    try:
        return race(overlap.comm, silent, whole, laned)
    finally:
        model.layers = layers

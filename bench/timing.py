"""How long calls take on a device, contenders side by side in one run.

    x = torch.randn(16, 8192, device="cuda", dtype=torch.bfloat16)
    ws = copies(7168, 8192, like=x)
    times = time_us({"torch": lambda i: F.linear(x, ws[i]), "ours": lambda i: gemm(x, ws[i])}, len(ws))
    spread(times["ours"]), ratio(times["torch"], times["ours"])                     # both in bench.record

The program, once a contender: warm up; record call(0), call(1), ... call(num_copies - 1), over and over for at least
`MIN_REPLAY_US`, in a CUDA graph. Then, `repeats` times: replay each contender's graph once, in turn, between two
events. A time is that of the replay over its number of calls: what is left of a launch is what a decode step pays.

Each call reads another copy of the weights, more of them than L2 holds. Who checks results does it before.
"""

from __future__ import annotations

import functools
import gc
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

MIN_COPIES = 8
MAX_COPIES = 256  # of tiny weights, which no choice of kernel makes slow
MIN_REPLAY_US = 300.0  # events resolve half a microsecond; starting a graph takes a few
REPEATS = 30

Call = Callable[[int], object]  # one call, on the i-th copy


def num_copies(copy_bytes: int, device: torch.device | str) -> int:
    """How many copies of a weight to take in turn: at least eight, and twice what L2 holds (50 MB on an H100)."""
    on_gpu = torch.device(device).type == "cuda"
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if on_gpu else 0
    return min(max(MIN_COPIES, -(-2 * l2_bytes // max(1, copy_bytes))), MAX_COPIES)


def copies(*shape: int, like: torch.Tensor) -> torch.Tensor:
    """Random weights in turn, [copies, *shape], of like's dtype and device: normal, at the scale of a trained layer."""
    count = num_copies(math.prod(shape) * like.element_size(), like.device)
    return torch.empty(count, *shape, dtype=like.dtype, device=like.device).normal_(std=shape[-1] ** -0.5)


class Ranks(Protocol):
    """What is needed of tp_runtime.comm.Communicator where several ranks measure the same contenders together."""

    def barrier(self) -> None: ...

    def gather_json(self, value: Any) -> list: ...


class Alone:
    """The only rank."""

    def barrier(self) -> None:
        pass

    def gather_json(self, value: Any) -> list:
        return [value]


def time_us(
    contenders: Mapping[str, Call],
    num_copies: int,
    repeats: int = REPEATS,
    device: str = "cuda",
    ranks: Ranks | None = None,
    is_recorded: bool = True,
) -> dict[str, list[float]]:
    """Microseconds of one call of each contender.

    Args:
        contenders: name -> call; on CUDA it is recorded, so it may not wait for the device.
        num_copies: calls get 0, 1, ... num_copies - 1 in turn.
        repeats: measurements of each, in turn with the others.
        device: "cuda": graphs and events; else the host's clock.
        ranks: those that call this at the same time. They make the same calls, and meet before each replay.
        is_recorded: on CUDA; else calls are launched one by one, and the host may be what takes long.

    Returns:
        Name -> `repeats` times, of the slowest rank; those of the same index were measured one after the other.
    """
    ranks = ranks or Alone()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.inference_mode():
        if torch.device(device).type == "cuda":
            _replays(contenders, num_copies, repeats, times, ranks, is_recorded)
        else:
            _host_calls(contenders, num_copies, repeats, times, ranks)
    everyone = ranks.gather_json(times)
    return {name: [max(each) for each in zip(*(mine[name] for mine in everyone), strict=True)] for name in times}


def in_turn(names: list[str], repeat: int) -> list[str]:
    """The names, each repeat starting with another one: none always follows the same other."""
    first = repeat % len(names)
    return names[first:] + names[:first]


def _replays(
    contenders: Mapping[str, Call],
    num_copies: int,
    repeats: int,
    times: dict[str, list[float]],
    ranks: Ranks,
    is_recorded: bool,
) -> None:
    stream = _stream()
    stream.wait_stream(torch.cuda.current_stream())
    replays, num_calls = {}, {}
    with torch.cuda.stream(stream):
        for name, call in contenders.items():
            if is_recorded:
                graph, num_calls[name] = _record(call, num_copies, stream, ranks)
                replays[name] = graph.replay
            else:
                replays[name], num_calls[name] = functools.partial(_call_all, call, num_copies), num_copies
        events = []
        was_enabled = gc.isenabled()
        gc.disable()  # a collection between two launches would be time of one contender
        try:
            for repeat in range(-2, repeats):  # two to warm up
                for name in in_turn(list(contenders), repeat):
                    start, stop = _event_pair()
                    ranks.barrier()
                    start.record(stream)
                    replays[name]()
                    stop.record(stream)
                    events.append((repeat, name, start, stop))
            stream.synchronize()
        finally:
            if was_enabled:
                gc.enable()
    for repeat, name, start, stop in events:
        if repeat >= 0:
            times[name].append(start.elapsed_time(stop) * 1e3 / num_calls[name])


def _call_all(call: Call, num_copies: int) -> None:
    for i in range(num_copies):
        call(i)


def _record(call: Call, num_copies: int, stream: torch.cuda.Stream, ranks: Ranks) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of enough calls, and their number. Each graph has memory of its own: replays come in any order."""
    call(0)  # compiles, and makes what libraries make at a first call
    graph = _graph(call, num_copies, num_copies, stream)
    graph.replay()
    start, stop = _event_pair()
    start.record(stream)
    graph.replay()
    stop.record(stream)
    stream.synchronize()
    replay_us = max(ranks.gather_json(start.elapsed_time(stop) * 1e3))
    rounds = math.ceil(MIN_REPLAY_US / max(replay_us, 1.0))
    num_calls = rounds * num_copies
    return (graph if rounds == 1 else _graph(call, num_copies, num_calls, stream)), num_calls


def _graph(call: Call, num_copies: int, num_calls: int, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(num_calls):
            call(i % num_copies)
    return graph


@functools.cache
def _stream() -> torch.cuda.Stream:
    """Everything is warmed up, recorded and replayed on this one: what libraries keep for a stream, they keep once."""
    return torch.cuda.Stream()


def _event_pair() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def _host_calls(
    contenders: Mapping[str, Call], num_copies: int, repeats: int, times: dict[str, list[float]], ranks: Ranks
) -> None:
    for call in contenders.values():
        call(0)
    for repeat in range(repeats):
        for name in in_turn(list(contenders), repeat):
            ranks.barrier()
            started = time.perf_counter_ns()
            _call_all(contenders[name], num_copies)
            times[name].append((time.perf_counter_ns() - started) / 1e3 / num_copies)

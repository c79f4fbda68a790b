"""The all-reduce kernels with all ranks on one GPU: buffers and signals are plain tensors, each rank has a stream.

    exact     a rank alone, the others having arrived and left their parts in their buffers. Then all ranks at once,
              call after call, launched one by one and from a CUDA graph of 200 calls a rank: the bits of the sum in
              rank order, on every rank
    speed     microseconds of a call. "Alone" is the launch, the copy and the sum; "together" adds that ranks wait for
              each other. One GPU has no NVLink: neither is what several GPUs take, and every row says so

All programs of all ranks, and those of each rank's next call, which wait already, must be on the GPU at once.
Ranks that do not meet are let go after some seconds and found wrong: a hang would end the whole check.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch

from bench.gpu_section import Options, Row
from bench.on_gpu.calls import doubled, inexact
from bench.on_gpu.cases import DTYPES, Faults
from bench.on_gpu.races import release, synchronize
from bench.record import spread
from bench.timing import REPEATS, time_us
from tp_runtime.kernels import all_reduce
from tp_runtime.kernels.rms_norm import AddNorm, rmsnorm_ref

EPS = 1e-5
HALF_BYTES = 1 << 20
ARRIVED = 2**30  # a barrier's number that no test comes to: whoever waits for less goes on
# Of the last, every other rank norms by a launch of its own: to its peers that is the same call.
KINDS = ("one-shot", "two-shot", "rms_norm", "rms_norm, bias", "rms_norm, post-norm", "rms_norm, no residual",
         "rms_norm, not all ranks")  # fmt: skip
SIZES = (1, 2, 3, 4, 8)
SHAPES = ((1, 4096), (1, 70), (5, 1000), (33, 8192))  # tokens, H
# Where ranks wait for each other H is such that all programs, and those of the next calls, are on one GPU at once.
SHAPES_TOGETHER = ((1, 2048), (1, 70), (5, 1000), (300, 1024))
CALLS = 200
LIMIT_S = 20.0  # for ranks to meet
SPEED_BYTES, SPEED_H = (16 << 10, 1 << 20), 8192
EMULATED = "one GPU: no NVLink, emulated"
# Published, not measured by this project: us on H200s with NVLink; tp_size -> message bytes -> peer -> us.
# Source: NVIDIA's measured operator database (github.com/ai-dynamo/aiconfigurator, snapshot of 2026-08).
PUBLISHED_US: dict[int, dict[int, dict[str, float]]] = {
    2: {16 << 10: {"SGLang": 2.6, "TRT-LLM": 2.8, "vLLM": 4.6, "NCCL": 7.3}, 1 << 20: {"SGLang": 5.9, "NCCL": 14},
        16 << 20: {"NCCL": 76}, 64 << 20: {"NCCL": 250}},
    4: {16 << 10: {"SGLang": 2.9, "TRT-LLM": 3.2, "vLLM": 4.8, "NCCL": 10.9}, 1 << 20: {"SGLang": 10.4, "NCCL": 18},
        16 << 20: {"NCCL": 99}, 64 << 20: {"NCCL": 320}},
    8: {16 << 10: {"SGLang": 3.7, "TRT-LLM": 3.5, "vLLM": 5.2, "NCCL": 18.3}, 1 << 20: {"SGLang": 13.1, "NCCL": 26},
        16 << 20: {"NCCL": 122}, 64 << 20: {"NCCL": 320}},
}  # fmt: skip


class Group:
    """Ranks of one device, each with its Peers and its stream."""

    def __init__(self, size: int, device: str, kernels: ModuleType = all_reduce, streams: Sequence[Any] = ()):
        self.device, self.kernels = device, kernels
        self.buffers = [torch.zeros(2 * HALF_BYTES, dtype=torch.uint8, device=device) for _ in range(size)]
        self._signals = [torch.zeros(kernels.PROGRAMS * size, dtype=torch.int32, device=device) for _ in range(size)]
        tables = [torch.tensor([t.data_ptr() for t in of], device=device) for of in (self.buffers, self._signals)]
        calls = torch.zeros(size, kernels.PROGRAMS, dtype=torch.int32, device=device)
        self.peers = [kernels.Peers(*tables, calls[rank], HALF_BYTES, rank, size) for rank in range(size)]
        self.streams = streams or [torch.cuda.Stream() if device == "cuda" else None for _ in range(size)]
        self._way_out = torch.cuda.Stream() if device == "cuda" else None
        synchronize(device)

    def on_stream(self, rank: int) -> Any:
        stream = self.streams[rank]
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    def let_go(self, ranks: Sequence[int] | None = None) -> None:
        """These ranks, or all, wait for nobody any more."""
        for rank in range(len(self.peers)) if ranks is None else ranks:
            self._signals[rank].fill_(ARRIVED)

    def leave_parts(self, rank: int, parts: Sequence[torch.Tensor]) -> None:
        """Every other rank has put its part into both halves of its buffer."""
        for other, part in enumerate(parts):
            if other != rank:
                raw = part.contiguous().view(-1).view(torch.uint8)
                for half in self.buffers[other].split(HALF_BYTES):
                    half[: len(raw)] = raw

    def have_met(self) -> bool:
        """Waits for all streams; whoever waits in vain is let go after LIMIT_S."""
        if self.device != "cuda":
            return True
        done = [torch.cuda.Event() for _ in self.streams]
        for event, stream in zip(done, self.streams, strict=True):
            event.record(stream)
        started, met = time.monotonic(), True
        while not all(event.query() for event in done):
            if time.monotonic() - started > LIMIT_S:
                met = False
                with torch.cuda.stream(self._way_out):
                    self.let_go()  # again and again, as each call waits for numbers of its own
            time.sleep(1e-3)
        return met

    def graph(self, rank: int, work: Callable[[], None]) -> Callable[[], None]:
        """What replays `work`, recorded, on the rank's stream."""
        if self.device != "cuda":
            return work
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.streams[rank]):
            work()
        return graph.replay


class Message:
    """What the ranks reduce in one call, how, and what must come out."""

    def __init__(self, kind: str, shape: tuple[int, int], size: int, dtype: torch.dtype, device: str):
        options = {"dtype": dtype, "device": device}
        self.kind = kind
        self.parts = [torch.randn(shape, **options) for _ in range(size)]
        added = {"bias": "x_bias", "post-norm": "post_weight"}
        vectors = {name: torch.randn(shape[1], **options) for word, name in added.items() if word in kind}
        residual = None if "no residual" in kind else torch.randn(shape, **options)
        self.then = AddNorm(torch.rand(shape[1], **options), EPS, residual, **vectors)
        self.results: list[list[torch.Tensor]] = [[torch.empty_like(part)] for part in self.parts]

    @property
    def is_fused(self) -> bool:
        return "norm" in self.kind

    def reduce(self, kernels: ModuleType, peers: Any) -> None:
        x = self.parts[peers.rank]
        if self.is_fused:
            self.results[peers.rank] = []  # their memory serves again: a first allocation might wait for the device
            if "not all" in self.kind and peers.rank % 2:
                self.results[peers.rank] = [*self.then.of(kernels.all_reduce(x, peers, chunk=x.shape[-1]))]
            else:
                self.results[peers.rank] = [*kernels.all_reduce_rms_norm(x, peers, self.then)]
        else:
            kernels.all_reduce(x, peers, self.kind == "two-shot", out=self.results[peers.rank][0])

    def spoil(self) -> None:
        for result in itertools.chain(*self.results):
            result.fill_(float("nan"))

    def fault(self, rank: int, total: torch.Tensor | None = None) -> str:
        """What is wrong with a rank's results; empty if nothing is. `total`: what the sum has to be."""
        if not self.is_fused:
            want = all_reduce.all_reduce_ref(self.parts) if total is None else total
            return "" if torch.equal(self.results[rank][0], want) else "is not the sum in rank order"
        z, h = self.results[rank]
        want = all_reduce.all_reduce_rms_norm_ref(self.parts, self.then)
        if self.then.post_weight is None and not torch.equal(h, want[1]):
            return "h has other bits than the separate ops give"
        exact = AddNorm(*doubled(self.then)).of(all_reduce.all_reduce_ref(self.parts).double(), rmsnorm_ref)
        return inexact([z, h], exact, want, {"max_ratio": 0.0, "rms_ratio": 0.0})


def exact(options: Options, device: str = "cuda", kernels: ModuleType = all_reduce, sizes=SIZES) -> Iterator[Row]:
    for size, dtype in itertools.product(sizes, DTYPES):
        yield check_alone(size, dtype, device, kernels)
    for size, dtype in itertools.product(sizes, DTYPES):
        yield check_together(size, dtype, device, kernels)
        release(device)


@torch.inference_mode()
def check_alone(size: int, dtype: str, device: str, kernels: ModuleType = all_reduce, shapes=SHAPES) -> Row:
    """Each rank by itself, three calls in a row: the last is in the half of the first."""
    faults = Faults(device)
    for kind, shape, rank in itertools.product(KINDS, shapes, sorted({0, min(1, size - 1), size - 1})):

        def fault(kind=kind, shape=shape, rank=rank) -> str:
            group = Group(size, device, kernels)
            message = Message(kind, shape, size, getattr(torch, dtype), device)
            group.let_go([rank])
            for _ in range(3):
                group.leave_parts(rank, message.parts)
                message.spoil()
                message.reduce(kernels, group.peers[rank])
                total = own_slice(message.parts, rank) if kind == "two-shot" else None
                if text := message.fault(rank, total):
                    return text
            return ""

        faults.check(f"{kind} of {shape[0]}x{shape[1]}, rank {rank}", fault)
    return faults.row(f"all_reduce alone, tp{size}, {dtype}")


def own_slice(parts: Sequence[torch.Tensor], rank: int) -> torch.Tensor:
    """What two-shot gives a rank whose peers have not summed their slices: there, what stands in the peers' buffers."""
    n, lane = parts[0].numel(), 16 // parts[0].element_size()
    length = -(-n // (len(parts) * lane)) * lane
    flat = [part.flatten()[r * length : (r + 1) * length] for r, part in enumerate(parts)]
    flat[rank] = all_reduce.all_reduce_ref(list(parts)).flatten()[rank * length : (rank + 1) * length]
    return torch.cat(flat).view(parts[0].shape)


@torch.inference_mode()
def check_together(size: int, dtype: str, device: str, kernels: ModuleType = all_reduce, num_calls=CALLS) -> Row:
    """All ranks, call after call of every kind and shape; eager, then replayed twice from a graph of each rank."""
    faults = Faults(device)
    turns = itertools.cycle(itertools.product(SHAPES_TOGETHER, KINDS))
    messages = [
        Message(kind, shape, size, getattr(torch, dtype), device)
        for shape, kind in itertools.islice(turns, num_calls)
    ]
    group = warmed_up(messages, size, device, kernels)

    def eager() -> None:
        for message, rank in itertools.product(messages, range(size)):  # rank by rank, so that none is far ahead
            with group.on_stream(rank):
                message.reduce(kernels, group.peers[rank])

    faults.check("launched one by one", lambda: meeting_fault(group, messages, eager))
    if group.device == "cuda":
        replays = recorded(group, messages)

        def replayed() -> None:
            for rank, replay in enumerate(replays):
                with group.on_stream(rank):
                    replay()

        for turn in ("first", "second"):
            faults.check(f"{turn} replay", lambda: meeting_fault(group, messages, replayed))
    return faults.row(f"all_reduce together, tp{size}, {num_calls} calls, {dtype}")


def warmed_up(messages: Sequence[Message], size: int, device: str, kernels: ModuleType) -> Group:
    """A group whose kernels are all loaded: to load one, the device may have to wait for others, which wait for it."""
    group = Group(size, device, kernels)
    if device == "cuda":
        group.let_go()
        for rank in range(size):
            with group.on_stream(rank):
                for message in messages:
                    message.reduce(kernels, group.peers[rank])
            torch.cuda.synchronize()  # else the next rank's signals would say that it is far behind
    return Group(size, device, kernels, group.streams)  # where memory for results is at hand


def recorded(group: Group, messages: Sequence[Message]) -> list[Callable[[], None]]:
    """Of each rank a graph of all calls."""
    replays = []
    for rank, peers in enumerate(group.peers):

        def work(peers=peers) -> None:
            for message in messages:
                message.reduce(group.kernels, peers)

        replays.append(group.graph(rank, work))
    return replays


def meeting_fault(group: Group, messages: Sequence[Message], launch: Callable[[], None]) -> str:
    """What is wrong with any rank's results of any call; empty if nothing is."""
    for message in messages:
        message.spoil()
    synchronize(group.device)
    launch()
    if not group.have_met():
        return f"the ranks did not meet within {LIMIT_S:g} s"
    for number, message in enumerate(messages):
        for rank in range(len(group.peers)):
            if text := message.fault(rank):
                return f"call {number}, {message.kind} of {list(message.parts[0].shape)}, rank {rank}: {text}"
    return ""


def speed(options: Options, device: str = "cuda", sizes=(2, 4, 8), dtype=torch.bfloat16) -> Iterator[Row]:
    """Microseconds of each kind beside a copy of as many bytes; fused ones of all ranks are too many to be together."""
    for size, num_bytes in itertools.product(sizes, SPEED_BYTES):
        shape = (num_bytes // dtype.itemsize // SPEED_H, SPEED_H)
        messages = {kind: Message(kind, shape, size, dtype, device) for kind in KINDS[:3]}
        times = _alone_us(messages, size, device)
        for kind, message in messages.items():
            yield {
                "what": f"all_reduce {kind}, {num_bytes >> 10} KiB, tp{size} ({EMULATED})",
                "op": kind, "tp_size": size, "message_bytes": num_bytes, "emulated": EMULATED,
                "alone_us": spread(times[kind]), "copy_us": spread(times["copy"]),
                "together_us": None if message.is_fused else _together_us(message, size, device),
                "published_us": PUBLISHED_US[size][num_bytes],
            }  # fmt: skip
        release(device)


def _alone_us(messages: dict[str, Message], size: int, device: str) -> dict[str, list[float]]:
    """Rank 0, whose peers are always there already."""
    group = Group(size, device)
    group.let_go()
    x = next(iter(messages.values())).parts[0]
    y = torch.empty_like(x)
    calls: dict[str, Callable[[int], object]] = {"copy": lambda i: y.copy_(x)}
    for kind, message in messages.items():
        calls[kind] = lambda i, message=message: message.reduce(group.kernels, group.peers[0])
    return time_us(calls, 8, REPEATS, device)


@torch.inference_mode()
def _together_us(message: Message, size: int, device: str, num_calls: int = 100) -> dict[str, float] | None:
    """A call of all ranks, each replaying a graph of many, from the first rank's start to the last one's end."""
    if device != "cuda":
        return None
    group = warmed_up([message], size, device, all_reduce)
    replays, times = recorded(group, [message] * num_calls), []
    for repeat in range(REPEATS // 3 + 1):
        start, stops = torch.cuda.Event(enable_timing=True), []
        start.record()
        for rank, replay in enumerate(replays):
            with group.on_stream(rank):
                torch.cuda.current_stream().wait_event(start)
                replay()
                stops.append(torch.cuda.Event(enable_timing=True))
                stops[-1].record()
        if not group.have_met():
            return None
        if repeat:  # the first is a warm-up
            times.append(max(start.elapsed_time(stop) for stop in stops) * 1e3 / num_calls)
    return spread(times)

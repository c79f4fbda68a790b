"""Ranks that are threads of this process: tests, notebooks, several ranks on one device.

On a GPU each rank has a stream. A collective, of ranks 0 and 1:

    thread 0   record "made 0" | meet | wait for "made 1", sum, record "read 0" | meet | wait for "read 1", go on
    thread 1   record "made 1" | meet | wait for "made 0", sum, record "read 1" | meet | wait for "read 0", go on

Threads meet on the host; the waits are the streams', which nobody stops for.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from . import collective_ops
from .comm import joined_group
from .communicator import Communicator, check_labels, label, sum_in_rank_order


class _Part(NamedTuple):
    """What a rank brings to a collective. `made`: an event of its stream, on a GPU."""

    what: bytes
    x: torch.Tensor
    made: Any


class _Meeting:
    """What the threads of one `run_local` share: a slot each, and a barrier that a failing rank breaks for all."""

    def __init__(self, size: int):
        self.slots: list[_Part | None] = [None] * size
        self.read: list[Any] = [None] * size  # each rank's event behind its last use of others' tensors
        self.barrier = threading.Barrier(size)

    def leave(self, rank: int) -> None:
        """Waits for the others to leave too. Those that wait in a collective instead find the slot empty."""
        self.slots[rank] = None
        self.barrier.wait()


class LocalCommunicator(Communicator):
    """A rank that is a thread of this process. Every all-reduce is a one-shot one: a rank reads all ranks' tensors."""

    def __init__(self, rank: int, meeting: _Meeting, device: torch.device | str = "cpu"):
        super().__init__(rank, len(meeting.slots), torch.device(device))
        self._meeting = meeting

    def _exchange(self, what: bytes, x: torch.Tensor, combine: Callable[[list[torch.Tensor]], Any]) -> Any:
        """combine(all ranks' tensors); nobody touches its own before everyone has combined."""
        meeting = self._meeting
        meeting.slots[self.rank] = _Part(what, x, self._event())
        meeting.barrier.wait()
        slots = list(meeting.slots)
        if gone := [str(rank) for rank, slot in enumerate(slots) if slot is None]:
            raise ValueError(f"rank {', '.join(gone)} returned while rank {self.rank} waits for it in a collective")
        parts = [slot for slot in slots if slot is not None]
        try:
            check_labels([part.what for part in parts])
            self._wait_for([part.made for part in parts])
            result = combine([part.x for part in parts])
            meeting.read[self.rank] = self._event()
        finally:
            meeting.barrier.wait()
        self._wait_for(meeting.read)
        return result

    def _event(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None

    def _wait_for(self, events: list[Any]) -> None:
        if self.device.type == "cuda":
            for event in events:
                torch.cuda.current_stream(self.device).wait_event(event)

    def all_reduce(self, x):
        if is_dynamo_compiling():
            return collective_ops.all_reduce(x, self.number)
        what = label("all_reduce", x.dtype, x.shape)
        return x.copy_(self._exchange(what, x, lambda parts: sum_in_rank_order(parts, torch.empty_like(x))))

    def all_gather(self, x, lengths):
        if is_dynamo_compiling():
            return collective_ops.all_gather(x, lengths, self.number)
        what = label("all_gather", x.dtype, x.shape[:-1], tuple(lengths))
        return self._exchange(what, x, lambda parts: torch.cat(parts, dim=-1))

    def broadcast(self, x, source=0):
        what = label("broadcast", x.dtype, x.shape, f"from rank {source}")
        return x.copy_(self._exchange(what, x, lambda parts: parts[source].clone()))

    def peer_buffers(self, num_bytes):
        mine = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
        return self._exchange(label("peer_buffers", mine.dtype, mine.shape), mine, list)


@contextlib.contextmanager
def _own_stream(device: torch.device, behind: Any) -> Iterator[None]:
    """A stream of this thread's own, behind the caller's; its work is done at the end."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(behind)
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield
        stream.synchronize()


def run_local(fn: Callable, tp_size: int, *args, device: torch.device | str = "cpu") -> list:
    """fn(comm, *args) on tp_size threads of this process; results in rank order.

    Args:
        fn: called once a rank, with that rank's communicator first. It builds its own model: ranks share the process,
            not their modules.
        device: on a GPU each rank has a stream of its own.

    Raises:
        The first failing rank's exception.
    """
    if tp_size < 1:
        raise ValueError(f"tp_size={tp_size}: at least one rank is needed")
    meeting = _Meeting(tp_size)
    device = torch.device(device)
    behind = torch.cuda.current_stream(device) if device.type == "cuda" else None
    results: list = [None] * tp_size
    errors: list[BaseException] = []
    consequences: list[BaseException] = []
    num_threads = torch.get_num_threads()

    def work(rank: int) -> None:
        torch.set_num_threads(max(1, num_threads // tp_size))
        try:
            with _own_stream(device, behind):
                results[rank] = fn(LocalCommunicator(rank, meeting, device), *args)
            meeting.leave(rank)
        except threading.BrokenBarrierError as error:  # another rank failed and left the meeting
            consequences.append(error)
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,), name=f"rank {rank}") for rank in range(tp_size)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        meeting.barrier.abort()  # after Ctrl-C: the ranks end at their next collective
        torch.set_num_threads(num_threads)
    for error in errors or consequences:
        raise error
    return results


def run_ranks(env, backend: str, device: str, tp_size: int, fn: Callable[[Communicator], object]) -> None:
    """fn(comm) as the rank that this process is; with the backend `local`, as all ranks at once.

    Args:
        env: launch.RankEnv.
        backend: `nccl`, `gloo`, `local`, or `auto`: NCCL on CUDA, gloo on the CPU.
        device: `cpu` or `cuda`; a rank takes the GPU of its number on this node.
    """
    place = torch.device("cuda", env.local_rank) if device == "cuda" else torch.device("cpu")
    if backend == "local":
        run_local(fn, tp_size, device=place)
        return
    with joined_group(env, {"auto": "nccl" if device == "cuda" else "gloo"}.get(backend, backend), place) as comm:
        fn(comm)

"""Ranks that are threads of this process: tests, notebooks, several ranks on one device."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch.compiler import is_dynamo_compiling

from . import collective_ops
from .comm import Communicator, joined_group, sum_in_rank_order


class _Meeting:
    """What the threads of one `run_local` share: a slot each, and a barrier that a failing rank breaks for all."""

    def __init__(self, size: int):
        self.slots: list[torch.Tensor | None] = [None] * size
        self.barrier = threading.Barrier(size)

    def leave(self, rank: int) -> None:
        """Waits for the others to leave too. Those that wait in a collective instead find the slot empty."""
        self.slots[rank] = None
        self.barrier.wait()


class LocalCommunicator(Communicator):
    """A rank that is a thread of this process."""

    def __init__(self, rank: int, meeting: _Meeting, device: torch.device | str = "cpu"):
        super().__init__(rank, len(meeting.slots), torch.device(device))
        self._meeting = meeting

    def _exchange(self, x: torch.Tensor, combine: Callable[[list[torch.Tensor]], torch.Tensor]) -> torch.Tensor:
        """combine(all ranks' tensors); nobody touches its own before everyone has combined."""
        self._meeting.slots[self.rank] = x
        self._meeting.barrier.wait()
        if gone := [str(rank) for rank, slot in enumerate(self._meeting.slots) if slot is None]:
            raise ValueError(f"rank {', '.join(gone)} returned while rank {self.rank} waits for it in a collective")
        result = combine(self._meeting.slots)
        self._meeting.barrier.wait()
        return result

    def all_reduce(self, x):
        if is_dynamo_compiling():
            return collective_ops.all_reduce(x, self.number)
        return x.copy_(self._exchange(x, sum_in_rank_order))

    def all_gather(self, x, lengths):
        if is_dynamo_compiling():
            return collective_ops.all_gather(x, lengths, self.number)
        return self._exchange(x, lambda parts: torch.cat(parts, dim=-1))

    def broadcast(self, x, source=0):
        return x.copy_(self._exchange(x, lambda parts: parts[source].clone()))


def run_local(fn: Callable, tp_size: int, *args, device: torch.device | str = "cpu") -> list:
    """fn(comm, *args) on tp_size threads of this process; results in rank order.

    Args:
        fn: called once a rank, with that rank's communicator first. It builds its own model: ranks share the process,
            not their modules.

    Raises:
        The first failing rank's exception.
    """
    if tp_size < 1:
        raise ValueError(f"tp_size={tp_size}: at least one rank is needed")
    meeting = _Meeting(tp_size)
    results: list = [None] * tp_size
    errors: list[BaseException] = []
    consequences: list[BaseException] = []
    num_threads = torch.get_num_threads()

    def work(rank: int) -> None:
        torch.set_num_threads(max(1, num_threads // tp_size))
        try:
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

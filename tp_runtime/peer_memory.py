"""Collectives over memory of each rank that all ranks of the machine can read: the one-shot all-reduce, and its memory.

    PeerMemory   among CPU processes, by the program below
    PeerKernels  among GPUs, by the kernels of kernels/all_reduce.py

The plain program that `PeerMemory.exchange` equals:

    write my part; barrier; read everybody's parts; barrier

without the second barrier, because there are two slots a rank, used in turn:

    rank 0   write A0, count 1 | wait for 1 | read A0 A1 | write B0, count 2 | wait for 2 | read B0 B1 | write A0 ...
    rank 1   write A1, count 1 | wait for 1 | read A0 A1 | ...

A rank overwrites A at its third call at the earliest. It has then seen every count reach 2, and whoever counted 2 has
read A.

With its part, or without one for data that go another way, a rank writes in words what it is about to do, its label.
Whoever has waited compares all ranks' labels: ranks that came to different collectives, shapes or dtypes all say so.

A count is one aligned 8-byte store behind the data that it announces. On x86-64 no rank sees the two in another order;
on other processors that takes a fence that Python does not have, and the group keeps its own collectives.

On two cores an all-reduce of 1024 floats took 20 us this way and 1300 us through gloo (bench/results/notes.md).
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import platform
import select
import tempfile
import time
from collections.abc import Callable, Sequence

import torch

from .communicator import LABEL_BYTES, check_labels, sum_in_rank_order
from .kernels.all_reduce import Peers, all_reduce, all_reduce_rms_norm, peers_over
from .kernels.rms_norm import AddNorm, fits

SLOT_BYTES = 256 << 10  # what goes through at once
_LINE_BYTES = 64  # a cache line for each rank's count
BUFFER_BYTES = _LINE_BYTES + 2 * (LABEL_BYTES + SLOT_BYTES)
_KEPT_VIEWS = 1024
_SPINS = 200  # looks before the core is offered to others: some 20 us
_YIELD_S = 0.002  # then this long of offering, after which the wait sleeps
_SLEEP_MS = 1


class PeerMemory:
    """This rank's view of the buffers. Every rank makes the same calls.

    Args:
        buffers: uint8 [BUFFER_BYTES] of each rank, zero until every rank is here; from `Communicator.peer_buffers`.
        pids: of each rank's process.
        timeout_s: how long a collective waits for a rank.
    """

    def __init__(self, buffers: Sequence[torch.Tensor], rank: int, pids: Sequence[int], timeout_s: float):
        self.rank, self.size, self._timeout_s = rank, len(buffers), timeout_s
        self._buffers = buffers
        self._memory = [memoryview(buffer.numpy()) for buffer in buffers]
        self._counts = [memory[:_LINE_BYTES].cast("q") for memory in self._memory]
        self._peers = [r for r in range(self.size) if r != rank]
        self._calls = 0
        self._parts: dict[tuple, list[torch.Tensor]] = {}  # views, made once for each kind of call
        self._ends = select.poll()  # tells which peers have ended
        self._rank_of_fd = {os.pidfd_open(pid): r for r, pid in enumerate(pids) if r != rank}
        for fd in self._rank_of_fd:
            self._ends.register(fd, select.POLLIN)

    def __del__(self):
        for fd in getattr(self, "_rank_of_fd", ()):
            os.close(fd)

    def agree(self, label: bytes) -> None:
        """Returns when every rank has come here, with the same label of at most LABEL_BYTES.

        Raises:
            ValueError: on every rank: the labels differ.
            ConnectionError: a peer has ended, or did not come within the timeout.
        """
        self._calls += 1
        self._meet(label)

    def exchange(self, label: bytes, x: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Every rank's tensor, in rank order: views that hold until the next call but one.

        Args:
            label: says op, dtype and the shapes of all ranks' tensors, but for pieces of one: those x tells apart.
            x: this rank's, at most SLOT_BYTES, on the CPU.
            shapes: of each rank's tensor; the dtype is x's.

        Raises:
            As `agree`.
        """
        self._calls += 1
        key = label, x.shape, self._calls % 2
        if (parts := self._parts.get(key)) is None:
            if len(self._parts) == _KEPT_VIEWS:
                self._parts.clear()
            with torch.inference_mode(False):  # what is made within it cannot be written outside
                parts = self._parts[key] = [self._slot(r, shape, x.dtype) for r, shape in enumerate(shapes)]
        parts[self.rank].copy_(x.detach() if x.requires_grad else x)  # the views outlive any graph
        self._meet(label)
        return parts

    def all_reduce(self, x: torch.Tensor, label: bytes) -> torch.Tensor:
        """Sum over ranks of a contiguous x, in place, a slot at a time; returns it."""
        if x.nbytes <= SLOT_BYTES:
            return sum_in_rank_order(self.exchange(label, x, [x.shape] * self.size), x)
        for piece in x.view(-1).split(SLOT_BYTES // x.itemsize):
            sum_in_rank_order(self.exchange(label, piece, [piece.shape] * self.size), piece)
        return x

    def _meet(self, label: bytes) -> None:
        calls, start = self._calls, self._start()
        self._memory[self.rank][start : start + LABEL_BYTES] = label.ljust(LABEL_BYTES, b"\0")
        self._counts[self.rank][0] = calls
        for peer in self._peers:
            if self._counts[peer][0] < calls:
                self._wait_for(peer)
        check_labels([memory[start : start + LABEL_BYTES] for memory in self._memory])

    def _start(self) -> int:
        """Where this call's label stands in every buffer, and behind it the slot."""
        return _LINE_BYTES + self._calls % 2 * (LABEL_BYTES + SLOT_BYTES)

    def _slot(self, rank: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        if not (count := math.prod(shape)):
            return torch.empty(tuple(shape), dtype=dtype)
        start = self._start() + LABEL_BYTES
        return torch.frombuffer(self._memory[rank], dtype=dtype, count=count, offset=start).view(tuple(shape))

    def _wait_for(self, peer: int) -> None:
        count, calls = self._counts[peer], self._calls
        for _ in range(_SPINS):
            if count[0] >= calls:
                return
        began = time.monotonic()
        while count[0] < calls:
            waited_s = time.monotonic() - began
            if waited_s < _YIELD_S:
                os.sched_yield()
            elif ended := self._ends.poll(_SLEEP_MS):
                if count[0] < calls:  # it may have come, and then ended
                    gone = sorted(self._rank_of_fd[fd] for fd, _ in ended)
                    raise ConnectionError(
                        f"connection closed by rank {', '.join(map(str, gone))}: the process has ended"
                    )
            elif waited_s > self._timeout_s:
                raise ConnectionError(
                    f"timed out: rank {peer} did not reach collective {calls} in {self._timeout_s:g} s"
                )


class PeerKernels:
    """The kernels over memory of all ranks' GPUs, on the current stream: every call of a rank on the same one.

    Args:
        buffers: uint8 [BUFFER_BYTES] of each rank, zero until every rank is here; from `Communicator.peer_buffers`.
    """

    BUFFER_BYTES = 8 << 20
    # From here on 2 messages of n in two barriers take less than R of n in one: published for H100s with NVLink (vLLM's
    # custom all-reduce: 256 KiB at 8 ranks, 512 KiB at 4), not measured by this project.
    _TWO_SHOT_BYTES = 256 << 10
    _DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what sums in fp32 are exact enough for

    def __init__(self, buffers: Sequence[torch.Tensor], rank: int):
        self._buffers = buffers
        self._peers: Peers = peers_over(buffers, rank)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether x is of a dtype that the kernels sum."""
        return x.dtype in self._DTYPES

    def takes_norm(self, x: torch.Tensor) -> bool:
        """Whether the sum of x, in one shot, and what follows it are one launch."""
        return self.takes(x) and x.nbytes < self._TWO_SHOT_BYTES and fits(x.shape[-1])

    def all_reduce_norm(self, x: torch.Tensor, then: AddNorm) -> tuple[torch.Tensor, torch.Tensor]:
        """then.of(sum over ranks of x) for a contiguous x."""
        return all_reduce_rms_norm(x, self._peers, then)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks of a contiguous x, in place, as much as the buffers hold at a time; returns it."""
        if self.takes_norm(x):  # as other ranks may
            return all_reduce(x, self._peers, out=x, chunk=x.shape[-1])
        for piece in x.view(-1).split(self._peers.half_bytes // x.itemsize):
            all_reduce(piece, self._peers, two_shot=piece.nbytes >= self._TWO_SHOT_BYTES, out=piece)
        return x


def open_shared_memory(rank: int, size: int, num_bytes: int, gather: Callable[[object], list]) -> mmap.mmap | None:
    """Memory that all ranks' processes share, zero at first; None, on every rank, where they are on several machines.

    Args:
        gather: gives every rank all ranks' JSON-able values, in rank order.
    """
    where = place()
    name, descriptor = "", -1
    with contextlib.ExitStack() as stack:
        if rank == 0 and where:
            with contextlib.suppress(OSError):  # no /dev/shm, or no room in it
                descriptor, name = tempfile.mkstemp(prefix="tp_runtime-", dir="/dev/shm")
                stack.callback(os.close, descriptor)
                stack.callback(os.unlink, name)
                os.posix_fallocate(descriptor, 0, num_bytes)
        everyone = gather({"place": where, "name": name})
        memory = None
        if everyone[0]["name"] and all(other["place"] == where for other in everyone):
            with contextlib.suppress(OSError, ValueError):
                if rank != 0:
                    descriptor = os.open(everyone[0]["name"], os.O_RDWR | os.O_CLOEXEC)
                    stack.callback(os.close, descriptor)
                memory = mmap.mmap(descriptor, num_bytes)
        return memory if all(gather(memory is not None)) else None  # also: nobody needs the name any more


def place() -> str:
    """What two processes must share to share memory: machine, process numbers, /dev/shm. Empty where none is shared."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {os.stat('/dev/shm').st_dev}"
    except OSError:
        return ""


def orders_stores() -> bool:
    """Whether a count can follow its data without a fence, and a peer's end be seen."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return platform.machine() == "x86_64"

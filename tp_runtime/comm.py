"""Groups of ranks and what they say to each other. The only file that talks to torch.distributed.

One interface, three kinds:

    TorchCommunicator   ranks are processes; NCCL on GPUs; on CPUs gloo, and shared memory for small messages
    LocalCommunicator   ranks are threads of this process (tests, notebooks, several ranks on one device)
    NullCommunicator    says nothing: a single rank, or one rank of many for timing what is local

After a reduction every rank holds the same bits. Sums of our own are taken in rank order, in float32 for half-precision
tensors, and rounded once.
"""

from __future__ import annotations

import datetime
import json
import resource
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256

import torch
import torch.distributed as dist

from .heartbeat import Heartbeat
from .peer_memory import SLOT_BYTES, PeerMemory, open_peer_memory


class Communicator(ABC):
    """`rank` of `size`, tensors on `device`. Every rank calls the collectives in the same order, or nobody returns."""

    def __init__(self, rank: int, size: int, device: torch.device, heartbeat: Heartbeat | None = None):
        self.rank, self.size, self.device = rank, size, device
        self.heartbeat = heartbeat or Heartbeat.unwatched()
        self.collective_s: float | None = None  # host seconds in collectives; None where they are not waited for

    @abstractmethod
    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place; returns `x`. Same bits on every rank."""

    @abstractmethod
    def all_gather(self, x: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Concatenation over ranks along the last dimension.

        Args:
            x: [..., lengths[rank]]
            lengths: the last dimension of each rank's part; 0 is allowed.

        Returns:
            [..., sum(lengths)], the same bits on every rank.
        """

    @abstractmethod
    def broadcast(self, x: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Rank `source`'s values, in place; returns `x`."""

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        self.all_reduce(torch.zeros(1, device=self.device))

    def reset_clock(self) -> None:
        """Starts `collective_s`, where it is measured, and the peak of device memory anew."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory_bytes(self) -> int:
        """Device memory allocated at the peak; on the CPU the process's resident memory, shared pages included."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def device_name(self) -> str:
        """The GPU's name; `cpu`."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def gather_json(self, value) -> list:
        """Every rank's JSON-able value, in rank order, on every rank."""
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        length = torch.tensor([data.numel()], dtype=torch.int64, device=self.device)
        lengths = self.all_gather(length, [1] * self.size).tolist()
        text = self.all_gather(data, lengths).cpu().numpy().tobytes()
        ends = [sum(lengths[: r + 1]) for r in range(self.size)]
        return [json.loads(text[end - n : end]) for n, end in zip(lengths, ends, strict=True)]

    def check_agreement(self, fields: Mapping[str, object]) -> None:
        """Proves that all ranks were given the same values.

        Args:
            fields: what must agree, JSON-able, by the name that an error shows. Long values are compared by digest.

        Raises:
            ValueError: on every rank, naming the fields that differ (of many, the first), the ranks and their values.
        """
        if self.size == 1:
            return
        everyone = self.gather_json({name: _short(value) for name, value in fields.items()})
        problems = []
        for name in dict.fromkeys(name for mine in everyone for name in mine):
            ranks_of: dict[str, list[str]] = {}
            for rank, mine in enumerate(everyone):
                ranks_of.setdefault(mine.get(name, "nothing"), []).append(str(rank))
            if len(ranks_of) > 1:
                views = "; ".join(f"rank{'s' * (len(r) > 1)} {', '.join(r)}: {v}" for v, r in ranks_of.items())
                problems.append(f"{name} ({views})")
        if len(problems) > 5:
            problems[4:] = [f"{len(problems) - 4} more"]
        if problems:
            raise ValueError("ranks disagree on " + " and on ".join(problems) + "; every rank must be given the same")


_HALF = (torch.bfloat16, torch.float16)


def _sum_in_rank_order(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    dtype = parts[0].dtype
    total = parts[0].to(torch.float32 if dtype in _HALF else dtype, copy=True)
    for part in parts[1:]:
        total += part
    return total


def _short(value) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 60 else f"{text[:40]}... (sha256 {sha256(text.encode()).hexdigest()[:12]})"


class NullCommunicator(Communicator):
    """Does nothing. As rank 0 of 1 that is right; as one of many it leaves this rank's partial results, for timing."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu"):
        super().__init__(rank, size, torch.device(device))

    def all_reduce(self, x):
        return x

    def all_gather(self, x, lengths):
        if self.size == 1:
            return x
        out = x.new_zeros(*x.shape[:-1], sum(lengths))
        first = sum(lengths[: self.rank])
        out[..., first : first + lengths[self.rank]] = x
        return out

    def broadcast(self, x, source=0):
        return x

    def gather_json(self, value):
        return [value] * self.size


class TorchCommunicator(Communicator):
    """A torch.distributed process group.

    The group's own methods are called, not the functions of torch.distributed around them: those cost several
    microseconds of host time a call, twice a layer. CPU ranks of one machine exchange messages of up to 256 KiB, all of
    a decode step's, through shared memory.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        heartbeat: Heartbeat | None = None,
        timeout_s: float = dist.constants.default_pg_timeout.total_seconds(),
    ):
        self.group = group or dist.group.WORLD
        if device is None:
            is_nccl = "nccl" in dist.get_backend(self.group)
            device = torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")
        super().__init__(self.group.rank(), self.group.size(), torch.device(device), heartbeat)
        self._peers: PeerMemory | None = None
        if self.device.type == "cpu" and self.size > 1:
            self._peers = open_peer_memory(self.rank, self.size, self.gather_json, timeout_s)

    def reset_clock(self):
        super().reset_clock()
        self.collective_s = 0.0 if self.device.type == "cpu" else None

    def all_reduce(self, x):
        if (peers := self._peers) and x.nbytes <= SLOT_BYTES:
            parts = self._timed("all_reduce", lambda: peers.exchange(x, [x.shape] * self.size))
            return x.copy_(_sum_in_rank_order(parts))
        if not x.numel():
            return x
        # gloo rounds after each addition; of two ranks there is but one.
        wide = x.float() if x.dtype in _HALF and self.size > 2 and self.device.type == "cpu" else x
        self._timed("all_reduce", lambda: self.group.allreduce([wide]).wait())
        return x if wide is x else x.copy_(wide)

    def all_gather(self, x, lengths):
        if self.size == 1:
            return x
        longest, rows = max(lengths), x.shape[:-1].numel()
        if (peers := self._peers) and rows * longest * x.itemsize <= SLOT_BYTES:
            shapes = [(*x.shape[:-1], length) for length in lengths]
            return torch.cat(self._timed("all_gather", lambda: peers.exchange(x, shapes)), dim=-1)
        part = x.reshape(rows, lengths[self.rank])
        if lengths[self.rank] != longest:  # the group gathers equal parts only
            part = torch.nn.functional.pad(part, (0, longest - lengths[self.rank]))
        parts = [torch.empty(rows, longest, dtype=x.dtype, device=x.device) for _ in lengths]
        part = part.contiguous()
        self._timed("all_gather", lambda: self.group.allgather([parts], [part]).wait())
        whole = torch.cat([p[:, :n] for p, n in zip(parts, lengths, strict=True)], dim=1)
        return whole.reshape(*x.shape[:-1], whole.shape[1])

    def broadcast(self, x, source=0):
        options = dist.BroadcastOptions()
        options.rootRank = source
        self._timed("broadcast", lambda: self.group.broadcast([x], options).wait())
        return x

    def _timed(self, name: str, collective: Callable):
        """The collective's result, its end awaited on the CPU, only its place in the stream on a GPU."""
        self.heartbeat.enter(name)
        if self.collective_s is None:
            return collective()
        began = time.perf_counter()
        result = collective()
        self.collective_s += time.perf_counter() - began
        return result


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
    """All ranks are threads of this process."""

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
        return x.copy_(self._exchange(x, _sum_in_rank_order))

    def all_gather(self, x, lengths):
        return self._exchange(x, lambda parts: torch.cat(parts, dim=-1))

    def broadcast(self, x, source=0):
        return x.copy_(self._exchange(x, lambda parts: parts[source].clone()))


def communicator(group=None) -> Communicator:
    """The communicator of a process group, a 1-D DeviceMesh or one of ours; None: the default group, or a single rank.

    Raises:
        ValueError: a DeviceMesh of several dimensions, a group without this process, or something that is no group.
    """
    if isinstance(group, Communicator):
        return group
    if group is None:
        return TorchCommunicator() if dist.is_initialized() else NullCommunicator()
    if hasattr(group, "get_group"):
        if group.ndim != 1:
            raise ValueError(f"the DeviceMesh has {group.ndim} dimensions; pass its tensor-parallel one, mesh['tp']")
        group = group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:  # what dist.new_group gives those whom it leaves out
        raise ValueError("this process is not in the group; only the group's ranks may call")
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group is a {type(group).__name__}; pass a process group, a DeviceMesh or a Communicator")
    return TorchCommunicator(group)


def join_group(env, backend: str, device: torch.device) -> TorchCommunicator:
    """Joins this process to its group and returns the communicator.

    Ranks that the launcher started meet in a file of its private folder: no port, nothing that listens. Ranks of
    torchrun meet where its environment says.

    Args:
        env: launch.RankEnv.
        backend: `nccl` or `gloo`.
    """
    env.heartbeat.enter("rendezvous")
    store = dist.FileStore(env.store_path, env.world_size) if env.store_path else None
    if backend == "nccl":
        torch.cuda.set_device(device)
    # The launcher sees a hang first and names the rank; the group's own limit serves torchrun.
    timeout_s = env.timeout_s + (5 if env.store_path else 0)
    dist.init_process_group(
        backend,
        store=store,
        rank=env.rank if store else -1,
        world_size=env.world_size if store else -1,
        timeout=datetime.timedelta(seconds=timeout_s),
        device_id=device if backend == "nccl" else None,
    )
    return TorchCommunicator(device=device, heartbeat=env.heartbeat, timeout_s=timeout_s)


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
    comm = join_group(env, {"auto": "nccl" if device == "cuda" else "gloo"}.get(backend, backend), place)
    try:
        fn(comm)
    finally:
        dist.destroy_process_group()


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

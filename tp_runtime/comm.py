"""Groups of ranks and what they say to each other. The only file that talks to torch.distributed.

One interface, three kinds:

    TorchCommunicator   ranks are processes; NCCL on GPUs; on CPUs gloo, and shared memory for small messages
    LocalCommunicator   ranks are threads of this process; in local.py
    NullCommunicator    says nothing: a single rank, or one rank of many for timing what is local

After a reduction every rank holds the same bits. Sums of our own are taken in rank order, in float32 for half-precision
tensors, and rounded once.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256

import torch
import torch.distributed as dist
from torch.compiler import is_dynamo_compiling

from . import collective_ops
from .heartbeat import Heartbeat
from .peer_memory import SLOT_BYTES, PeerMemory, open_peer_memory


class Handle:
    """A collective that has been started."""

    def __init__(self, wait: Callable[[], object] = lambda: None):
        self.wait = wait


class Communicator(ABC):
    """`rank` of `size`, tensors on `device`. Every rank calls the collectives in the same order, or nobody returns.

    A kind whose ranks really meet leaves `all_reduce` and `all_gather` to `collective_ops` while dynamo traces them.
    """

    def __init__(self, rank: int, size: int, device: torch.device, heartbeat: Heartbeat | None = None):
        self.rank, self.size, self.device = rank, size, device
        self.heartbeat = heartbeat or Heartbeat.unwatched()
        self.collective_s: float | None = None  # host seconds in collectives; None where they are not waited for
        self.number = collective_ops.enter(self)

    @abstractmethod
    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place; returns `x`. Same bits on every rank."""

    def all_reduce_async(self, x: torch.Tensor) -> Handle:
        """Starts `all_reduce(x)`. `x` is the sum once the handle's `wait` has returned; until then leave it alone.

        On a GPU the current stream waits, not the host. A communicator that cannot do two things at once has finished
        when this returns.
        """
        self.all_reduce(x)
        return Handle()

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


def sum_in_rank_order(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum as every rank computes it for itself: of half-precision parts in float32."""
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
        if is_dynamo_compiling():
            return collective_ops.all_reduce(x, self.number)
        if (peers := self._peers) and x.nbytes <= SLOT_BYTES:
            parts = self._timed("all_reduce", lambda: peers.exchange(x, [x.shape] * self.size))
            return x.copy_(sum_in_rank_order(parts))
        self._start_all_reduce(x).wait()
        return x

    def all_reduce_async(self, x):
        if is_dynamo_compiling() or (self._peers and x.nbytes <= SLOT_BYTES):
            return super().all_reduce_async(x)
        return self._start_all_reduce(x)

    def _start_all_reduce(self, x: torch.Tensor) -> Handle:
        if not x.numel():
            return Handle()
        # gloo rounds after each addition; of two ranks there is but one.
        wide = x.float() if x.dtype in _HALF and self.size > 2 and self.device.type == "cpu" else x
        work = self.group.allreduce([wide])

        def wait():
            self._timed("all_reduce", work.wait)
            if wide is not x:
                x.copy_(wide)

        return Handle(wait)

    def all_gather(self, x, lengths):
        if self.size == 1:
            return x
        if is_dynamo_compiling():
            return collective_ops.all_gather(x, lengths, self.number)
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


@contextlib.contextmanager
def joined_group(env, backend: str, device: torch.device) -> Iterator[TorchCommunicator]:
    """This process in its group: within it, the communicator.

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
    try:
        yield TorchCommunicator(device=device, heartbeat=env.heartbeat, timeout_s=timeout_s)
    finally:
        dist.destroy_process_group()

"""Groups of ranks and what they say to each other. The only file that talks to torch.distributed.

One interface, communicator.py; three kinds:

    TorchCommunicator   ranks are processes; NCCL on GPUs; on CPUs gloo, and shared memory for small messages
    LocalCommunicator   ranks are threads of this process; in local.py
    NullCommunicator    says nothing: a single rank, or one rank of many for timing what is local

After a reduction every rank holds the same bits. Sums of our own are taken in rank order, in float32 for half-precision
tensors, and rounded once.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.compiler import is_dynamo_compiling

from . import collective_ops
from .communicator import HALF, Communicator, Handle, NullCommunicator, check_labels, label
from .heartbeat import Heartbeat
from .peer_memory import (
    BUFFER_BYTES,
    SLOT_BYTES,
    PeerKernels,
    PeerMemory,
    open_shared_memory,
    orders_stores,
    place,
)

_log = logging.getLogger("tp_runtime")

# Programs of an NCCL collective, each filling a multiprocessor: from Hopper on 4 to 16 are as fast as it gets (NVLS;
# published, not measured by this project).
_NCCL_CTAS = 16
_RENDEZVOUS_S = 30  # for ranks to exchange handles of their memory: milliseconds where none of them fails alone


class TorchCommunicator(Communicator):
    """A torch.distributed process group.

    The group's own methods are called, not the functions of torch.distributed around them: those cost several
    microseconds of host time a call, twice a layer. CPU ranks of one machine exchange messages of up to 256 KiB, all of
    a decode step's, through shared memory, and through it say of larger ones what they are about to do.
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
        self._kernels: PeerKernels | None = None
        self._has_tried_kernels = False
        self._seen: set[bytes] | None = None  # labels that all ranks agreed on; None while they do
        if self.device.type == "cpu" and self.size > 1:
            pids = self.gather_json(os.getpid() if orders_stores() else 0)
            if not all(pids):
                self._say("ranks share no memory: that takes x86-64 and Linux 5.3 on every one; the group sums all")
            elif buffers := self.peer_buffers(BUFFER_BYTES):
                self._peers = PeerMemory(buffers, self.rank, pids, timeout_s)
                self.one_shot_above = SLOT_BYTES
        elif self.size > 1 and _has_nvls(self.device):
            self.collective_sms = _NCCL_CTAS
        self._seen = set()

    def reset_clock(self):
        super().reset_clock()
        self.collective_s = 0.0 if self.device.type == "cpu" else None

    def all_reduce(self, x):
        if is_dynamo_compiling():
            return collective_ops.all_reduce(x, self.number)
        if (peers := self._peers) and x.nbytes <= SLOT_BYTES:
            return self._through(peers, x)
        self._start_all_reduce(x).wait()
        return x

    def all_reduce_async(self, x):
        if is_dynamo_compiling() or (self._peers and x.nbytes <= SLOT_BYTES):
            return super().all_reduce_async(x)
        return self._start_all_reduce(x)

    def all_reduce_one_shot(self, x):
        if peers := self._peers:
            return self._through(peers, x)
        if (kernels := self._kernels) is None or not kernels.takes(x):
            return self.all_reduce(x)
        self._announce("one-shot all_reduce", label("one-shot all_reduce", x.dtype, x.shape))
        return self._timed("all_reduce", lambda: kernels.all_reduce(x))

    def all_reduce_norm(self, x, then):
        if (kernels := self._kernels) is None or not kernels.takes_norm(x):
            return super().all_reduce_norm(x, then)
        self._announce("one-shot all_reduce", label("one-shot all_reduce", x.dtype, x.shape))
        return self._timed("all_reduce", lambda: kernels.all_reduce_norm(x, then))

    def _through(self, peers: PeerMemory, x: torch.Tensor) -> torch.Tensor:
        what = label("all_reduce", x.dtype, x.shape)
        return self._timed("all_reduce", lambda: peers.all_reduce(x, what))

    def _start_all_reduce(self, x: torch.Tensor) -> Handle:
        self._announce("all_reduce", label("all_reduce", x.dtype, x.shape))
        if not x.numel():
            return Handle()
        # gloo rounds after each addition; of two ranks there is but one.
        wide = x.float() if x.dtype in HALF and self.size > 2 and self.device.type == "cpu" else x
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
        what = label("all_gather", x.dtype, x.shape[:-1], tuple(lengths))
        if (peers := self._peers) and rows * longest * x.itemsize <= SLOT_BYTES:
            shapes = [(*x.shape[:-1], length) for length in lengths]
            return torch.cat(self._timed("all_gather", lambda: peers.exchange(what, x, shapes)), dim=-1)
        self._announce("all_gather", what)
        part = x.reshape(rows, lengths[self.rank])
        if lengths[self.rank] != longest:  # the group gathers equal parts only
            part = torch.nn.functional.pad(part, (0, longest - lengths[self.rank]))
        parts = [torch.empty(rows, longest, dtype=x.dtype, device=x.device) for _ in lengths]
        part = part.contiguous()
        self._timed("all_gather", lambda: self.group.allgather([parts], [part]).wait())
        whole = torch.cat([p[:, :n] for p, n in zip(parts, lengths, strict=True)], dim=1)
        return whole.reshape(*x.shape[:-1], whole.shape[1])

    def broadcast(self, x, source=0):
        self._announce("broadcast", label("broadcast", x.dtype, x.shape, f"from rank {source}"))
        options = dist.BroadcastOptions()
        options.rootRank = source
        self._timed("broadcast", lambda: self.group.broadcast([x], options).wait())
        return x

    def _announce(self, op: str, what: bytes) -> None:
        """Returns when all ranks are known to be about to do the same: gloo and NCCL abort, or hang, where they do not.
        Without shared memory they are asked at the first call of a kind and size."""
        if peers := self._peers:
            self._timed(op, lambda: peers.agree(what))
        elif (seen := self._seen) is not None and what not in seen and self.size > 1:
            if self.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
                self._seen = None  # the ranks gather by collectives themselves
                try:
                    check_labels([one.encode() for one in self.gather_json(what.decode())])
                finally:
                    self._seen = seen
            seen.add(what)

    def _timed(self, name: str, collective: Callable):
        """The collective's result, its end awaited on the CPU, only its place in the stream on a GPU."""
        self.heartbeat.enter(name)
        if self.collective_s is None:
            return collective()
        began = time.perf_counter()
        result = collective()
        self.collective_s += time.perf_counter() - began
        return result

    def open_one_shot(self):
        if self.device.type != "cuda" or self.size == 1 or self._has_tried_kernels:
            return
        self._has_tried_kernels = True
        if buffers := self.peer_buffers(PeerKernels.BUFFER_BYTES):
            self._kernels = PeerKernels(buffers, self.rank)
            self.one_shot_above, self.fuses_norm = 0, True
            self.barrier()  # all ranks' memory is zero, and mapped by all

    def peer_buffers(self, num_bytes):
        if self.size == 1:
            return super().peer_buffers(num_bytes)
        if self.device.type != "cpu":
            return self._symmetric_memory(num_bytes)
        memory = open_shared_memory(self.rank, self.size, self.size * num_bytes, self.gather_json)
        if memory is None:
            self._say(
                "ranks share no memory: they are on several machines, or /dev/shm is full; the group sums all"
            )
            return None
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        return list(whole.split(num_bytes))

    def _symmetric_memory(self, num_bytes: int) -> list[torch.Tensor] | None:
        """Memory of every rank's GPU. Each step is taken by all ranks or by none: a rank that failed alone would leave
        the others waiting in the next."""
        made: Any = None
        for step in (_reach, _allocate, _rendezvous):
            why = ""
            try:
                made = step(self, num_bytes, made)
            except (RuntimeError, OSError) as error:
                why = str(error).partition("\n")[0] or type(error).__name__
            if failed := [f"rank {rank}: {text}" for rank, text in enumerate(self.gather_json(why)) if text]:
                self._say(f"no GPU reads another's memory ({failed[0]}); NCCL sums all")
                return None
        return made

    def _say(self, line: str) -> None:
        if self.rank == 0:
            _log.warning(line)


def _reach(comm: TorchCommunicator, num_bytes: int, made: None) -> None:
    """RuntimeError where two ranks are on different machines, or their GPUs are known to have no access."""
    properties = torch.cuda.get_device_properties
    everyone = comm.gather_json({"place": place(), "gpu": str(properties(comm.device).uuid)})
    visible = {str(properties(index).uuid): index for index in range(torch.cuda.device_count())}
    mine = everyone[comm.rank]
    for rank, other in enumerate(everyone):
        if not mine["place"] or other["place"] != mine["place"]:
            raise RuntimeError(f"it and rank {rank} are not known to be on one machine")
        index = visible.get(other["gpu"])
        if index is not None and other["gpu"] != mine["gpu"]:
            if not torch.cuda.can_device_access_peer(comm.device, index):
                raise RuntimeError(f"{comm.device} has no access to cuda:{index} of rank {rank}")


def _allocate(comm: TorchCommunicator, num_bytes: int, made: None) -> torch.Tensor:
    """This rank's part."""
    from torch.distributed import _symmetric_memory  # private, as is its API: named here and below, and nowhere else

    return _symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=comm.device)


def _rendezvous(comm: TorchCommunicator, num_bytes: int, part: torch.Tensor) -> list[torch.Tensor]:
    """All ranks' parts, this rank's zeroed. A rank that fails here alone lets the others wait for _RENDEZVOUS_S."""
    from torch.distributed import _symmetric_memory

    part.zero_()
    torch.cuda.synchronize(comm.device)
    store = comm.group.get_group_store()
    usual = store.timeout
    store.set_timeout(datetime.timedelta(seconds=_RENDEZVOUS_S))
    try:
        handle = _symmetric_memory.rendezvous(part, comm.group)
    finally:
        store.set_timeout(usual)
    if handle is None:
        raise RuntimeError("torch knows no symmetric memory here")
    return [
        part if r == comm.rank else handle.get_remote_tensor(r, (num_bytes,), torch.uint8) for r in range(comm.size)
    ]


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


def _has_nvls(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _nccl_options(device: torch.device):
    """A stream of high priority: as soon as a multiprocessor is free NCCL has it, before the rest of a GEMM's grid."""
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    if _has_nvls(device):
        options.config.max_ctas = _NCCL_CTAS
    return options


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
        pg_options=_nccl_options(device) if backend == "nccl" else None,
        device_id=device if backend == "nccl" else None,
    )
    try:
        yield TorchCommunicator(device=device, heartbeat=env.heartbeat, timeout_s=timeout_s)
    finally:
        dist.destroy_process_group()

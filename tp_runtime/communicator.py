"""What a rank can say to the others: the interface of all communicators, and the one that says nothing."""

from __future__ import annotations

import functools
import json
import resource
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256

import torch

from . import collective_ops
from .heartbeat import Heartbeat
from .kernels.rms_norm import AddNorm

LABEL_BYTES = 128


class Handle:
    """A collective that has been started."""

    def __init__(self, wait: Callable[[], object] = lambda: None):
        self.wait = wait


class Communicator(ABC):
    """`rank` of `size`, tensors on `device`. Every rank calls the collectives in the same order, with tensors alike.

    A kind whose ranks really meet leaves `all_reduce` and `all_gather` to `collective_ops` while dynamo traces them.

    Attributes:
        fuses_norm: whether `all_reduce_norm` is one launch, of small messages; the same on every rank.
        one_shot_above: message bytes above which `all_reduce_one_shot` is another way than `all_reduce`; None: of none.
        collective_sms: multiprocessors of a GPU that `all_reduce_async` takes beside what is computed meanwhile.

    Raises:
        ValueError: by a collective, on every rank, naming ranks and what they called with, where that differs. Among
            threads, and among CPU processes of one machine, each call is checked; elsewhere the first of a kind and
            size, so that another later on is a hang, which the timeout ends.
    """

    fuses_norm = False
    one_shot_above: int | None = None
    collective_sms = 0

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

    def open_one_shot(self) -> None:
        """Sets `one_shot_above` where ranks can read each other's memory. Every rank calls it; once is enough."""
        return

    def all_reduce_one_shot(self, x: torch.Tensor) -> torch.Tensor:
        """`all_reduce`, every rank reading all ranks' parts for itself; the sum in rank order.

        Where `one_shot_above` is None it is `all_reduce` itself, which among local ranks does just that.

        Args:
            x: contiguous.
        """
        return self.all_reduce(x)

    def all_reduce_norm(self, x: torch.Tensor, then: AddNorm) -> tuple[torch.Tensor, torch.Tensor]:
        """then.of(all_reduce_one_shot(x)), where `fuses_norm` as one launch.

        To the other ranks both are the same call.
        """
        return then.of(self.all_reduce_one_shot(x))

    def peer_buffers(self, num_bytes: int) -> list[torch.Tensor] | None:
        """Memory of every rank, in rank order, that this rank can read and write. Every rank calls it.

        It lives as long as the tensors do; what kernels need of it is `kernels.all_reduce.peers_over`.

        Returns:
            uint8 [num_bytes] on this rank's device, zero at first, for each rank; None, on every rank and with one log
            line, where ranks cannot reach each other's memory.
        """
        return None if self.size > 1 else [torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)]

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
        if self.size > 1:
            check_alike(self.gather_json({name: _short(value) for name, value in fields.items()}))


def check_alike(everyone: Sequence[Mapping[str, str]]) -> None:
    """ValueError, naming fields, ranks and values, unless all ranks' fields, in rank order, are the same."""
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


def _short(value) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 60 else f"{text[:40]}... (sha256 {sha256(text.encode()).hexdigest()[:12]})"


@functools.lru_cache(maxsize=4096)
def label(op: str, dtype: torch.dtype, shape: tuple[int, ...], detail: str | tuple[int, ...] = "") -> bytes:
    """What must be alike on all ranks that meet in a collective, in words: at most LABEL_BYTES bytes."""
    text = f"{op} {str(dtype).removeprefix('torch.')} {list(shape)} {detail or ''}"
    return text.strip().encode()[:LABEL_BYTES]


def check_labels(labels: list) -> None:
    """ValueError, naming ranks and labels, unless the labels of all ranks, in rank order, are the same."""
    if labels.count(labels[0]) < len(labels):
        check_alike([{"collective": bytes(one).rstrip(b"\0").decode()} for one in labels])


HALF = (torch.bfloat16, torch.float16)


def sum_in_rank_order(parts: Sequence[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
    """`out`, the sum as every rank computes it for itself; of half-precision parts in float32, rounded once."""
    total = parts[0].float() if out.dtype in HALF else out.copy_(parts[0])
    for part in parts[1:]:
        total += part
    return total if total is out else out.copy_(total)


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

"""A row-parallel GEMM and the all-reduce of its partial sums: which schedule, on which stream.

The program, whatever the schedule:

    y = x_shard_k @ w_shard_k.T        [M, N], this rank's part of the sum over K
    y = sum of y over ranks            same bits on every rank
    y = y + bias                       or, in a decoder block, what follows: residual + (y + bias), and its norm

    sequential   compute   [ gemm            ]                  [ next
                 comm                         [ all-reduce      ]

    columns      compute   [ gemm 0 ][ gemm 1 ]        [ next                   block j holds columns of y, rows of w:
                 comm                [ reduce 0 ][ reduce 1 ]                     each weight is still read once

    one-shot     compute   [ gemm            ][ read all, sum ][ next            no cut, and less of what a collective
                                                                                 costs whatever its size; between GPUs
                                                                                 "sum" and "what follows" are one launch

    lanes        compute   [ A: gemm ][ B: ... gemm ][ A: next ... gemm ][ B:    two halves of the tokens, through all
                 comm                 [ reduce A ]   [ reduce B ]                 layers: see lanes.py

The compute stream is the current one. The other is the communicator's own: `all_reduce_async` lets it wait for the
compute stream, and the handle's `wait` lets the compute stream wait for it; on a GPU the host waits for neither. A
block lives until its handle has been waited for.

Which schedule is the fastest is measured once for each size of GEMM, on the live group: see race.py; for a sum without
a GEMM of its own, that of experts, once for each size of message.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch.compiler import is_dynamo_compiling

from .communicator import Communicator
from .kernels.gemm import gemm
from .kernels.rms_norm import AddNorm
from .race import Run, race, wins

# Below, a collective is bound by latency, and two of half the size take twice as long (NCCL: 7 to 18 us a call).
MIN_CUT_BYTES = 1 << 20
_COLUMN_BLOCKS = (2, 4)
_REPEATED_BYTES = 64 << 10  # shorter runs are measured as they follow each other in a model, this much together
_MAX_REPEATS = 20


class Schedule(NamedTuple):
    """One way to run a row-parallel GEMM: its output in `blocks` blocks of columns, or whole and by a one-shot sum."""

    blocks: int = 1
    is_one_shot: bool = False

    def __str__(self) -> str:
        return "one-shot" if self.is_one_shot else "sequential" if self.blocks == 1 else f"{self.blocks} column blocks"


SEQUENTIAL = Schedule()
ONE_SHOT = Schedule(is_one_shot=True)


class Size(NamedTuple):
    """What is measured once: a row-parallel GEMM, or a sum alone (K is 0), of 2^(bits - 1) < M <= 2^bits tokens."""

    bits: int
    out_features: int
    in_features: int  # of all ranks together: what is alike on all ranks decides, or some would measure alone
    dtype: torch.dtype

    def __str__(self) -> str:
        n, k = self.out_features, self.in_features
        what = f"gemm N {n} K {k}" if k else f"sum of {n} columns"
        return f"{what}, {str(self.dtype).removeprefix('torch.')}, M {(1 << self.bits >> 1) + 1} to {1 << self.bits}"


class Measured(NamedTuple):
    """Seconds of one row-parallel GEMM, one value a round: without its all-reduce, and under each schedule."""

    compute_s: list[float]
    schedule_s: dict[Schedule, list[float]]

    def fastest(self) -> Schedule:
        """The least median of those that beat the sequential schedule, or that itself."""
        sequential_s = self.schedule_s[SEQUENTIAL]
        better = {s: seconds for s, seconds in self.schedule_s.items() if wins(seconds, sequential_s)}
        return min(better, key=lambda schedule: statistics.median(better[schedule])) if better else SEQUENTIAL


def hidden_share(compute_s: Sequence[float], sequential_s: Sequence[float], schedule_s: Sequence[float]) -> float:
    """1 - (schedule - compute) / (sequential - compute), of medians: 0 for the sequential schedule, 1 where nothing of
    the communication is left to be seen; 0 where there is none to hide."""
    compute, sequential, schedule = map(statistics.median, (compute_s, sequential_s, schedule_s))
    return 1 - (schedule - compute) / (sequential - compute) if sequential > compute else 0.0


class Lanes(Protocol):
    """What `all_reduce` needs of lanes.Lanes."""

    def switch(self) -> None: ...


@dataclass
class Overlap:
    """How the row-parallel GEMMs of a model are scheduled, and what was measured to decide it.

    Args:
        comm: the ranks.
        mode: auto; off (sequential), columns, lanes, one-shot: always this one where the size allows it.
    """

    comm: Communicator
    mode: str = "auto"
    lanes: Lanes | None = None  # while the tokens run in two lanes
    measured: dict[Size, Measured] = field(default_factory=dict)
    # [in one pass without all-reduces, in one pass, in lanes], by bits of the tokens
    lanes_s: dict[int, list[list[float]]] = field(default_factory=dict)

    def __post_init__(self):
        if self.mode in ("auto", "one-shot"):
            self.comm.open_one_shot()

    def schedule(self, x: torch.Tensor, w: torch.Tensor, in_features: int) -> Schedule:
        """The fastest for x [..., K_r] and w [N, K_r]; measures at the first call of a size, which every rank makes.

        Args:
            in_features: K, of all ranks together.
        """
        m, n = x.shape[:-1].numel(), len(w)
        size = Size(_bits(m), n, in_features, x.dtype)
        return self._choose(size, m, partial(gemm, x, w), partial(run, x, w, self.comm))

    def sum_schedule(self, y: torch.Tensor) -> Schedule:
        """The fastest for the sum of y [..., N] alone: sequential or one-shot."""
        m, n = y.shape[:-1].numel(), y.shape[-1]
        size = Size(_bits(m), n, 0, y.dtype)
        zeros = partial(torch.zeros_like, y)
        return self._choose(size, m, zeros, lambda schedule: _sum(zeros(), self.comm, schedule))

    def _choose(self, size: Size, m: int, compute: Run, runs: Callable[[Schedule], object]) -> Schedule:
        if self.mode in ("off", "lanes") or is_dynamo_compiling():
            return SEQUENTIAL
        if self.mode == "one-shot":
            return ONE_SHOT
        num_bytes = m * size.out_features * size.dtype.itemsize
        blocks = _COLUMN_BLOCKS if size.in_features and num_bytes >= MIN_CUT_BYTES else ()
        if self.mode == "columns":
            return Schedule(blocks[-1]) if blocks else SEQUENTIAL
        above = self.comm.one_shot_above
        one_shot = () if above is None or num_bytes <= above else (ONE_SHOT,)
        if not (blocks or one_shot):
            return SEQUENTIAL
        if size not in self.measured:
            if self.is_capturing():
                return SEQUENTIAL
            schedules = [SEQUENTIAL, *map(Schedule, blocks), *one_shot]
            repeats = min(_MAX_REPEATS, 1 + _REPEATED_BYTES // max(num_bytes, 1))
            compute_s, *schedule_s = race(self.comm, compute, *(partial(runs, s) for s in schedules), repeats=repeats)
            self.measured[size] = Measured(compute_s, dict(zip(schedules, schedule_s, strict=True)))
        return self.measured[size].fastest()

    def smallest_choice(self) -> int:
        """Bytes of a sum below which the schedule is sequential, whatever the mode."""
        above = self.comm.one_shot_above
        return MIN_CUT_BYTES if above is None else min(MIN_CUT_BYTES, above + 1)

    def report(self) -> dict:
        """What was measured and chosen, JSON-able.

        Returns:
            mode; chosen: of each size `what`, `schedule`, `hidden_share`, and microseconds: `us` with the schedule,
            `sequential_us`, `compute_us` without communication.
        """
        rows = [(str(size), str(m.fastest()), m.compute_s, m.schedule_s[SEQUENTIAL], m.schedule_s[m.fastest()])
                for size, m in self.measured.items()]  # fmt: skip
        for bits, (compute_s, whole_s, lanes_s) in self.lanes_s.items():
            chosen = ("lanes", lanes_s) if wins(lanes_s, whole_s) else ("one pass", whole_s)
            rows.append(
                (f"layers, {1 << bits >> 1} to {(1 << bits) - 1} tokens", chosen[0], compute_s, whole_s, chosen[1])
            )
        return {
            "mode": self.mode,
            "chosen": [
                {
                    "what": what,
                    "schedule": schedule,
                    "hidden_share": hidden_share(compute_s, sequential_s, schedule_s),
                    "us": statistics.median(schedule_s) * 1e6,
                    "sequential_us": statistics.median(sequential_s) * 1e6,
                    "compute_us": statistics.median(compute_s) * 1e6,
                }
                for what, schedule, compute_s, sequential_s, schedule_s in rows
            ],
        }

    def is_capturing(self) -> bool:
        """Whether a CUDA graph is being captured: no time for measurements."""
        return self.comm.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _bits(m: int) -> int:
    return max(m - 1, 1).bit_length()


def all_reduce(y: torch.Tensor, overlap: Overlap, then: AddNorm | None = None):
    """Sum over ranks of y, in place, or what `then` makes of it; meanwhile the other lane computes, if there is one."""
    if overlap.lanes is not None:
        handle = overlap.comm.all_reduce_async(y)
        overlap.lanes.switch()
        handle.wait()
        return y if then is None else then.of(y)
    schedule = SEQUENTIAL if y.nbytes < overlap.smallest_choice() else overlap.sum_schedule(y)
    return _sum(y, overlap.comm, schedule, then)


def _sum(y: torch.Tensor, comm: Communicator, schedule: Schedule, then: AddNorm | None = None):
    if schedule.is_one_shot and then is not None:
        return comm.all_reduce_norm(y, then)
    y = comm.all_reduce_one_shot(y) if schedule.is_one_shot else comm.all_reduce(y)
    return y if then is None else then.of(y)


def run(
    x_shard_k: torch.Tensor,
    w_shard_k: torch.Tensor,
    comm: Communicator,
    schedule: Schedule,
    then: AddNorm | None = None,
):
    """sum over ranks of x @ w.T under a schedule: [..., N], or what `then` makes of it; the same bits on every rank."""
    if schedule.blocks == 1:
        return _sum(gemm(x_shard_k, w_shard_k), comm, schedule, then)
    blocks = []
    with room_for_collectives(comm):
        for w_block in w_shard_k.chunk(schedule.blocks):
            y_block = gemm(x_shard_k, w_block)
            blocks.append((y_block, comm.all_reduce_async(y_block)))
    for _, handle in blocks:
        handle.wait()
    y = torch.cat([y_block for y_block, _ in blocks], dim=-1)
    return y if then is None else then.of(y)


@contextlib.contextmanager
def room_for_collectives(comm: Communicator) -> Iterator[None]:
    """Within it GEMMs of ours leave a collective of `comm` the multiprocessors that it takes. (cuBLAS takes all.)"""
    if comm.device.type != "cuda":
        yield
        return
    from .kernels.target import leaving_sms

    with leaving_sms(comm.collective_sms):
        yield


def few_elements(overlap: Overlap, in_features_local: int, out_features: int, itemsize: int) -> int:
    """How many elements x [..., K_r] must have for there to be a choice: what a decode step asks in 0.1 us."""
    return overlap.smallest_choice() // max(out_features * itemsize, 1) * in_features_local


def row_parallel(
    x_shard_k: torch.Tensor,
    w_shard_k: torch.Tensor,
    bias: torch.Tensor | None,
    overlap: Overlap,
    in_features: int,
    few: int = 0,
    then: AddNorm | None = None,
):
    """sum over ranks of x_shard_k @ w_shard_k.T, plus bias once.

    Args:
        x_shard_k: [..., K_r], this rank's input features.
        w_shard_k: [N, K_r].
        bias: [N], the same on every rank.
        in_features: K, the sum of all ranks' K_r.
        few: `few_elements`; an x with fewer is summed in sequence.
        then: what follows, which adds the bias too.

    Returns:
        [..., N], or what `then` makes of it; the same bits on every rank.
    """
    if then is not None and bias is not None:
        then = then.with_x_bias(bias)
    if overlap.lanes is not None:
        y = all_reduce(gemm(x_shard_k, w_shard_k), overlap, then)
    elif x_shard_k.numel() < few:
        y = overlap.comm.all_reduce(gemm(x_shard_k, w_shard_k))
        y = y if then is None else then.of(y)
    else:
        y = run(x_shard_k, w_shard_k, overlap.comm, overlap.schedule(x_shard_k, w_shard_k, in_features), then)
    return y if bias is None or then is not None else y.add_(bias)

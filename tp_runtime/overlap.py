"""A row-parallel GEMM and the all-reduce of its partial sums: which schedule, on which stream.

The program, whatever the schedule:

    y = x_shard_k @ w_shard_k.T        [M, N], this rank's part of the sum over K
    y = sum of y over ranks            same bits on every rank
    y = y + bias

    sequential   compute   [ gemm            ]                  [ next
                 comm                         [ all-reduce      ]

    columns      compute   [ gemm 0 ][ gemm 1 ]        [ next                   block j holds columns of y, rows of w:
                 comm                [ reduce 0 ][ reduce 1 ]                     each weight is still read once

    lanes        compute   [ A: gemm ][ B: ... gemm ][ A: next ... gemm ][ B:    two halves of the tokens, through all
                 comm                 [ reduce A ]   [ reduce B ]                 layers: see lanes.py

The compute stream is the current one. The other is the communicator's own: `all_reduce_async` lets it wait for the
compute stream, and the handle's `wait` lets the compute stream wait for it; on a GPU the host waits for neither. A
block lives until its handle has been waited for.

Which schedule is the fastest is measured once for each size of GEMM, on the live group, by the slowest rank's clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch.compiler import is_dynamo_compiling

from .comm import Communicator
from .kernels.gemm import gemm

# Below, a collective is bound by latency, and two of half the size take twice as long (NCCL: 7 to 18 us a call).
MIN_CUT_BYTES = 1 << 20
_COLUMN_BLOCKS = (2, 4)
_ROUNDS = 5


class Schedule(NamedTuple):
    """One way to run a row-parallel GEMM: its output in `blocks` blocks of columns."""

    blocks: int = 1

    def __str__(self) -> str:
        return "sequential" if self.blocks == 1 else f"{self.blocks} column blocks"


SEQUENTIAL = Schedule()


class Measured(NamedTuple):
    """Seconds of one row-parallel GEMM, one value a round: without its all-reduce, and under each schedule."""

    compute_s: list[float]
    schedule_s: dict[Schedule, list[float]]

    def fastest(self) -> Schedule:
        """The least median of those that were faster than the sequential schedule in every round, or that itself."""
        sequential_s = self.schedule_s[SEQUENTIAL]
        better = {s: seconds for s, seconds in self.schedule_s.items() if wins(seconds, sequential_s)}
        return min(better, key=lambda schedule: statistics.median(better[schedule])) if better else SEQUENTIAL


def wins(seconds: Sequence[float], others: Sequence[float]) -> bool:
    """Whether each round was faster than the other's round beside it: chance alone rarely does that."""
    return all(a < b for a, b in zip(seconds, others, strict=True))


class Lanes(Protocol):
    """What `all_reduce` needs of lanes.Lanes."""

    def switch(self) -> None: ...


@dataclass
class Overlap:
    """How the row-parallel GEMMs of a model are scheduled, and what was measured to decide it.

    Args:
        comm: the ranks.
        mode: auto; off (sequential), columns, lanes: always this one where the size allows it.
    """

    comm: Communicator
    mode: str = "auto"
    lanes: Lanes | None = None  # while the tokens run in two lanes
    measured: dict[tuple, Measured] = field(default_factory=dict)  # by (bits of M, N, K, dtype)
    lanes_s: dict[int, list[list[float]]] = field(default_factory=dict)  # [not cut, in lanes], by bits of the tokens

    def schedule(self, x: torch.Tensor, w: torch.Tensor, in_features: int) -> Schedule:
        """The fastest for x [..., K_r] and w [N, K_r]; measures at the first call of a size, which every rank makes.

        Args:
            in_features: K, of all ranks together: what is alike on all ranks decides, or some would measure alone.
        """
        m, n = x.shape[:-1].numel(), len(w)
        if self.mode in ("off", "lanes") or m * n * x.element_size() < MIN_CUT_BYTES or is_dynamo_compiling():
            return SEQUENTIAL
        if self.mode == "columns":
            return Schedule(_COLUMN_BLOCKS[-1])
        key = (max(m - 1, 1).bit_length(), n, in_features, x.dtype)
        if key not in self.measured:
            if self.is_capturing():
                return SEQUENTIAL
            schedules = [SEQUENTIAL, *map(Schedule, _COLUMN_BLOCKS)]
            runs = [lambda s=s: run(x, w, self.comm, s) for s in schedules]
            compute_s, *schedule_s = self.slowest_s([lambda: gemm(x, w), *runs])
            self.measured[key] = Measured(compute_s, dict(zip(schedules, schedule_s, strict=True)))
        return self.measured[key].fastest()

    def is_capturing(self) -> bool:
        """Whether a CUDA graph is being captured: no time for measurements."""
        return self.comm.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def slowest_s(self, runs: Sequence[Callable[[], object]]) -> list[list[float]]:
        """Seconds of each run in each round, by the slowest rank's clock: the same on every rank, so all decide alike.

        Every rank calls it, with the same runs; they take turns, after one round to warm up.
        """
        mine = [[self._seconds(run) for run in runs] for _ in range(1 + _ROUNDS)][1:]
        rounds = zip(*self.comm.gather_json(mine), strict=True)  # of each round, every rank's seconds
        slowest = [[max(seconds) for seconds in zip(*ranks, strict=True)] for ranks in rounds]
        return [list(seconds) for seconds in zip(*slowest, strict=True)]

    def _seconds(self, run: Callable[[], object]) -> float:
        self._finish_device()
        began = time.perf_counter()
        run()
        self._finish_device()
        return time.perf_counter() - began

    def _finish_device(self) -> None:
        if self.comm.device.type == "cuda":
            torch.cuda.synchronize(self.comm.device)


def all_reduce(y: torch.Tensor, overlap: Overlap) -> torch.Tensor:
    """Sum over ranks of y, in place; meanwhile the other lane computes, where there is one."""
    if overlap.lanes is None:
        return overlap.comm.all_reduce(y)
    handle = overlap.comm.all_reduce_async(y)
    overlap.lanes.switch()
    handle.wait()
    return y


def run(x_shard_k: torch.Tensor, w_shard_k: torch.Tensor, comm: Communicator, schedule: Schedule) -> torch.Tensor:
    """sum over ranks of x @ w.T under a schedule with more than one block: [..., N], the same bits on every rank."""
    if schedule.blocks == 1:
        return comm.all_reduce(gemm(x_shard_k, w_shard_k))
    blocks = []
    for w_block in w_shard_k.chunk(schedule.blocks):
        y_block = gemm(x_shard_k, w_block)
        blocks.append((y_block, comm.all_reduce_async(y_block)))
    for _, handle in blocks:
        handle.wait()
    return torch.cat([y_block for y_block, _ in blocks], dim=-1)


def few_elements(in_features_local: int, out_features: int, itemsize: int) -> int:
    """How many elements x [..., K_r] must have for a cut to be thought of: what a decode step asks in 0.1 us."""
    return MIN_CUT_BYTES // max(out_features * itemsize, 1) * in_features_local


def row_parallel(
    x_shard_k: torch.Tensor,
    w_shard_k: torch.Tensor,
    bias: torch.Tensor | None,
    overlap: Overlap,
    in_features: int,
    few: int = 0,
) -> torch.Tensor:
    """sum over ranks of x_shard_k @ w_shard_k.T, plus bias once.

    Args:
        x_shard_k: [..., K_r], this rank's input features.
        w_shard_k: [N, K_r].
        bias: [N], the same on every rank.
        in_features: K, the sum of all ranks' K_r.
        few: `few_elements`; an x with fewer is not cut.

    Returns:
        [..., N], the same bits on every rank.
    """
    if overlap.lanes is not None:
        y = all_reduce(gemm(x_shard_k, w_shard_k), overlap)
    elif x_shard_k.numel() < few:
        y = overlap.comm.all_reduce(gemm(x_shard_k, w_shard_k))
    else:
        y = run(x_shard_k, w_shard_k, overlap.comm, overlap.schedule(x_shard_k, w_shard_k, in_features))
    return y if bias is None else y.add_(bias)

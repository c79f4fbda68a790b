"""Which of several ways to compute something is the fastest: measured by all ranks together, so that all decide alike.

    compute_s, sequential_s, *rivals_s = race(comm, compute, sequential, *rivals)
    wins(rivals_s[0], sequential_s)          the same answer on every rank

    round      compute | sequential | rival 0 | rival 1      by the slowest rank's clock, one after the other
    round      compute | sequential | rival 0                rival 1 can no longer win
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from .communicator import Communicator

# What is no faster than its rival wins so many rounds in 3 races of 100; what is faster in 9 rounds of 10 does in 91.
_ROUNDS, _WINS = 11, 9

Run = Callable[[], object]


def race(comm: Communicator, compute: Run, sequential: Run, *rivals: Run, repeats: int = 1) -> list[list[float]]:
    """Seconds of each in each of its rounds, by the slowest rank's clock: the same on every rank.

    Every rank calls it, with the same runs; they take turns, after one round to warm up. A rival that has won against
    `sequential`, or no longer can, runs no more; with the last rival the race ends.

    Args:
        compute: what all have in common, to be told how much they add to it.
        repeats: how often a run is repeated within a round, as calls follow each other in a model.
    """
    runs = (compute, sequential, *rivals)
    found: list[list[float]] = [[] for _ in runs]
    for i in range(1 + _ROUNDS):
        running = [0, 1, *(k for k in range(2, len(runs)) if not _is_decided(found[k], found[1]))]
        if len(running) == 2:
            break
        mine = [_seconds(runs[k], repeats, comm.device) for k in running]
        slowest = map(max, zip(*comm.gather_json(mine), strict=True))
        if i:
            for k, seconds in zip(running, slowest, strict=True):
                found[k].append(seconds)
    return found


def wins(seconds: Sequence[float], others: Sequence[float]) -> bool:
    """Whether so many rounds were faster than the other's rounds beside them that chance alone rarely does that."""
    return _num_faster(seconds, others) >= _WINS


def _is_decided(seconds: Sequence[float], others: Sequence[float]) -> bool:
    """Whether the rounds that are left cannot change what `wins` says."""
    return wins(seconds, others) or len(seconds) - _num_faster(seconds, others) > _ROUNDS - _WINS


def _num_faster(seconds: Sequence[float], others: Sequence[float]) -> int:
    return sum(a < b for a, b in zip(seconds, others))  # the others may have gone on for longer


def _seconds(run: Run, repeats: int, device: torch.device) -> float:
    _finish(device)
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    _finish(device)
    return (time.perf_counter() - began) / repeats


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

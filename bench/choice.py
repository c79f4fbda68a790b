"""One row of a tuned table: every candidate of an op is checked, then timed beside torch, and the fastest is chosen.

    candidates -> compile -> right? -> time all of them, shortly -> time the fastest few again -> row

Right: two runs give the same bits, and the error against float64 is at most twice torch's, for the most and the fewest
tokens of the bucket. A kernel is chosen if it was faster than torch in four of five repeats, else torch is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from bench import timing
from bench.kernel_ops import Op
from bench.kernel_shapes import KernelShape
from bench.on_gpu.errors import against
from bench.record import ratio, spread
from tp_runtime.estimate import Device
from tp_runtime.kernels import tuned

SCREEN_REPEATS, FINALISTS = 5, 3
COMPILE_S, COMPILERS = 0.5, 8  # of one configuration, a guess; how many are compiled at a time

_log = logging.getLogger("bench.tune")

Timer = Callable[..., dict[str, list[float]]]  # timing.time_us
Candidate = tuple[str, Any]  # kernel, configuration


class Task(NamedTuple):
    """A row to be measured."""

    op: Op
    shape: KernelShape
    m: int
    dtype: torch.dtype

    @property
    def key(self) -> tuned.Key:
        return tuned.Key(self.op.name, tuned.dtype_name(self.dtype), *self.op.size(self.shape), self.m)

    @property
    def size(self) -> tuple[int, int, int]:
        """M, N, K."""
        return self.m, *self.op.size(self.shape)

    @property
    def name(self) -> str:
        return f"{self.op.name} {self.shape.name}, M={self.m}"

    def candidates(self) -> dict[str, Candidate]:
        """Label -> candidate."""
        return {label(*c): c for c in self.op.candidates(*self.size, self.dtype)}

    def limit_us(self, device: Device) -> float:
        return self.op.limit_us(*self.size, self.dtype.itemsize, device)

    def estimate_s(self, device: Device, num_new: int) -> float:
        """A guess of the time that it takes, `num_new` of its configurations having to be compiled."""
        num_candidates = len(self.candidates())
        call_us = 2 * self.limit_us(device)
        checks = 12 * (num_candidates + 1) * call_us  # float64 and what compares with it
        replays = (SCREEN_REPEATS + 4) * (num_candidates + 1) + (timing.REPEATS + 4) * (FINALISTS + 1)
        replay_us = max(timing.MIN_REPLAY_US, timing.MIN_COPIES * call_us)
        return 0.2 + 0.02 * num_candidates + num_new * COMPILE_S / COMPILERS + (checks + replays * replay_us) / 1e6


def label(kernel: str, config: Any) -> str:
    """`decode(BLOCK_N=64, SPLITS=2)`."""
    return f"{kernel}({', '.join(f'{field}={value}' for field, value in config._asdict().items())})"


def measure(task: Task, device: str = "cuda", timer: Timer = timing.time_us) -> tuned.Row:
    """The row of a task.

    Returns:
        What `tuned.save_rows` takes: the key's fields; "kernel" with its configuration's fields, or "torch"; "us", our
        fastest kernel's median, None where none is right; "torch_us", None where torch cannot be recorded; versions.
    """
    x, ws = task.op.operands(*task.size, task.dtype, device)
    candidates = task.candidates()
    if x.is_cuda:
        compile_ahead(task.op, candidates.values(), x, ws[0])
    right = without_faults(task, candidates, x, ws[0])

    calls = {name: lambda i, chosen=chosen: task.op.ours(x, ws[i], *chosen) for name, chosen in right.items()}
    if task.op.has_torch(x, ws[0]):
        calls[tuned.TORCH] = lambda i: task.op.torchs(x, ws[i])
    median_us = {name: spread(us)["median"] for name, us in timer(calls, len(ws), SCREEN_REPEATS, device).items()}
    finalists = sorted(right, key=median_us.__getitem__)[:FINALISTS]
    last = {name: call for name, call in calls.items() if name in (*finalists, tuned.TORCH)}
    us = timer(last, len(ws), timing.REPEATS, device)
    median_us = {name: round(spread(times)["median"], 2) for name, times in us.items()}

    best, torchs = min(finalists, key=median_us.__getitem__, default=None), us.get(tuned.TORCH)
    chosen = {"kernel": tuned.TORCH}
    if best and (torchs is None or ratio(us[best], torchs)["p80"] < 1):
        kernel, config = right[best]
        chosen = {"kernel": kernel, **config._asdict()}
    measured = {"us": best and median_us[best], "torch_us": median_us.get(tuned.TORCH)}
    return {**task.key._asdict(), **chosen, **measured, "triton": tuned.triton_minor(), "torch": torch.__version__}


def compile_ahead(op: Op, candidates: Iterable[Candidate], x: torch.Tensor, w: torch.Tensor) -> None:
    """Compile several candidates at a time; one that fails to fails again, and is told, when it is checked."""

    def compile_one(candidate: Candidate) -> None:
        with torch.inference_mode():
            try:
                op.ours(x, w, *candidate)
            except Exception:
                pass

    with ThreadPoolExecutor(COMPILERS) as pool:
        list(pool.map(compile_one, candidates))
    torch.cuda.synchronize()


@torch.inference_mode()
def without_faults(
    task: Task, candidates: dict[str, Candidate], x: torch.Tensor, w: torch.Tensor
) -> dict[str, Candidate]:
    """The candidates that are right; one log line for each of the others."""
    torchs_of = {m: task.op.torchs(x[:m], w) for m in {task.m, task.m // 2 + 1}}  # the most and the fewest of a bucket
    want = task.op.exact(x, w)
    right = {}
    for name, candidate in candidates.items():
        try:
            faults = (_fault(task.op, candidate, x[:m], w, want[:m], torchs) for m, torchs in torchs_of.items())
            text = next(filter(None, faults), "")
        except Exception as error:  # whatever a compiler says of one candidate, the others are measured
            text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            if x.is_cuda:
                torch.cuda.synchronize()  # raises where the device is lost: nothing more can be measured then
        if text:
            _log.warning("%s: %s is left out: %s", task.name, name, text)
        else:
            right[name] = candidate
    return right


def _fault(
    op: Op, candidate: Candidate, x: torch.Tensor, w: torch.Tensor, want: torch.Tensor, torchs: torch.Tensor
) -> str:
    """What is wrong with a candidate's results; empty where nothing is."""
    got, again = (op.ours(x, w, *candidate) for _ in range(2))
    if (got.shape, got.dtype) != (torchs.shape, torchs.dtype):
        return f"{list(got.shape)} {got.dtype} in place of {list(torchs.shape)} {torchs.dtype}"
    if not torch.equal(got, again):
        return f"two runs differ or hold a NaN (M={len(x)})"
    error = against(want, got, torchs)
    if not error["is_ok"]:
        ratios = (f"{error[which] or float('nan'):.3g}" for which in ("max_ratio", "rms_ratio"))
        return "max and RMS error are {} and {} times torch's (M={})".format(*ratios, len(x))
    return ""

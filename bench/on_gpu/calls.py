"""Ops that are more than one GEMM: how a call of one is judged.

    exact     every float that it returns as exact as torch's, against the same in float64; every integer equal. What is
              allocated meanwhile is full of NaN, so that what a kernel does not write shows
    steady    a CUDA graph that was captured once follows its inputs; repeats beside other work, and two streams at
              once, give equal bits
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.choice import COMPILERS
from bench.gpu_section import Row
from bench.on_gpu.cases import Faults
from bench.on_gpu.errors import against
from bench.on_gpu.races import REPEATS, REPLAYS, busy_beside, release, replayed, synchronize

Result = torch.Tensor | Sequence[torch.Tensor]


@dataclass(frozen=True)
class Form:
    """One way to call an op.

    Attributes:
        ours: label -> the op, by each of its candidates, as a function of `args`.
        torchs: the same function of `args` by torch: in their dtype what ours is measured by, in float64 the truth.
    """

    name: str
    ours: Mapping[str, Callable[..., Result]]
    torchs: Callable[..., Result]
    args: Sequence[Any] = field(repr=False)


@dataclass(frozen=True)
class Call:
    """A call that is made again and again.

    Attributes:
        draw: fills the inputs, and all that `run` changes, anew: of a seed always the same.
        run: returns the results, and what it has changed.
    """

    draw: Callable[[int], None]
    run: Callable[[], Result]


def flat(result: Result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def doubled(args: Iterable[Any]) -> list[Any]:
    """The operands in float64; integers and what is no tensor as they are."""
    return [arg.double() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg for arg in args]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """What is allocated within is full of NaN, or of the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch fills what is not initialised then
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@torch.inference_mode()
def check_exact(what: str, forms: Iterable[Form], device: str, may_refuse: bool = False, **facts: Any) -> Row:
    """One row: the worst errors of any form and candidate over torch's, and what is wrong with which."""
    forms = list(forms)
    if device == "cuda":
        compile_together([lambda f=f, ours=ours: ours(*f.args) for f in forms for ours in f.ours.values()])
    faults, worst = Faults(device, may_refuse), {"max_ratio": 0.0, "rms_ratio": 0.0}
    for form in forms:
        torchs, want = flat(form.torchs(*form.args)), flat(form.torchs(*doubled(form.args)))
        for label, ours in form.ours.items():

            def fault(ours=ours, args=form.args, want=want, torchs=torchs) -> str:
                with poisoned_memory():
                    got = flat(ours(*args))
                return inexact(got, want, torchs, worst)

            faults.check(f"{label} {form.name}".strip(), fault)
        del torchs, want
    return faults.row(what, **worst, **facts)


def inexact(
    got: Sequence[torch.Tensor], want: Sequence[torch.Tensor], torchs: Sequence[torch.Tensor], worst: dict[str, float]
) -> str:
    """What is wrong with results; empty if nothing is. Errors of floats over torch's go into `worst`."""
    for number, (ours, exact, theirs) in enumerate(zip(got, want, torchs, strict=True)):
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            alike = f"{list(ours.shape)} {ours.dtype}", f"{list(theirs.shape)} {theirs.dtype}"
            return "result {} is {}, torch's {}".format(number, *alike)
        if not ours.is_floating_point():
            if not torch.equal(ours, theirs):
                return f"result {number} differs from torch's in {int((ours != theirs).sum())} integers"
            continue
        error = against(exact, ours, theirs)
        for which in worst:
            worst[which] = max(worst[which], error[which] or 0.0)
        if not error["is_ok"]:
            ratios = (f"{error[which]:.3g}" if error[which] is not None else "inf" for which in worst)
            return "result {}: max and RMS error are {} and {} times torch's".format(number, *ratios)
    return ""


@torch.inference_mode()
def check_steady(what: str, makers: Mapping[str, Callable[[], Call]], device: str) -> Row:
    """One row: label -> makes a call with inputs of its own; what is wrong with which."""
    faults = Faults(device)
    if device == "cuda":
        compile_together([lambda make=make: _drawn(make(), 0).run() for make in makers.values()])
    for label, make in makers.items():
        faults.check(label, lambda make=make: unsteady(make, device))
    row = faults.row(f"{what}: graph, {REPEATS} repeats, two streams")
    release(device)
    return row


def unsteady(make: Callable[[], Call], device: str) -> str:
    """What is wrong; empty if nothing is."""
    call = make()
    return _not_followed(call, device) or _not_repeated(call, device) or _not_apart([call, make()], device)


def _not_followed(call: Call, device: str) -> str:
    """A graph is captured, which fails if anything in it waits for the device, and replayed with new inputs."""
    results, replay = _recorded(call, device)
    for seed in range(1, REPLAYS + 1):
        want = _copied(_drawn(call, seed))
        _spoil(results, call, seed)
        replay()
        if bool(_differ(results, want)):
            return "a replay differs from the eager call"
    return ""


def _not_repeated(call: Call, device: str) -> str:
    results, replay = _recorded(call, device)
    first = _copied(_drawn(call, 0))
    with busy_beside(device):
        differing = sum(_differ(flat(call.run()), first) for _ in range(REPEATS))
    for _ in range(REPEATS):
        _spoil(results, call, 0)
        replay()
        differing = differing + _differ(results, first)
    return f"{int(differing)} of {2 * REPEATS} repeats differ" if int(differing) else ""


def _not_apart(calls: Sequence[Call], device: str) -> str:
    """Two calls on two streams at once: each keeps to its own workspace and counters."""
    wants = [_copied(_drawn(call, seed)) for seed, call in enumerate(calls)]
    counts = [torch.zeros((), dtype=torch.int64, device=device) for _ in calls]
    streams = [torch.cuda.Stream() if device == "cuda" else None for _ in calls]
    synchronize(device)
    for _ in range(10):
        for call, want, count, stream in zip(calls, wants, counts, streams, strict=True):
            with torch.cuda.stream(stream) if stream else nullcontext():
                count += _differ(flat(call.run()), want)
    synchronize(device)
    return "two streams at once disturb each other" if any(map(int, counts)) else ""


def _drawn(call: Call, seed: int) -> Call:
    call.draw(seed)
    return call


def _copied(call: Call) -> list[torch.Tensor]:
    return [result.clone() for result in flat(call.run())]


def _recorded(call: Call, device: str) -> tuple[list[torch.Tensor], Callable[[], None]]:
    """The results' memory, and what fills it by a replay."""
    results: list[torch.Tensor] = []

    def work() -> None:
        results[:] = flat(call.run())

    call.draw(0)
    return results, replayed(work, device)


def _spoil(results: Sequence[torch.Tensor], call: Call, seed: int) -> None:
    """Old results are gone. Inputs are drawn last, as a result may be one of them."""
    for result in results:
        result.fill_(float("nan") if result.is_floating_point() else -1)
    call.draw(seed)


def _differ(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> torch.Tensor:
    """0 or 1, on the device."""
    return torch.stack([(a != b).any() for a, b in zip(got, want, strict=True)]).any().long()


def compile_together(calls: Sequence[Callable[[], object]]) -> None:
    """Compiles kernels several at a time; a call that fails fails again, and is told, when it is checked."""

    def compile_one(call: Callable[[], object]) -> None:
        with torch.inference_mode():
            try:
                call()
            except Exception:
                pass

    with ThreadPoolExecutor(COMPILERS) as pool:
        list(pool.map(compile_one, calls))
    torch.cuda.synchronize()


def seeded(seed: int, device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def distinct_scores(rows: int, columns: int, device: str, generator: torch.Generator | None = None) -> torch.Tensor:
    """Of each row a permutation of distinct numbers from -2 on, exact in any dtype up to 256 columns: no two equal."""
    return torch.rand(rows, columns, device=device, generator=generator).argsort(-1) / 8 - 2


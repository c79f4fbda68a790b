"""One rank of bench_overlap: the rows of a table, the same calls on every rank.

Each schedule of `RuntimeConfig.overlap` in turn with the computation without its all-reduces, and the all-reduces
without the computation:

    ideal    max(compute, communication)
    hidden   1 - (time - compute) / (sequential - compute)

Where a sum is a hundredth of the time, the spread of the rest hides what it costs. So CPU ranks of one machine, whose
clock is one, also note when each came to a sum and when it left:

    in place    from the last rank's arrival to the last rank's leaving, summed over the sums of a pass
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from bench import overlap_trace
from bench.emulated_nccl import EmulatedCommunicator, published_us
from bench.overlap_work import Work, works
from bench.record import ratio, say, spread
from bench.timing import time_us
from tp_runtime.comm import Communicator, NullCommunicator
from tp_runtime.config import RuntimeConfig

SEQUENTIAL, AUTO = "off", "auto"
Row = dict
Messages = list[tuple[str, torch.Size, torch.dtype]]
Stamps = list[tuple[float, float]]


def modes() -> list[str]:
    """What `--overlap` may be: sequential first, so that the others are judged by it; last what chooses of them."""
    (field,) = (field for field in dataclasses.fields(RuntimeConfig) if field.name == "overlap")
    choices = field.metadata["choices"]
    return [SEQUENTIAL, *(mode for mode in choices if mode not in (SEQUENTIAL, AUTO)), AUTO]


@contextmanager
def logged(comm: Communicator) -> Iterator[tuple[Messages, Stamps]]:
    """The all-reduces that `comm` carries out within, in order: of one that is carried out by another, the other; and
    when each sum that was waited for began and ended, in seconds, without what follows it."""
    log: Messages = []
    stamps: Stamps = []
    depth = 0

    def logging(name: str) -> Callable:
        method, is_waited_for = getattr(comm, name), not name.endswith("_async")
        is_sum = not name.endswith("_norm")

        def call(x, *then):
            nonlocal depth
            num_before, began, depth = len(log), time.monotonic(), depth + is_sum
            result = method(x, *then)
            depth -= is_sum
            if len(log) == num_before:
                log.append((name, x.shape, x.dtype))
            if is_sum and is_waited_for and not depth:
                stamps.append((began, time.monotonic()))
            return result

        return call

    calls = {name: logging(name) for name in dir(comm) if name.startswith("all_reduce")}
    vars(comm).update(calls)
    try:
        yield log, stamps
    finally:
        for name in calls:
            delattr(comm, name)


def runs(work: Work) -> dict[str, Callable[[int], torch.Tensor]]:
    """Mode -> one pass of `work` in it, with the i-th weights."""

    def under(mode: str) -> Callable[[int], torch.Tensor]:
        def call(i: int) -> torch.Tensor:
            work.overlap.mode = mode
            return work(i)

        return call

    return {mode: under(mode) for mode in modes()}


def rows(
    models: Iterable[str],
    roles: Iterable[str],
    ms: Iterable[int],
    comm: Communicator,
    link: str,
    repeats: int,
    dtype: str = "bfloat16",
    scale: int = 1,
    num_layers: int = 2,
) -> Iterator[Row]:
    """A row for each model, role and number of tokens; every rank of `comm` gets the same.

    Args:
        models, roles, scale, num_layers: see `overlap_work.works`.
        ms: numbers of tokens.
        link: what carries the all-reduces: gloo, nccl, or how they are emulated.
    """
    roles, ms = list(roles), list(ms)
    narrow = f", 1/{scale} as wide" if scale > 1 else ""
    for model in models:
        for role, build in works(model, roles, getattr(torch, dtype), comm, scale, num_layers):
            work = build()
            for m in ms:
                yield {
                    "what": f"{model} {role} tp{comm.size} M={m}{narrow}, {dtype}, {link}",
                    "model": model, "role": role, "tp_size": comm.size, "m": m, "dtype": dtype, "scale": scale,
                    "layers": num_layers if role == "layers" else 1, "link": link, **measure(work, m, repeats),
                }  # fmt: skip
            del work


@torch.inference_mode()
def trace(
    model: str, m: int, comm: Communicator, file: Path | None, dtype: str, scale: int = 1, num_layers: int = 2
) -> dict[str, float]:
    """Writes a trace of decoder layers under every schedule; every rank calls it.

    Args:
        file: None on the ranks of which no trace is wanted.

    Returns:
        Schedule -> the share of the communication's time in which there was compute as well; empty without a file.
    """
    ((_, build),) = works(model, ["layers"], getattr(torch, dtype), comm, scale, num_layers)
    work = build()
    work.draw(m)
    calls = runs(work)
    for call in calls.values():
        call(0)
    events = overlap_trace.recorded(calls, comm)
    if file is None:
        return {}
    title = f"{model}, {num_layers} layers, tp{comm.size}, M={m}, rank {comm.rank}"
    written = overlap_trace.write(overlap_trace.in_rows(events, calls), title, file)
    return {mode: overlap_trace.hidden_share(*overlap_trace.intervals(written, mode)) for mode in calls}


@torch.inference_mode()
def measure(work: Work, m: int, repeats: int) -> Row:
    """Checks and times `work` with m tokens."""
    work.draw(m)
    comm, calls = work.overlap.comm, runs(work)
    sent: dict[str, Messages] = {}
    calls[AUTO](0)  # what there is to choose from is measured now
    for mode, call in calls.items():
        with logged(comm) as (sent[mode], _):
            call(0)
    first = {mode: next(other for other in calls if sent[other] == sent[mode]) for mode in calls}
    different = {mode: call for mode, call in calls.items() if first[mode] == mode}
    wrong = work.faults({mode: lambda call=call: call(0) for mode, call in different.items()})

    silent = NullCommunicator(comm.rank, comm.size, comm.device)
    messages = [torch.zeros(shape, dtype=dtype, device=comm.device) for _, shape, dtype in sent[SEQUENTIAL]]

    def compute(i: int) -> None:
        work.overlap.comm = silent
        calls[SEQUENTIAL](i)
        work.overlap.comm = comm

    def communicate(i: int) -> None:
        for message in messages:
            comm.all_reduce(message)

    stamps: dict[str, list[Stamps]] = {mode: [] for mode in different}

    def noted(mode: str) -> Callable[[int], None]:
        def call(i: int) -> None:
            with logged(comm) as (_, of_pass):
                different[mode](i)
            stamps[mode].append(of_pass)

        return call

    has_one_clock = comm.device.type == "cpu" and comm.one_shot_above is not None  # then they share memory
    contenders = {"compute": compute, "communication": communicate, **different}
    if has_one_clock:
        contenders |= {mode: noted(mode) for mode in different}
    times, timing = _timed(contenders, work.copies, repeats, comm)
    everyone = comm.gather_json(stamps)
    compute_us, communication_us = (spread(times[name]) for name in ("compute", "communication"))
    sequential_us = spread(times[SEQUENTIAL])["median"]
    return {
        "compute_us": compute_us, "communication_us": communication_us,
        "ideal_us": max(compute_us["median"], communication_us["median"]),
        "message_bytes": [message.nbytes for message in messages],
        "published_us": _published_us(comm, messages),
        "schedules": {
            mode: {
                "as": None if first[mode] == mode else first[mode],
                "us": spread(times[first[mode]]),
                "speedup": ratio(times[SEQUENTIAL], times[first[mode]]),
                "hidden": hidden(spread(times[first[mode]])["median"], compute_us["median"], sequential_us),
            }
            for mode in calls
        },
        "in_place_us": {
            mode: spread(in_place_us([rank[mode] for rank in everyone]))
            for mode, passes in stamps.items()
            if passes and len(passes[0]) == len(messages)  # else some of its sums were not waited for
        },
        "chosen": chosen(work, first),
        "timing": timing, "wrong": wrong, "is_ok": not wrong,
    }  # fmt: skip


def _timed(contenders, copies: int, repeats: int, comm: Communicator) -> tuple[dict[str, list[float]], str]:
    """The times, and how they were taken; what cannot be recorded is launched one by one."""
    if comm.device.type == "cpu":
        return time_us(contenders, copies, repeats, "cpu", comm), "the host's clock"
    try:
        return time_us(contenders, copies, repeats, "cuda", comm), "CUDA graphs"
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:200]
        say(f"  not recorded in a CUDA graph, so launched one by one: {reason}")
        torch.cuda.synchronize()  # raises where the device is lost
        times = time_us(contenders, copies, repeats, "cuda", comm, is_recorded=False)
        return times, f"launched one by one: {reason}"


def _published_us(comm: Communicator, messages: Iterable[torch.Tensor]) -> float | None:
    """What an emulation aims at."""
    if not isinstance(comm, EmulatedCommunicator):
        return None
    return sum(published_us(comm.size, message.nbytes) for message in messages)


def in_place_us(ranks: list[list[Stamps]]) -> list[float]:
    """Of each pass, what its sums cost from the last rank's arrival to the last rank's leaving, in us.

    Args:
        ranks: of each rank, of each pass, the stamps of its sums, in seconds of one clock.
    """

    def of_sum(stamps: Sequence[tuple[float, float]]) -> float:
        began, ended = zip(*stamps, strict=True)
        return max(ended) - max(began)

    passes = zip(*ranks, strict=True)
    return [sum(map(of_sum, zip(*of_pass, strict=True))) * 1e6 for of_pass in passes]


def hidden(us: float, compute_us: float, sequential_us: float) -> float | None:
    """The share of the communication that a schedule hides; None where the sequential one exposes nothing."""
    exposed_us = sequential_us - compute_us
    return 1 - (us - compute_us) / exposed_us if exposed_us > 0 else None


def chosen(work: Work, first: dict[str, str]) -> str:
    """What `auto` came to: the mode that does the same, else the blocks that were the fastest."""
    if first[AUTO] != AUTO:
        return first[AUTO]
    return ", ".join(sorted({str(measured.fastest()) for measured in work.overlap.measured.values()}))

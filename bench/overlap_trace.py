"""A trace of every schedule for Perfetto (ui.perfetto.dev) or chrome://tracing: compute and communication in rows, one
above the other; and what of the latter lies under the former.

    schedule        |            off             |          columns          | ...
    compute         | gemm |         | gemm ...  | gemm | gemm | ...
    communication          | reduce  |                  | reduce | reduce ...

What happened when is torch.profiler's: on CPUs ops, and gloo's all-reduces from start to end; on GPUs kernels, those of
a stream in a row.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tp_runtime.comm import Communicator

# gloo's, NCCL's, and what emulates NCCL; and the kernels of kernels/all_reduce.py.
COMMUNICATION = re.compile(r"^(gloo:|nccl|emulated:|_all_reduce_)")
_OF_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
SCHEDULE, COMPUTE, LANE_B, REDUCE, HOST = "schedule", "compute", "compute, lane B", "communication", "host"

Interval = tuple[float, float]  # microseconds


@torch.inference_mode()
def recorded(calls: Mapping[str, Callable[[int], object]], comm: Communicator) -> list[dict]:
    """The profiler's events of one pass of each call, under a range of its name; every rank calls it.

    Where a schedule is chosen by measurement, call it once before.
    """
    on_cuda = comm.device.type == "cuda"

    def finish() -> None:
        if on_cuda:
            torch.cuda.synchronize()
        comm.barrier()

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda
    every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)  # lane B is one
    with profile(activities=activities, experimental_config=every_thread) as profiler:
        for name, call in calls.items():
            finish()
            with record_function(name):
                call(0)
                finish()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return [event for event in json.loads(file.read_text())["traceEvents"] if event.get("ph") == "X"]


def in_rows(events: Iterable[dict], schedules: Iterable[str]) -> dict[str, list[dict]]:
    """Row -> its events, in the order of time. All-reduces of gloo that are under way together have a row each."""
    events, schedules = sorted(events, key=lambda event: event["ts"]), set(schedules)
    of_device = [event for event in events if event.get("cat") in _OF_GPU]
    reducing = {event["tid"] for event in of_device if COMMUNICATION.match(event["name"])}  # streams
    main = next(event["tid"] for event in events if event["name"] in schedules)
    rows: dict[str, list[dict]] = {row: [] for row in (SCHEDULE, HOST, COMPUTE, LANE_B, REDUCE)}
    for event in events:
        row = ""
        if event.get("cat") in _OF_GPU:
            row = REDUCE if event["tid"] in reducing else COMPUTE
        elif event.get("cat") == "user_annotation" and event["name"] in schedules:
            row = SCHEDULE
        elif event.get("cat") == "user_annotation" and COMMUNICATION.match(event["name"]) and not of_device:
            number = 1
            while (row := REDUCE + f" {number}" * (number > 1)) in rows and _is_busy(rows[row], event["ts"]):
                number += 1
        elif event.get("cat") == "cpu_op" and of_device:
            row = HOST
        elif event.get("cat") == "cpu_op" and not event["name"].startswith("c10d::"):  # which starts an all-reduce
            row = COMPUTE if event["tid"] == main else LANE_B
        if row:
            rows.setdefault(row, []).append(event)
    return {row: of_row for row, of_row in rows.items() if of_row}


def _is_busy(row: Sequence[dict], at: float) -> bool:
    return bool(row) and row[-1]["ts"] + row[-1]["dur"] > at


def write(rows: Mapping[str, Sequence[dict]], title: str, file: Path) -> list[dict]:
    """The trace as JSON of Chrome's format; time begins with the first schedule. Returns its events."""
    began = min(event["ts"] for event in rows[SCHEDULE])
    events: list[dict] = [{"ph": "M", "name": "process_name", "pid": 0, "args": {"name": title}}]
    for tid, (row, of_row) in enumerate(rows.items()):
        for name, args in (("thread_name", {"name": row}), ("thread_sort_index", {"sort_index": tid})):
            events.append({"ph": "M", "name": name, "pid": 0, "tid": tid, "args": args})
        for event in of_row:
            timed = {"ts": round(event["ts"] - began, 3), "dur": event["dur"]}
            events.append({"ph": "X", "name": event["name"], "cat": row, "pid": 0, "tid": tid, **timed})
    file.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")
    return events


def intervals(events: Iterable[dict], schedule: str) -> tuple[list[Interval], list[Interval]]:
    """(compute, communication) of a written trace's events under a schedule: when there was any, in order, disjoint."""
    events = [event for event in events if event["ph"] == "X"]
    ranges = [_interval(event) for event in events if event["cat"] == SCHEDULE and event["name"] == schedule]

    def within(kind: str) -> list[Interval]:
        found = (_interval(event) for event in events if event["cat"].startswith(kind))
        return _joined(i for i in found if any(start <= i[0] < stop for start, stop in ranges))

    return within(COMPUTE), within(REDUCE)


def hidden_share(compute: Iterable[Interval], communication: Iterable[Interval]) -> float:
    """In how much of the communication's time there was compute as well; 0 without communication."""
    compute, communication = list(compute), list(communication)
    total = sum(stop - start for start, stop in communication)
    both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in compute for b in communication)
    return both / total if total else 0.0


def _interval(event: dict) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def _joined(found: Iterable[Interval]) -> list[Interval]:
    joined: list[Interval] = []
    for start, stop in sorted(found):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], stop)
        else:
            joined.append((start, stop))
    return joined

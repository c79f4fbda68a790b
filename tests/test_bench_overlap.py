"""Tests of bench/bench_overlap.py and what it is made of: one small run on two gloo ranks, a trace of it, the table."""

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import tp_runtime.overlap
from bench import bench_overlap, emulated_nccl, overlap_rank, overlap_trace, overlap_work
from bench.gpu_section import Options
from bench.kernel_shapes import MODELS
from bench.on_gpu import overlap as section
from bench.overlap_rank import hidden, in_place_us, logged, modes
from bench.report_overlap import COMPUTE, EXPOSED, SAVED, WIDTH, duration, overlap_table, overlap_targets, picture
from tp_runtime.comm import NullCommunicator
from tp_runtime.kernels.gemm import gemm
from tp_runtime.kernels.rms_norm import AddNorm

ROOT = Path(__file__).resolve().parent.parent
# 1088 x 256 floats a message: the smallest whose four column blocks are gloo's own, which up to 256 KiB are not.
FLAGS = ["--link", "gloo", "--model", "llama-3-8b", "--scale", "16", "--layers", "1", "--m", "1088", "--num-iters", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(stdout, record, trace) of one run."""
    folder = tmp_path_factory.mktemp("bench_overlap")
    files = folder / "record.json", folder / "trace.json"
    command = [sys.executable, "-m", "bench.bench_overlap", *FLAGS, "--role", "o", "layers", "--dtype", "float32"]
    command += ["--tp", "2", "--output-json", str(files[0]), "--trace", str(files[1])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, *(json.loads(file.read_text()) for file in files)


def test_record_holds_every_schedule_and_what_it_hides(run):
    """Catches a schedule that is left out, a figure that does not follow from the times, and an unstamped record."""
    printed, record, _ = run
    assert {"commit", "date", "versions", "cpu", "flags"} <= set(record)
    assert [row["role"] for row in record["rows"]] == ["o", "layers"]
    for row in record["rows"]:
        assert list(row["schedules"]) == modes() and row["is_ok"] and row["link"] == "gloo" and row["m"] == 1088
        compute, communication = row["compute_us"]["median"], row["communication_us"]["median"]
        assert row["ideal_us"] == max(compute, communication)
        sequential = row["schedules"]["off"]["us"]["median"]
        for schedule in row["schedules"].values():
            us = schedule["us"]["median"]
            assert schedule["hidden"] == (1 - (us - compute) / (sequential - compute) if sequential > compute else None)
        assert row["schedules"]["columns"]["as"] is None and f"| {duration(compute)} " in printed
        assert {"off", "one-shot"} <= row["in_place_us"].keys() <= {"off", "one-shot", "auto"}
        assert all(us["median"] > 0 for us in row["in_place_us"].values())
        assert f"| {duration(row['in_place_us']['off']['median'])} " in printed and "sums in place" in printed
    o, layers = (row["schedules"] for row in record["rows"])
    assert o["lanes"]["as"] == "off" and layers["lanes"]["as"] is None  # one GEMM has no lanes
    message_bytes = 1088 * 256 * 4
    assert [row["message_bytes"] for row in record["rows"]] == [[message_bytes], [message_bytes] * 2]


def test_trace_shows_communication_under_compute(run):
    """Catches a trace without gloo's work, and schedules that hide nothing or a sequential one that seems to."""
    events = run[2]["traceEvents"]
    rows = [event["args"]["name"] for event in events if event["name"] == "thread_name"]
    assert rows[:4] == ["schedule", "compute", "compute, lane B", "communication"]
    assert {"off", "columns", "lanes"} <= {event["name"] for event in events if event.get("cat") == "schedule"}
    both = {name: overlap_trace.intervals(events, name) for name in ("off", "columns", "lanes")}
    assert all(compute and communication for compute, communication in both.values())
    shares = {name: overlap_trace.hidden_share(*intervals) for name, intervals in both.items()}
    assert shares["off"] == 0 < min(shares["columns"], shares["lanes"])
    assert run[1]["trace"] == {**run[1]["trace"], **shares}  # what was printed is what the file shows


def event(name: str, start: float, stop: float, cat: str, tid: int = 1) -> dict:
    return {"ph": "X", "name": name, "cat": cat, "pid": 7, "tid": tid, "ts": start, "dur": stop - start}


def test_rows_of_a_trace(tmp_path):
    """Catches all-reduces that hide one another in a row, and kernels in the row of another stream."""
    cpu = [
        event("columns", 0, 100, "user_annotation"), event("aten::mm", 10, 20, "cpu_op"),
        event("c10d::allreduce_", 20, 22, "cpu_op"), event("gloo:all_reduce", 21, 50, "user_annotation", 5),
        event("gloo:all_reduce", 30, 60, "user_annotation", 6), event("gloo:all_reduce", 55, 70, "user_annotation", 5),
        event("aten::mm", 40, 45, "cpu_op"), event("aten::mm", 46, 58, "cpu_op", 2),
    ]  # fmt: skip
    rows = overlap_trace.in_rows(cpu, ["columns"])
    assert [len(row) for row in rows.values()] == [1, 2, 1, 2, 1] and list(rows)[-1] == "communication 2"
    written = overlap_trace.write(rows, "title", tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"] == written
    compute, communication = overlap_trace.intervals(written, "columns")
    assert compute == [(10, 20), (40, 45), (46, 58)] and communication == [(21, 70)]
    assert overlap_trace.hidden_share(compute, communication) == 17 / 49
    assert overlap_trace.intervals(written, "lanes") == ([], [])

    gpu = [
        event("columns", 0, 100, "user_annotation"), event("aten::mm", 1, 2, "cpu_op"),
        event("gemm", 10, 20, "kernel", 7), event("ncclDevKernel_AllReduce", 20, 40, "kernel", 20),
        event("Memcpy", 15, 18, "gpu_memcpy", 20), event("gemm", 21, 30, "kernel", 7),
    ]  # fmt: skip
    rows = overlap_trace.in_rows(gpu, ["columns"])
    assert {row: len(events) for row, events in rows.items()} == {
        "schedule": 1, "host": 1, "compute": 2, "communication": 2
    }  # fmt: skip


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_section_on_the_cpu(one_thread):
    """Catches a section that measures a model without its experts, and a row that does not say that it is emulated."""
    rows = list(section.rows(Options(), "cpu", [("mixtral-8x7b", 2)], (8,), 1, dtype="float32", scale=16))
    assert [row["role"] for row in rows] == ["layers", "o", "experts_down"] and all(row["is_ok"] for row in rows)
    for row in rows:
        assert "emulated" in row["what"] and row["tp_size"] == 2
        num_messages = 4 if row["role"] == "layers" else 1
        assert row["message_bytes"] == [8 * 256 * 4] * num_messages
        assert row["published_us"] == pytest.approx(7.3 * num_messages) and row["schedules"]["columns"]["as"] == "off"
    table = overlap_table(rows)
    assert table.count("NCCL emulated") == 3 and "published 29.2 us" in table


def test_hiding_is_seen_where_communication_has_time_of_its_own(one_thread, monkeypatch):
    """Catches a benchmark that cannot tell a schedule that hides from one that does not. Everybody sleeps: no machine
    is too slow for it."""

    whole_s = 0.04

    def slow_gemm(x, w):
        time.sleep(whole_s * len(w) / 256)
        return gemm(x, w)

    def slow_us(size, num_bytes, peer=""):
        return 1e6 * whole_s * num_bytes / (4 * 256 * 4)

    monkeypatch.setattr(tp_runtime.overlap, "gemm", slow_gemm)
    monkeypatch.setattr(tp_runtime.overlap, "MIN_CUT_BYTES", 0)
    monkeypatch.setattr(tp_runtime.overlap, "_MAX_REPEATS", 1)
    monkeypatch.setattr(overlap_work, "num_copies", lambda *_: 1)
    monkeypatch.setattr(emulated_nccl, "published_us", slow_us)
    comm = emulated_nccl.EmulatedCommunicator(2, "cpu")
    ((_, build),) = overlap_work.works("llama-3-8b", ["down"], torch.float32, comm, scale=16)
    row = overlap_rank.measure(build(), 4, 3)
    assert row["is_ok"] and row["compute_us"]["median"] >= 1e6 * whole_s <= row["communication_us"]["median"]
    assert 0.3 < row["schedules"]["columns"]["hidden"] < 0.9  # of four blocks three are hidden


def broken(comm, role: str, damage: str) -> list[str]:
    """What is found wrong with a communicator whose sums are damaged under every schedule but the sequential one."""
    ((_, build),) = overlap_work.works("mixtral-8x7b", [role], torch.float32, comm, scale=16)
    work = build()
    work.draw(5)
    calls = overlap_rank.runs(work)

    def damaged() -> torch.Tensor:
        y = calls["columns"](0).clone()
        y[..., -1, -1] += {"nothing": 0.0, "one sum": 0.5}[damage]
        return y

    with torch.inference_mode():
        return work.faults({"off": lambda: calls["off"](0), "columns": damaged})


@pytest.mark.parametrize("role", ["o", "experts_down", "layers"])
def test_a_wrong_sum_is_found(one_thread, role):
    """Catches a check that lets one wrong element of one token through, or finds fault with what is right."""
    assert tp_runtime.run_local(broken, 2, role, "nothing") == [[], []]
    for found in tp_runtime.run_local(broken, 2, role, "one sum"):
        assert len(found) == 1 and found[0].startswith("columns: ")


def test_log_holds_what_was_carried_out():
    """Catches one all-reduce that counts twice, because it is carried out by another, and a log that does not end."""
    comm = emulated_nccl.EmulatedCommunicator(2, "cpu")
    with logged(comm) as (log, stamps):
        comm.all_reduce(torch.ones(3))
        comm.all_reduce_async(torch.ones(4)).wait()
        comm.all_reduce_norm(torch.ones(2, 6), AddNorm(torch.ones(6), 1e-5, torch.ones(2, 6)))
    comm.all_reduce(torch.ones(5))
    names = ("all_reduce_async", "all_reduce_async", "all_reduce_one_shot")
    assert log == [(name, shape, torch.float32) for name, shape in zip(names, ((3,), (4,), (2, 6)))]
    assert len(stamps) == 2 and all(began <= ended for began, ended in stamps)


def test_sums_in_place():
    """Catches the wait for the last rank told as what a sum costs."""
    first = [[(0.0, 9.0), (10.0, 11.0)], [(20.0, 21.0), (30.0, 31.0)]]
    second = [[(8.0, 8.5), (10.5, 12.0)], [(19.0, 22.0), (30.0, 30.5)]]
    assert in_place_us([first, second]) == [2.5e6, 3e6]


def test_share_that_is_hidden():
    """Catches a share of what sequential takes in place of a share of what it exposes."""
    assert hidden(150, 100, 200) == 0.5 and hidden(200, 100, 200) == 0 and hidden(100, 100, 200) == 1
    assert hidden(250, 100, 200) == -0.5 and hidden(90, 100, 100) is None


def made_up(m: int, compute: float, sequential: float, auto: float, role: str = "layers") -> dict:
    def times(us: float) -> dict:
        share = hidden(us, compute, sequential)
        return {"as": None, "us": {"median": us}, "speedup": {"median": sequential / us}, "hidden": share}

    return {
        "what": f"M={m}", "model": "made-up", "role": role, "tp_size": 8, "m": m, "dtype": "bfloat16", "scale": 1,
        "layers": 2, "link": "nccl", "compute_us": {"median": compute}, "communication_us": {"median": 80.0},
        "ideal_us": max(compute, 80.0), "published_us": None, "chosen": "lanes", "in_place_us": {},
        "schedules": {"off": times(sequential), "columns": {**times(sequential), "as": "off"}, "auto": times(auto)},
    }  # fmt: skip


def test_table_and_targets():
    """Catches a bar that flatters, a slower schedule that seems to hide, and a target that only the best row meets."""
    hides, loses = made_up(2048, 100, 200, 125), made_up(4096, 100, 200, 250)
    assert picture(hides) == COMPUTE * (WIDTH // 2) + EXPOSED * (WIDTH // 8) + SAVED * (WIDTH * 3 // 8)
    assert picture(loses) == COMPUTE * (WIDTH // 2) + EXPOSED * (WIDTH // 2)
    table = overlap_table([hides, loses])
    assert table.count("made-up, 2 layers, tp 8") == 1 and "= sequential" in table
    assert "125 us (75%) lanes" in table and "250 us (0.80x) lanes" in table
    assert "in place" not in table
    sums = {**hides, "in_place_us": {"off": {"median": 90.0}, "auto": {"median": 25.0}, "one-shot": {"median": 7.0}}}
    assert "| 90.0 us -> 25.0 us |" in overlap_table([sums])
    exposed, speed = overlap_targets([hides, loses, made_up(1024, 100, 200, 110, role="o")])
    assert exposed["value"] == 1.5 and not exposed["is_met"] and "M >= 2048" in exposed["name"]
    assert speed["value"] == 0.8 and not speed["is_met"]
    assert [duration(us) for us in (7.3, 126.4, 1260, 2e6)] == ["7.30 us", "126 us", "1.26 ms", "2.00 s"]


def test_link_is_what_the_machine_has():
    """Catches an emulation where there is the real thing, and NCCL where there is not."""
    link = partial(bench_overlap.link_of, "auto")
    assert [link(2, 0), link(2, 1), link(4, 2), link(2, 2), link(2, 8)] == [
        "gloo",
        "emulated",
        "emulated",
        "nccl",
        "nccl",
    ]
    assert bench_overlap.link_of("gloo", 2, 8) == "gloo"


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--link", "emulated"], "needs more than the 0 GPUs"),
        (["--tp", "64"], "tp_size=64"),
        (["--scale", "3"], "scale=3 does not divide llama-3-8b's hidden_size=4096"),
    ],
)
def test_what_cannot_be_measured_is_said(flags, said, capsys, monkeypatch):
    """Catches a traceback out of a rank where one line says what is wrong."""
    monkeypatch.setattr(bench_overlap.env, "gpus", list)
    assert bench_overlap.main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_rows_are_counted_beforehand():
    """Catches a progress line that ends before the run does, or after."""
    args = bench_overlap.parser().parse_args(
        ["--model", "llama-3-8b", "mixtral-8x7b", "qwen3-30b-a3b", "--m", "1", "2"]
    )
    comm = NullCommunicator(0, 2)
    roles = [len(overlap_work.works(m, args.role, torch.float32, comm, scale=8)) for m in args.model if m in MODELS]
    assert bench_overlap.num_rows(args) == 2 * sum(roles)

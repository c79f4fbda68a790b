"""Tests of kernels/tuned.py: which row a lookup finds, what becomes of files that are none, writers at one time."""

import importlib
import json
import logging
import multiprocessing
import threading
import timeit
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tp_runtime.kernels import tuned

X = torch.empty(3, 64, dtype=torch.float16)


class Decode(NamedTuple):
    block_n: int
    split: bool = False


CANDIDATES = {"decode": (Decode(32), Decode(64), Decode(64, split=True))}


def row(**changes) -> dict:
    key = {"op": "gemm", "dtype": "float16", "n": 128, "k": 64, "m": 4}
    chosen = {"kernel": "decode", "block_n": 64, "split": True, "us": 1.5, "torch_us": 2.0}
    return {**key, **chosen, "triton": tuned.triton_minor(), "torch": "2.13.0", **changes}


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """(user's file, shipped file) of the device `cpu`, both absent; nothing of this machine's own is read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    tuned.forget()
    yield tuned.user_file("cpu"), tuned.shipped_file("cpu")
    tuned.forget()


@pytest.fixture
def lines(caplog):
    """The log lines so far."""
    caplog.set_level(logging.INFO, "tp_runtime")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("m, bucket", [(0, 1), (1, 1), (2, 2), (3, 4), (16, 16), (17, 32), (8192, 8192), (9000, 8192)])
def test_bucket(m, bucket):
    """Catches a bucket that is measured with fewer tokens than it is used for."""
    assert tuned.bucket(m) == bucket


@pytest.mark.parametrize("m", [3, 4])
def test_row_is_found_by_every_m_of_its_bucket(files, m):
    """Catches a key that writer and reader make differently, and a configuration that is not the measured one."""
    tuned.save_rows(files[0], "cpu", [row(), row(m=8, kernel="torch")])
    found = tuned.lookup("gemm", X, 128, 64, m, CANDIDATES)
    assert (found["kernel"], found["config"], found["us"]) == ("decode", Decode(64, split=True), 1.5)
    assert tuned.lookup("gemm", X, 128, 64, m, CANDIDATES) is found
    assert tuned.lookup("gemm", X, 128, 64, 5, CANDIDATES)["kernel"] == "torch"


@pytest.mark.parametrize("change", [{"op": "gated_gemm"}, {"dtype": "bfloat16"}, {"n": 64}, {"k": 128}, {"m": 8}])
def test_row_of_another_shape_is_none(files, change):
    """Catches a part of the key that is left out: a kernel would run where nobody measured it."""
    tuned.save_rows(files[0], "cpu", [row(**change)])
    assert tuned.lookup("gemm", X, 128, 64, 4) is None


def test_users_row_before_the_shipped_one(files):
    """Catches a user's measurement that changes nothing, and shipped rows that a user's file hides altogether."""
    tuned.save_rows(files[1], "cpu", [row(us=9.0), row(m=1, us=7.0)])
    tuned.save_rows(files[0], "cpu", [row(us=3.0)])
    assert [tuned.lookup("gemm", X, 128, 64, m)["us"] for m in (4, 1)] == [3.0, 7.0]


def test_untuned_shape_is_told_once_with_the_command(lines):
    """Catches torch running in silence, a line for each call or each M, and a command that cannot be copied."""
    for m in (1, 1, 7, 300):
        assert tuned.lookup("gemm", X, 128, 64, m) is None
    assert tuned.lookup("gemm", X, 256, 64, 1) is None
    first, second = lines()
    assert "128x64" in first and "is not tuned on cpu: torch runs it" in first
    assert "`python -m bench.tune --op gemm --shape 256x64 --dtype float16`" in second


@pytest.mark.parametrize(
    "change", [{"kernel": "vector"}, {"block_n": 128}, {"split": None}, {"block_n": [64]}], ids=lambda c: next(iter(c))
)
def test_row_of_no_candidate_counts_as_none(files, lines, change):
    """Catches a launch with a configuration that this version does not have, nor has tested."""
    tuned.save_rows(files[0], "cpu", [row(**change)])
    assert tuned.lookup("gemm", X, 128, 64, 4, CANDIDATES) is None
    assert "tuned for kernels of another version" in lines()[0]


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "\xff\xfe", "[" * 100_000, '{"device": "NVIDIA H200", "rows": []}', '{"device": "cpu"}',
        json.dumps({"device": "cpu", "rows": [row(), {**row(), "triton": "three"}]}),
        json.dumps({"device": "cpu", "rows": [{**row(), "n": "128"}]}), json.dumps({"device": "cpu", "rows": [7]}),
    ],
)  # fmt: skip
def test_what_is_no_table_is_ignored(files, lines, text):
    """Catches a corrupt or foreign file that stops the model, is half believed, or hides the shipped table."""
    user, shipped = files
    tuned.save_rows(shipped, "cpu", [row(us=9.0)])
    user.parent.mkdir(parents=True)
    user.write_bytes(text.encode("latin-1"))
    assert [tuned.lookup("gemm", X, 128, 64, 4)["us"] for _ in range(2)] == [9.0, 9.0]
    (line,) = lines()
    assert f"{user} is ignored" in line and len(line) < 600
    with pytest.raises(ValueError):
        tuned.save_rows(user, "cpu", [row()])
    assert user.read_bytes() == text.encode("latin-1")


def test_file_that_cannot_be_read_is_ignored(files, lines):
    """Catches an OSError on the way to the first token."""
    files[0].mkdir(parents=True)
    assert tuned.lookup("gemm", X, 128, 64, 4) is None
    assert "is ignored" in lines()[0]


def test_user_without_a_home(monkeypatch):
    """Catches a service user whose home is `~` itself: a folder of that name would be made wherever it stands."""
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert tuned.user_file("cpu") is None
    assert tuned.lookup("gemm", X, 128, 64, 4) is None


def test_rows_hold_from_their_triton_on(monkeypatch):
    """Catches 3.10 that comes before 3.9, and a kernel of a newer compiler given to an older one."""
    rows = [row(triton="3.10", us=10), row(triton="3.6", us=6), row(triton="3.9", us=9)]
    (key,) = {tuned.key_of(r) for r in rows}
    found = {minor: tuned.usable(rows, minor).get(key, {}).get("us") for minor in ("3.5", "3.6", "3.7", "3.9", "4.0")}
    assert found == {"3.5": None, "3.6": 6, "3.7": 6, "3.9": 9, "4.0": 10}


def test_saving_merges(files):
    """Catches a run that forgets what other runs, or other Tritons, have measured."""
    user = files[0]
    tuned.save_rows(user, "cpu", [row(us=1.0), row(m=8)])
    tuned.save_rows(user, "cpu", [row(us=2.0), row(triton="3.1", us=3.0)])
    rows = tuned.read_rows(user, "cpu")
    assert [(r["m"], r["triton"], r["us"]) for r in rows] == [
        (4, "3.1", 3.0), (4, tuned.triton_minor(), 2.0), (8, tuned.triton_minor(), 1.5)
    ]  # fmt: skip
    assert [path.name for path in user.parent.iterdir()] == ["cpu.json"]
    assert user.stat().st_mode & 0o777 == 0o644


def _save_some(file, first: int) -> None:
    for n in range(first, first + 20):
        tuned.save_rows(file, "cpu", [row(n=n)])


def test_writers_at_the_same_time(files):
    """Catches rows of one process that another one overwrites with what it had read before."""
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_save_some, args=(files[0], 100 * i + 1)) for i in range(4)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        tuned.read_rows(files[0], "cpu")  # at any moment a whole table
    for writer in writers:
        writer.join()
    assert {r["n"] for r in tuned.read_rows(files[0], "cpu")} == {100 * i + 1 + j for i in range(4) for j in range(20)}


def test_ranks_that_are_threads_ask_at_the_same_time(lines):
    """Catches a line for each rank."""
    threads = [threading.Thread(target=tuned.lookup, args=("gemm", X, 128, 64, 4)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines()) == 1


def test_devices_have_files_of_their_own():
    """Catches rows of one board that another one takes for its own."""
    names = [tuned.user_file(name).name for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "cpu")]
    assert names == ["nvidia-h200.json", "nvidia-h100-80gb-hbm3.json", "cpu.json"]


def test_tables_that_ship_name_kernels_that_ship():
    """Catches a configuration that left CANDIDATES while a table still names it: its shape would run torch."""
    for file in sorted((Path(tuned.__file__).parent / "tuned_tables").glob("*.json")):
        device = json.loads(file.read_text())["device"]
        assert tuned.shipped_file(device).name == file.name
        for r in tuned.read_rows(file, device):
            kernels = importlib.import_module(f"tp_runtime.kernels.{r['op']}")
            assert r["kernel"] == tuned.TORCH or tuned.config_of(r, kernels.CANDIDATES) is not None, r


def test_lookup_takes_a_microsecond(files):
    """Catches a file that is read, or a configuration that is made, at each call. About 0.2 us; least of many."""
    tuned.save_rows(files[0], "cpu", [row()])
    tuned.lookup("gemm", X, 128, 64, 4, CANDIDATES)
    times = timeit.repeat(lambda: tuned.lookup("gemm", X, 128, 64, 4, CANDIDATES), number=1000, repeat=20)
    assert min(times) / 1000 < 2e-6

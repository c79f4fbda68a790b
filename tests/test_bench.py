"""Tests of bench/: each benchmark's smallest configuration runs to its end; its record holds what a reader needs."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import bench_generate, bench_host, bench_load, random_llama, record

ROOT = Path(__file__).resolve().parent.parent
STAMP = {"name", "date", "flags", "commit", "versions", "platform", "cpu", "gpus"}
TINY = ["--size", "tiny", "--dtype", "float32", "--input-len", "5"]


@pytest.fixture
def run(tmp_path, capsys):
    """run(bench, flags...) -> its record; stdout must be the table and nothing before it."""

    def run(bench, *flags: str) -> dict:
        file = tmp_path / "record.json"
        assert bench.main([*flags, "--output-json", str(file)]) == 0
        assert capsys.readouterr().out.startswith("| ")
        written = json.loads(file.read_text())
        assert STAMP <= set(written)
        assert written["name"] == bench.__name__.removeprefix("bench.")
        assert written["versions"]["torch"] != "absent"
        return written

    return run


def test_generate(run):
    """Catches a benchmark that times wrong tokens, or that no longer runs transformers' side, as its releases move."""
    written = run(bench_generate, *TINY, "--output-len", "4", "--num-iters", "2")
    rows = {row["contender"]: row for row in written["rows"]}
    assert set(rows) == {
        "transformers, generate()", "transformers, plain loop", "ours, generate()", "ours, engine"
    }  # fmt: skip
    for row in rows.values():
        assert row["tokens_equal_to_unsharded"] == 1.0
        assert len(row["tokens_per_s"]["all"]) == 2
        assert row["tokens_per_s"]["p20"] <= row["tokens_per_s"]["median"] <= row["tokens_per_s"]["p80"]
    assert rows["transformers, generate()"]["over_theirs"] == {"median": 1.0, "p20": 1.0, "p80": 1.0}
    names = [f"float32: {contender}, tokens/s over theirs" for contender in ("ours, generate()", "ours, engine")]
    assert [t["name"] for t in written["targets"]] == names


def test_load(run):
    """Catches a rank that reads or keeps more than its shard, and figures that the kernel does not give any more."""
    written = run(bench_load, *TINY, "--only", "ours", "--num-iters", "1")
    (row,) = written["rows"]
    rows_of_zeros = 2 * 64 * 4  # at most, around a rank's part of the embedding: 64 float32
    assert 0 < row["shard_bytes"] <= row["weight_bytes"] <= row["shard_bytes"] + rows_of_zeros
    configs_and_headers = 64 << 10
    assert row["shard_bytes"] <= row["read_bytes"] <= row["shard_bytes"] + configs_and_headers
    assert row["mapped_bytes"] == 0
    assert row["resident_peak_bytes"] >= row["resident_before_bytes"] > 0
    assert 0 < row["load_s"]["median"] < row["ready_s"]["median"]
    assert 0 < row["first_token_s"]["median"] < row["exit_s"]["median"]
    assert written["theirs_over_ours"] == []


def test_host(run):
    """Catches sides that do not compute the same, and a contender that was lost."""
    written = run(bench_host, "--input-len", "5", "--output-len", "2", "--num-iters", "1")
    contenders = [row["contender"] for row in written["rows"]]
    assert contenders == [
        "transformers, plain", "transformers, TP", "ours, DynamicCache", "ours, KVCache", "ours, engine"
    ]  # fmt: skip
    assert all(row["us_per_layer"]["median"] > 0 for row in written["rows"])
    assert len(written["targets"]) == 3


@pytest.mark.slow
def test_layers():
    """Catches a microbenchmark that does not run, and a bench_*.py that `pytest bench` cannot collect."""
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "bench", "-q", "--benchmark-disable", "-p", "no:cacheprovider"]
    command += ["-k", "bench_layers and (qkv or embed)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\b12 passed", done.stdout)


def test_hidden_states_that_differ_are_no_figure():
    """Catches a check that lets two sides be compared which compute different things."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**random_llama.SIZES["tiny"])
    one, other = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    bench_host.check(one, one, torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(AssertionError, match="differ by"):
        bench_host.check(one, other, torch.ones(1, 3, dtype=torch.long))


def test_rms_error_is_relative_to_the_unsharded_model():
    """Catches an error of ours that is judged without the rounding that the dtype brings to anyone."""
    import torch

    exact, own = torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0])
    ratios = bench_generate.rms_ratios({"same": own, "double": 2 * own, "none": exact}, own, exact)
    assert ratios == {"same": 1.0, "double": 2.0, "none": 0.0}


def test_ratio_is_taken_repeat_by_repeat():
    """Catches a quotient of medians: a machine that slows down half-way would look like a difference of the sides."""
    assert record.ratio([1.0, 10.0, 100.0], [2.0, 20.0, 200.0]) == {"median": 0.5, "p20": 0.5, "p80": 0.5}


def test_spread_of_one_repeat():
    """Catches percentiles that need more repeats than a short run has."""
    assert record.spread([3.0]) == {"median": 3.0, "p20": 3.0, "p80": 3.0}


def test_missed_targets_say_so():
    """Catches a target that counts as met in the wrong direction."""
    assert record.target("speed", 1.2, least=1.15)["is_met"]
    assert not record.target("time", 0.4, most=0.35)["is_met"]
    assert "MISSED  time: 0.4, target 0.35" in record.verdicts([record.target("time", 0.4, most=0.35)])


def test_default_file_is_named_after_bench_and_date(tmp_path, monkeypatch):
    """Catches a record that overwrites another day's."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    file = record.write("bench_x", argparse.Namespace(output_json=None, tp=2), rows=[])
    assert re.fullmatch(r"bench_x_\d{4}-\d\d-\d\d\.json", file.name)
    assert json.loads(file.read_text())["flags"] == {"tp": 2}


def test_flags_with_dashes_and_underscores():
    """Catches a flag that vLLM's or torchrun's users would spell otherwise."""
    for bench in (bench_load, bench_generate, bench_host):
        assert bench.parser().parse_args(["--num_iters", "3", "--input-len", "7"]).num_iters == 3

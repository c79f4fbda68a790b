"""bench/bench_experts.py on the CPU: tiny experts, every contender."""

import json

import pytest

from bench import bench_experts


def test_every_contender_is_timed(tmp_path, capsys):
    """Catches a contender that fails where there is no GPU, and figures under another's name."""
    file = tmp_path / "record.json"
    flags = ["--device", "cpu", "--tokens", "1", "5", "--num-iters", "2", "--output-json", str(file)]
    assert bench_experts.main(flags) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["tokens"] for row in rows] == [1, 5] and rows[0]["published_us"] is None
    for name in ("ours", "torch", "grouped_mm", "batched_mm", "eager", "loop"):
        assert all(row[f"{name}_us"]["median"] > 0 for row in rows)
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.count("|") == head.count("|") for line in lines)


def test_what_is_wrong_is_not_timed(monkeypatch):
    """Catches a benchmark of a kernel that is fast because it does something else."""
    monkeypatch.setattr(bench_experts, "experts", lambda x, *others: 2 * x)
    with pytest.raises(AssertionError, match="tiny tp1, 8 experts, top 2, T=3"):
        bench_experts.measure(bench_experts.Case(bench_experts.TINY, 3, "float32"), "cpu", repeats=1)


def test_what_cannot_be_is_said(capsys):
    """Catches a traceback, and a table without rows."""
    assert bench_experts.main(["--device", "cpu", "--model", "llama-3-8b", "--tp", "1"]) == 2
    assert "--model llama-3-8b has no experts" in capsys.readouterr().err

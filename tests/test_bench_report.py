"""Tests of bench/report.py, its tables and plots, and of bench/bench_gemm.py on the CPU.

Every figure here is made up: records of runs that never were.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import bench_gemm, record, report
from bench.kernel_shapes import PUBLISHED_CUBLAS_US, PUBLISHED_DEVICE
from bench.record import spread
from bench.report_op_tables import all_reduce_table, experts_goals_table, losses_table, several_table, summary_table
from bench.report_tables import gemm_table, goals_table, slower_table, speedup

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0", "python": "3.12.3"}


def gemm_row(n: int, k: int, m: int, ours: float, torchs: float, op: str = "gemm", **more) -> dict:
    size = {"m": m, "n": n, "k": k, "bytes": 2 * (n * k + m * k + m * n), "flops": 2 * m * n * k}
    facts = {"model": "made-up", "role": f"{n}x{k}", "tp_size": 1, "rank": 0, "dtype": "bfloat16", **size}
    times = {"ours_us": spread([ours]), "torch_us": spread([torchs]), "copies": 8, "runs": "decode(block_n=64)"}
    return {"what": f"{op} {n}x{k} M={m}", "op": op, **facts, **times, **more}


def made_up(sections: dict[str, list[dict]], date: str = "2000-01-01", gpu: str = PUBLISHED_DEVICE, **status) -> dict:
    """A record of gpu_check; `status`: section -> status."""
    results = [
        {"name": name, "shows": "", "status": status.get(name, "passed"), "seconds": 1.0, "rows": rows,
         "error": ["it broke", "exit code 1"] if status.get(name) == "failed" and not rows else []}
        for name, rows in sections.items()
    ]  # fmt: skip
    gpus = [{"name": gpu, "driver": "1.2.3", "memory": "1 MiB"}] if gpu else []
    stamp = {"name": "gpu_check", "date": f"{date}T00:00:00+00:00", "commit": "made-up", "versions": VERSIONS}
    return {**stamp, "gpus": gpus, "cpu": {"name": "made-up", "cores": 1}, "sections": results}


@pytest.fixture
def written(tmp_path):
    """written(record, ...) -> their files."""

    def write(*records) -> list[str]:
        files = [tmp_path / f"record{i}.json" for i in range(len(records))]
        for file, content in zip(files, records, strict=True):
            file.write_text(json.dumps(content))
        return list(map(str, files))

    return write


WINS = gemm_row(4096, 4096, 1, ours=9.0, torchs=13.5)
LOSES = gemm_row(6144, 4096, 16, ours=20.0, torchs=16.0)
TORCH = gemm_row(8192, 1024, 4, ours=7.0, torchs=7.0, runs="torch")


def test_rows_that_lose_stand_in_the_tables_and_by_themselves(written, capsys):
    """Catches picked cherries: a row left out, or a geomean over the winners."""
    assert report.main(written(made_up({"skinny": [WINS, LOSES, TORCH]}))) == 0
    printed = capsys.readouterr().out
    table, _, losses = printed.partition("### Slower than torch")
    assert all(f"| {row['n']}x{row['k']}" in table for row in (WINS, LOSES, TORCH))
    assert "6144x4096" in losses and "0.80x" in losses and "4096x4096," not in losses.replace("6144x4096,", "")
    geomean = (1.5 * 0.8 * 1.0) ** (1 / 3)
    assert f"{geomean:.3f}x (missed)" in table and "1 of 3" in table


def test_nothing_slower_says_so():
    """Catches an empty table where a reader looks for losses."""
    assert slower_table([WINS]) == "In no row was ours slower than torch."
    assert slower_table([]) == ""


def test_goals_take_the_rows_that_they_name():
    """Catches a skinny figure flattered by prefill rows, other dtypes or easier shapes; a missing one reads so."""
    others = [gemm_row(4096, 4096, 64, 1, 9), gemm_row(128, 128, 1, 1, 9), {**WINS, "dtype": "float16", "m": 4}]
    skinny, gated, prefill, _ = goals_table([WINS, *others]).splitlines()[2:]
    assert "1.500x" in skinny and ">= 1.25x" in skinny and "missed" not in skinny
    assert "not measured" in gated and "not measured" in prefill and ">= 1x" in prefill


def test_rates_and_share_of_the_limit():
    """Catches a factor of a thousand, a limit that counts memory alone, and figures without a data sheet."""
    row = gemm_row(4096, 4096, 1, ours=10.0, torchs=12.6)
    cells = [cell.strip() for cell in gemm_table([row], PUBLISHED_DEVICE).splitlines()[2].split("|")]
    tb_per_s = row["bytes"] / 10e-6 / 1e12
    assert f"{tb_per_s:.2f}" in cells and f"{tb_per_s / 4.8:.0%}" in cells
    many = gemm_row(4096, 4096, 8192, ours=400.0, torchs=400.0)
    tflops = many["flops"] / 400e-6 / 1e12
    assert f"{tflops / 989:.0%}" in gemm_table([many], PUBLISHED_DEVICE) and f"{tflops:.0f}" in gemm_table([many], "")
    assert "%" not in gemm_table([row], "Unheard-of GPU")


def test_published_figures_stand_apart():
    """Catches others' figures that pass for measured ones, or stand beside another device's."""
    published = f"{PUBLISHED_CUBLAS_US[4096, 4096][1]:.1f}"
    head, _, line = gemm_table([WINS], PUBLISHED_DEVICE).splitlines()
    columns = [cell.strip() for cell in head.split("|")]
    assert line.split("|")[columns.index("published cuBLAS us")].strip() == published
    assert published not in gemm_table([WINS], "NVIDIA H100 80GB HBM3")
    assert published not in gemm_table([{**WINS, "m": 4}], PUBLISHED_DEVICE)


def test_parts_of_a_check_are_one_report(written, capsys):
    """Catches a later run of one section that hides the others, and an old figure where there is a newer."""
    old = made_up({"skinny": [WINS], "prefill": [gemm_row(4096, 4096, 512, 30, 33)]}, "2000-01-01")
    new = made_up({"skinny": [{**WINS, "ours_us": spread([5.0])}], "prefill": []}, "2000-01-02", prefill="skipped")
    assert report.main(written(new, old)) == 0
    printed = capsys.readouterr().out
    assert "2.70x" in printed and "1.50x" not in printed  # 13.5 / 5
    assert "1.10x" in printed  # 33 / 30


def test_what_is_wrong_is_said(written, tmp_path, capsys):
    """Catches a report of speed that does not say that a result was wrong, or that a section failed."""
    rows = [{"what": "gemm x", "max_ratio": 3.0, "rms_ratio": 1.25, "is_ok": False}]
    failed = made_up({"exactness": rows, "capture": []}, exactness="failed", capture="failed")
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    assert report.main(written(failed)) == 0
    assert report.main([*written(failed), "--readme", str(readme)]) == 0
    for text in (capsys.readouterr().out, readme.read_text()):
        assert "exactness: wrong: gemm x" in text and "3.00, 1.25" in text
        assert "capture: it broke" in text


def test_readme_is_rewritten_between_the_markers_alone(written, tmp_path, capsys):
    """Catches a README that loses its text, or grows with every run."""
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n")
    files = written(made_up({"skinny": [WINS, LOSES]}))
    texts = []
    for _ in range(2):
        assert report.main([*files, "--readme", str(readme)]) == 0
        texts.append(readme.read_text())
    assert texts[0] == texts[1] and "old" not in texts[0]
    assert texts[0].startswith("before\n") and texts[0].endswith("after\n")
    assert f"Measured on {PUBLISHED_DEVICE}, driver 1.2.3, torch 2.11.0" in texts[0] and "0.80x" in texts[0]
    assert capsys.readouterr().out == ""


def test_readme_without_a_record_says_not_measured(written, tmp_path):
    """Catches figures of a CPU, or of nothing, in the place of those of a GPU."""
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    assert report.main([*written(made_up({}, gpu="")), "--readme", str(readme)]) == 0
    assert readme.read_text().count("not measured") == 4 and "No GPU figure" in readme.read_text()


@pytest.mark.parametrize("text", ["", f"{report.END}\n{report.BEGIN}\n", 2 * f"{report.BEGIN}\n{report.END}\n"])
def test_readme_without_its_markers_is_left_alone(written, tmp_path, text, capsys):
    """Catches a README that is overwritten because a marker was lost."""
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert report.main([*written(made_up({})), "--readme", str(readme)]) == 2
    assert readme.read_text() == text and report.BEGIN in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "x"}'])
def test_file_that_is_no_record(tmp_path, content, capsys):
    """Catches a traceback where one line says which file it is."""
    file = tmp_path / "x.json"
    file.write_text(content)
    assert report.main([str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(file) in line


def test_missing_file(tmp_path, capsys):
    """Catches a traceback for a misspelt name."""
    assert report.main([str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_records_of_this_repository(capsys):
    """Catches a record in bench/results that the default cannot read."""
    assert report.main([]) == 0
    assert capsys.readouterr().out.strip()


def test_targets_of_cpu_benchmarks(written, capsys):
    """Catches the CPU's records left out of the report."""
    of_cpu = {**made_up({}, gpu=""), "name": "bench_x", "targets": [record.target("speed", 1.0, least=2.0)]}
    del of_cpu["sections"]
    assert report.main(written(of_cpu)) == 0
    assert re.search(r"\| speed +\| 1 +\| 2 +\| missed", capsys.readouterr().out)


def test_decode_steps_beside_floor_target_and_published(written, capsys):
    """Catches a step over its target that does not say so."""
    row = {"what": "made-up tp1", "batch": 1, "context": 1024, "ours_ms": spread([4.0]), "theirs_ms": spread([20.0]),
           "floor_ms": 3.15, "target_ms": 3.8, "published": "SGLang 4.54"}  # fmt: skip
    assert report.main(written(made_up({"decode_step": [row, {**row, "theirs_ms": None, "floor_ms": None}]}))) == 0
    printed = capsys.readouterr().out
    assert "4.00 (4.00 to 4.00) (missed)" in printed and "20.00" in printed and "SGLang 4.54" in printed


def experts_row(tokens: int, ours: float, tp_size: int = 1, model: str = "mixtral-8x7b", **others: float) -> dict:
    facts = {"model": model, "tp_size": tp_size, "rank": 0, "tokens": tokens, "bytes": 10**9, "flops": 10**9}
    times = {f"{name}_us": spread([us]) for name, us in {"ours": ours, **others}.items()}
    what = f"{model} tp{tp_size}, T={tokens}"
    return {"what": what, **facts, **times, "published_us": 189, "runs": "decode(block_n=64)"}


def test_experts_beside_every_contender(written, capsys):
    """Catches a table that compares with a slow contender where a fast one was measured, or hides a row that loses."""
    wins = experts_row(1, 170.0, torch=200.0, loop=190.0, eager=900.0)
    loses = experts_row(4096, 4000.0, torch=3800.0, grouped_mm=3700.0)
    assert report.main(written(made_up({"experts_speed": [wins, loses]}))) == 0
    printed = capsys.readouterr().out
    assert "### Experts" in printed and "### GEMMs" not in printed
    table, _, losses = printed.partition("| slower than another in")
    assert "1.12x" in table and "0.93x" in table and "loop 190.0, torch 200.0, eager 900.0" in table
    assert "T=4096" in losses and "grouped_mm" in losses and "T=1 " not in losses


def test_experts_goals():
    """Catches another model's or tp_size's time beside the target, a miss that is not said, and what is missing."""
    rows = [experts_row(1, 170.0, torch=180.0), experts_row(4096, 3700.0, torch=3650.0)]
    rows.append(experts_row(1, 10.0, tp_size=8, model="qwen3-30b-a3b", torch=20.0))
    _, _, one, shard, many = experts_goals_table(rows).splitlines()
    assert "170.0 " in one and "<= 175" in one and "torch 180.0" in one and "189" in one and "missed" not in one
    assert "not measured" in shard and "<= 32" in shard
    assert "3700.0 (missed)" in many and "<= 3600" in many


def test_several_contenders():
    """Catches a limit that counts memory alone, published figures on another device, columns that nobody filled."""
    row = experts_row(1, 500.0, torch=600.0)
    (line,) = several_table([row], PUBLISHED_DEVICE).splitlines()[2:]
    assert f"{1e9 / 4.8e6 / 500:.0%}" in line and "2.00" in line and "189" in line and "decode(block_n=64)" in line
    assert "189" not in several_table([row], "NVIDIA H100 80GB HBM3")
    bare = {key: value for key, value in row.items() if key not in ("flops", "published_us", "runs")}
    head, _, line = several_table([bare], "Unheard-of GPU").splitlines()
    assert "published" not in head and "runs" not in head and "%" not in line and line.count("|") == head.count("|")
    assert losses_table([row]) == "In no row was another one faster." and losses_table([]) == ""


def test_readme_says_how_many_rows_lose(written, tmp_path):
    """Catches a README that grows by a line for every row, and one that is silent about losses."""
    rows = [experts_row(tokens, 100.0, torch=80.0 + 30 * (tokens < 4)) for tokens in range(1, 9)]
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    assert report.main([*written(made_up({"experts_speed": rows})), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert "5 of 8" in text and "0.80x" in text and text.count("T=") == 0 and "<= 175" in text
    assert summary_table({"Experts": [], "RMSNorm": []}) == ""


def test_attention_and_norms_stand_in_the_report(written, capsys):
    """Catches sections whose rows no table takes, or takes for those of GEMMs."""
    row = {"what": "llama B=1", "bytes": 10**8, "ours_us": spread([50.0]), "torch_us": spread([60.0])}
    assert report.main(written(made_up({"attention_speed": [row], "norm_speed": [{**row, "what": "M=1"}]}))) == 0
    printed = capsys.readouterr().out
    assert printed.count("1.20x") == 2 and "### Decode attention" in printed and "### RMSNorm" in printed


def test_all_reduces_say_that_they_are_emulated():
    """Catches times without NVLink beside published ones as if they were of one kind."""
    facts = {"op": "one-shot", "tp_size": 8, "message_bytes": 16384, "emulated": "one GPU: no NVLink, emulated"}
    times = {"alone_us": spread([3.0]), "copy_us": spread([1.5]), "together_us": None}
    row = {**facts, **times, "published_us": {"NCCL": 18.3}}
    text = all_reduce_table([row])
    assert "no NVLink, emulated" in text and "published us, with NVLink" in text and "NCCL 18.3" in text
    assert "not measured" in text and "3.00" in text


def test_plots(written, tmp_path, capsys):
    """Catches a plot that cannot be drawn from a record, or that leaves out the bars that lose."""
    pytest.importorskip("matplotlib")
    prefill = [gemm_row(4096, 4096, 512, 30, 33), gemm_row(8192, 4096, 512, 60, 50, "gated_gemm")]
    files = written(made_up({"skinny": [WINS, LOSES, {**LOSES, "m": 1}, *prefill]}))
    drawn = {}
    for folder in ("one", "two"):
        assert report.main([*files, "--plots", str(tmp_path / folder)]) == 0
        drawn[folder] = {file.name: file.read_text() for file in (tmp_path / folder).iterdir()}
    assert set(drawn["one"]) == {f"nvidia-h200_{plot}.svg" for plot in ("bandwidth", "rate", "speedup")}
    assert drawn["one"] == drawn["two"]
    assert "published by others" in drawn["one"]["nvidia-h200_bandwidth.svg"]
    assert "5 rows" in drawn["one"]["nvidia-h200_speedup.svg"] and "#c0392b" in drawn["one"]["nvidia-h200_speedup.svg"]


def test_tuned_choices_travel_in_the_record(written, tmp_path, monkeypatch):
    """Catches choices that are lost with the machine on which they were measured."""
    from tp_runtime.kernels import tuned

    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "tables")
    row = {"op": "gemm", "dtype": "bfloat16", "n": 8, "k": 8, "m": 1, "kernel": "torch", "us": 2.0, "torch_us": 1.0}
    chosen = {"what": "x", "device": "Made-up GPU", "tuned": {**row, "triton": "3.6", "torch": "2.11"}}
    assert report.main([*written(made_up({"tune": [chosen]})), "--ship"]) == 0
    assert tuned.read_rows(tuned.shipped_file("Made-up GPU"), "Made-up GPU") == [chosen["tuned"]]


def test_bench_gemm_on_the_cpu(tmp_path, capsys):
    """Catches a benchmark that runs nowhere but on a GPU, and a record that the report cannot read."""
    file = tmp_path / "gemm.json"
    flags = ["--model", "demo:llama", "--tp", "2", "--m", "1", "3", "--dtype", "float32", "--num-iters", "2"]
    assert bench_gemm.main([*flags, "--role", "qkv", "gate_up", "--device", "cpu", "--output-json", str(file)]) == 0
    assert capsys.readouterr().out.startswith("| ")
    written = json.loads(file.read_text())
    assert [(row["op"], row["role"], row["m"]) for row in written["rows"]] == [
        ("gemm", "qkv", 1), ("gemm", "qkv", 3), ("gemm", "gate_up", 1), ("gated_gemm", "gate_up", 1),
        ("gemm", "gate_up", 3), ("gated_gemm", "gate_up", 3),
    ]  # fmt: skip
    for row in written["rows"]:
        assert row["model"] == "demo:llama" and row["tp_size"] == 2 and row["runs"] == "reference"
        assert row["ours_us"]["median"] > 0 and row["bytes"] > 4 * row["n"] * row["k"] and speedup(row) > 0
    assert report.load([file])[0]["rows"] == written["rows"]


@pytest.mark.parametrize(
    "flags", [["--tp", "3"], ["--model", "demo:nothing"], ["--model", "llama-3-8b", "--tp", "99"]], ids=str
)
def test_bench_gemm_says_what_cannot_be(flags, capsys):
    """Catches a traceback, or an empty table, for shapes that there are not."""
    assert bench_gemm.main([*flags, "--device", "cpu"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_bench_gemm_does_not_time_what_is_wrong(monkeypatch):
    """Catches a fast wrong kernel that wins."""
    monkeypatch.setitem(bench_gemm.OURS, "gemm", lambda x, w: 2 * (x @ w.T))
    shape = bench_gemm.KernelShape("made-up", "qkv", 1, 24, 16)
    with pytest.raises(AssertionError, match="max_ratio"):
        bench_gemm.measure(bench_gemm.Case(bench_gemm.OPS["gemm"], shape, 2, "float32"), "cpu", repeats=1)


def test_bench_gemm_under_pytest_benchmark(tmp_path):
    """Catches a microbenchmark that `pytest bench` cannot collect, and a JSON without model, role and tp_size."""
    pytest.importorskip("pytest_benchmark")
    file, one = tmp_path / "b.json", "llama-3-8b-qkv and M1-" if bench_gemm.ON_CUDA else "qkv and M1-float32"
    command = [sys.executable, "-m", "pytest", "bench/bench_gemm.py", "-p", "no:cacheprovider", "--benchmark-only"]
    flags = ["--benchmark-json", str(file), "--benchmark-max-time", "0.01", "--benchmark-min-rounds", "1", "-k", one]
    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    benchmarks = json.loads(file.read_text())["benchmarks"]
    assert {b["extra_info"]["side"] for b in benchmarks} == {"torch", "ours"}
    assert all({"model", "role", "tp_size", "m", "n", "k", "dtype"} <= set(b["extra_info"]) for b in benchmarks)

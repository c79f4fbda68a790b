"""Tests of the sections in bench/on_gpu/, on the CPU: that they find what they are there to find.

The kernels are stand-ins with a planted fault, or kernels/ interpreted. CUDA graphs and streams are left out here.
"""

import math
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.compiled import recording
from bench.gpu_section import Options
from bench.kernel_ops import OPS, Op
from bench.on_gpu import end_to_end, exactness, pytest_files, races, speed, tuning
from bench.on_gpu.cases import Case, Faults, odd_cases
from bench.on_gpu.errors import against
from bench.tune import tasks
from tests.interpreted import interpreted
from tp_runtime.kernels import tuned
from tp_runtime.kernels.gated_gemm import gated_gemm_ref
from tp_runtime.kernels.gemm import gemm_ref

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class StandIn(Op):
    """An op whose kernels are `kernels_module`."""

    kernels_module: object = None

    @property
    def kernels(self):
        return self.kernels_module(self.name)


def module(run) -> SimpleNamespace:
    """A kernels file with one candidate."""
    refs = {"gemm_ref": gemm_ref, "gated_gemm_ref": gated_gemm_ref}
    return SimpleNamespace(run=run, candidates=lambda m, n, k, dtype: [("stand_in", Config())], **refs)


def with_kernels(name: str, kernels) -> Op:
    """The op `name` with other kernels: kernels(name) -> module."""
    op = StandIn(**{field.name: getattr(OPS[name], field.name) for field in fields(Op)})
    object.__setattr__(op, "kernels_module", kernels)
    return op


class Config(tuple):
    def _asdict(self) -> dict:
        return {}


def planted(fault) -> Op:
    """A gemm by torch whose results go through fault(y, number of the call) -> y before they are stored."""
    calls = []

    def run(x, w, bias=None, residual=None, activation=None, out=None, *, kernel, config, num_sms=None):
        y = fault(gemm_ref(x, w, bias, residual, activation), len(calls))
        calls.append(y)
        return y if out is None else out.copy_(y)

    return with_kernels("gemm", lambda name: module(run))


def case(op: Op, m: int = 3, n: int = 24, k: int = 40, dtype: str = "float16", is_odd: bool = False) -> Case:
    return Case(op, "test", m, n, k, dtype, is_odd)


def right(y, call):
    return y


def test_right_kernel_is_right():
    """Catches a check that finds fault with torch itself."""
    for is_odd in (False, True):
        row = exactness.check(case(planted(right), is_odd=is_odd), "cpu")
        assert row["is_ok"] and row["right"] == (4 if is_odd else 1)
        assert row["max_ratio"] == row["rms_ratio"] == 1


@pytest.mark.parametrize(
    "fault",
    [
        lambda y, call: y * 1.01,
        lambda y, call: y.index_fill(1, torch.tensor([5]), float("nan")),
        lambda y, call: y.roll(1, 0),
    ],
    ids=["inexact", "not written", "rows exchanged"],
)
def test_wrong_results_are_found(fault):
    """Catches a check that lets a wrong element through."""
    row = exactness.check(case(planted(fault)), "cpu")
    assert not row["is_ok"] and row["wrong"][0].startswith("stand_in()")


def test_writing_beside_the_block_is_found():
    """Catches a kernel whose mask is too wide: it would overwrite the columns that another rank's chunk fills."""

    def run(x, w, out=None, *, kernel, config):
        out.copy_(torch.nn.functional.linear(x, w))
        out.as_strided((len(out), 1), out.stride(), out.storage_offset() + out.shape[1]).zero_()

    row = exactness.check(case(with_kernels("gemm", lambda name: module(run))), "cpu")
    assert not row["is_ok"] and "beside" in row["wrong"][0]


def test_refusal_is_right_for_odd_shapes_alone():
    """Catches a model's shape that a kernel refuses and nobody is told."""

    def refuse(y, call):
        raise ValueError("rows must be multiples of 16 bytes")

    assert exactness.check(case(planted(refuse), is_odd=True), "cpu")["refused"] == 4
    row = exactness.check(case(planted(refuse)), "cpu")
    assert not row["is_ok"] and "ValueError" in row["wrong"][0]


def test_one_fault_does_not_hide_the_others():
    """Catches a check that ends at the first candidate that does not compile."""
    faults = Faults("cpu")

    def broken() -> str:
        raise RuntimeError("no such instruction\nand a page of PTX")

    faults.check("a", broken)
    faults.check("b", lambda: "wrong")
    faults.check("c", lambda: "")
    row = faults.row("case")
    assert row["wrong"] == ["a: RuntimeError: no such instruction", "b: wrong"] and row["right"] == 1


def test_bits_that_change_are_found():
    """Catches a race that shows once in many calls: in repeats, in replays, in a chain."""

    def at(number: int):
        return lambda y, call: y + (call == number)

    assert races.check_repeats(case(planted(right)), "cpu")["is_ok"]
    assert "1 of 100 repeats differ" in races.check_repeats(case(planted(at(77))), "cpu")["wrong"][0]
    assert races.check_replays(case(planted(right)), "cpu")["is_ok"]
    assert "differs" in races.check_replays(case(planted(at(5))), "cpu")["wrong"][0]


def test_chain_finds_a_late_difference(monkeypatch):
    """Catches a comparison of chains that looks at the wrong buffer, or before it was filled."""
    gated = module(lambda x, w, out, *, kernel, config: gated_gemm_ref(x, w, out=out))
    monkeypatch.setattr(races, "CHAIN_LAYERS", 2)

    def chain(fault) -> dict:
        ops = {"gemm": planted(fault), "gated_gemm": with_kernels("gated_gemm", lambda name: gated)}
        monkeypatch.setattr(races, "OPS", ops)
        return races.check_chain("test", 3, 16, 24, "cpu", "float32")

    assert chain(right)["is_ok"]
    # Two layers of two gemms: 4 calls with waits to begin with, 4 with waits, then 4 back to back.
    assert "back to back" in chain(lambda y, call: y + (call == 9))["wrong"][0]


@pytest.mark.parametrize("name", OPS)
def test_kernels_pass_the_checks_interpreted(name, monkeypatch):
    """Catches a section that calls the kernels in a way that they do not have."""

    def one_of_each(self) -> dict:
        return {kernel: (kernel, c) for kernel, c in self.op.candidates(self.m, self.n, self.k, torch.float16)}

    monkeypatch.setattr(Case, "candidates", one_of_each)
    op = with_kernels(name, interpreted)
    for m, n, k in ((1, 70, 45), (3, 24, 136)):
        row = exactness.check(case(op, m, n, k, is_odd=True), "cpu")
        assert row["is_ok"] and row["right"] > 0, row
    assert races.check_replays(case(op, 2), "cpu")["is_ok"]


def test_errors_are_over_torchs():
    """Catches a NaN, an infinity or an error where torch has none that count as small."""
    want = torch.tensor([1.0, -2.0], dtype=torch.float64)
    off = want + 0.25
    assert against(want, off, off)["max_ratio"] == 1
    assert against(want, want + 0.5, off) | {"is_ok": True, "max_ratio": 2.0} == against(want, want + 0.5, off)
    assert not against(want, want + 0.51, off)["is_ok"]
    assert against(want, want, want)["is_ok"] and against(want, want, want)["max_ratio"] == 1
    for wrong in (off, want * math.nan, want * math.inf):
        error = against(want, wrong, want)
        assert not error["is_ok"] and error["max_ratio"] is None


def test_odd_cases_are_off_the_grid():
    """Catches a list of odd shapes that a clean-up made round."""
    cases = odd_cases()
    assert {c.op.name for c in cases} == set(OPS) and {c.dtype for c in cases} == {"bfloat16", "float16"}
    assert any(c.m == 1 for c in cases) and any(c.n % 8 and c.k % 8 for c in cases) and any(c.m > 128 for c in cases)


def test_what_is_timed_is_tuned_before():
    """Catches a row of the report that compares torch with torch because nobody chose a kernel for its shape."""
    with recording(90):
        chosen = {task.key for task in tasks(tuning.shapes())}
    for timed in [*speed.skinny_cases(), *speed.prefill_cases()]:
        m, n, k = timed.size
        assert tuned.Key(timed.op.name, timed.dtype, n, k, tuned.bucket(m)) in chosen, timed.what


TINY = {**end_to_end.CONFIGS["small llama"], "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}  # fmt: skip
TINY_MOE = {**TINY, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(end_to_end.CONFIGS, "tiny", TINY)
    monkeypatch.setitem(end_to_end.CONFIGS, "tiny moe", TINY_MOE)


def test_patched_model_against_hugging_face(tiny, capsys):
    """Catches a comparison that does not run through the whole model, with and without the engine."""
    rows = list(end_to_end.right(Options(), "cpu", [("tiny", "float32")]))
    assert [row["what"].split(": ")[1] for row in rows] == [
        "logits", "greedy tokens, generate()", "greedy tokens, engine"
    ]  # fmt: skip
    assert all(row["is_ok"] for row in rows)


def test_patched_model_that_differs_is_found(tiny, monkeypatch):
    """Catches two sides that are one and the same model: it would always agree with itself."""
    patch = end_to_end.tp_runtime.patch

    def patch_and_damage(model, comm):
        patch(model, comm)
        model.model.layers[1].mlp.down_proj.weight.data.mul_(1.01)

    monkeypatch.setattr(end_to_end.tp_runtime, "patch", patch_and_damage)
    logits, *_ = end_to_end.right(Options(), "cpu", [("tiny", "float32")])
    assert not logits["is_ok"]


def test_decode_steps_of_whole_models_and_of_ranks(tiny, monkeypatch):
    """Catches a rank of many that cannot run alone, and a row without what it is compared with."""
    monkeypatch.setattr(end_to_end, "REPEATS", 1)
    monkeypatch.setattr(end_to_end, "NEW_TOKENS", 3)
    steps = [end_to_end.Step("tiny", 1, 2, 1.0, "x"), end_to_end.Step("tiny", 3, 1, 1.0, "x"),
             end_to_end.Step("tiny moe", 1, 1, 1.0, "x")]  # fmt: skip
    whole, rank, moe = end_to_end.decode_steps(Options(), "cpu", steps, context=5)
    assert whole["ours_ms"]["median"] > 0 and whole["theirs_ms"]["median"] > 0 and whole["batch"] == 2
    assert rank["theirs_ms"] is None and "one rank" in rank["what"]
    assert moe["ours_ms"]["median"] > 0


def test_model_too_large_for_the_device_is_left_out(tiny, monkeypatch):
    """Catches a section that dies of the first model on a smaller GPU."""
    monkeypatch.setattr(end_to_end, "free_bytes", lambda device: 1000)
    (row,) = end_to_end.right(Options(), "cpu", [("tiny", "float32")])
    assert "left out" in row["what"] and "is_ok" not in row


def test_parameter_count_is_that_of_the_model(tiny):
    """Catches an estimate of memory that lets a device run out of it."""
    for config in (TINY, TINY_MOE):
        model = end_to_end.random_model(config, torch.float32, "cpu")
        assert end_to_end.parameter_count(config) == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.02)


def test_gpu_tests_file_by_file(tmp_path):
    """Catches a test that fails on the GPU and does not show in the record."""
    (tmp_path / "test_mixed.py").write_text(textwrap.dedent("""
        import pytest

        @pytest.mark.gpu
        def test_right(): pass

        @pytest.mark.gpu
        def test_wrong(): assert False

        def test_not_asked_for(): assert False
    """))
    (tmp_path / "test_other.py").write_text("def test_without_a_mark(): assert False\n")
    program = f"""
        import json, pathlib
        from bench.gpu_section import Options
        from bench.on_gpu.pytest_files import rows
        for row in rows(Options(), pathlib.Path({str(tmp_path)!r})):
            print("ROW", json.dumps(row))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    rows = [line for line in done.stdout.splitlines() if line.startswith("ROW")]
    assert len(rows) == 1, done.stdout + done.stderr
    assert '"test_mixed.py: 1 passed, 1 failed"' in rows[0] and '"is_ok": false' in rows[0]
    assert pytest_files.files()

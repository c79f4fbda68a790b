"""Tests of bench/gpu_check.py and bench/gpu_section.py: order, budget, failures, the record. None needs a GPU."""

import inspect
import json
import signal
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest

from bench import gpu_check, gpu_section, record
from bench.gpu_section import SECTIONS, Options, Section

ROOT = Path(__file__).resolve().parent.parent
END = {"end": {"is_complete": True, "clocks": {}}}
CUT = {"end": {"is_complete": False, "clocks": {}}}


def section(name: str, estimate_s: float = 10.0) -> Section:
    return Section(name, f"what {name} shows", estimate_s, "fake:rows")


def row(what: str, **more) -> dict:
    return {"row": {"what": what, **more}}


class Play:
    """Sections that take as long as they say on a clock of their own: name -> (seconds, event) each."""

    def __init__(self, **scripts):
        self.now, self.scripts, self.calls, self.saved = 0.0, scripts, [], []

    def run(self, section: Section, left_s):
        self.calls.append((section.name, left_s))
        for seconds, event in self.scripts[section.name]:
            self.now += seconds
            if isinstance(event, BaseException):
                raise event
            yield event

    def check(self, sections, budget_s=None) -> dict[str, dict]:
        results = gpu_check.check(sections, budget_s, self.run, self.save, clock=lambda: self.now)
        assert self.saved[-1] == results
        return {result["name"]: result for result in results}

    def save(self, results) -> None:
        self.saved.append(json.loads(json.dumps(results)))


def test_sections_run_in_order_and_are_saved_row_by_row():
    """Catches a record that holds nothing until the end: a killed run would have measured for nobody."""
    play = Play(a=[(1, row("a1")), (2, row("a2")), (0, END)], b=[(1, row("b1")), (0, END)])
    results = play.check([section("a"), section("b")])
    assert play.calls == [("a", None), ("b", None)]
    assert [r["status"] for r in results.values()] == ["passed", "passed"]
    assert results["a"]["seconds"] == 3 and results["b"]["rows"] == [{"what": "b1"}]
    sizes = [[len(r["rows"]) for r in saved] for saved in play.saved]
    assert [1] in sizes and [2] in sizes and [2, 0] in sizes and sizes[-1] == [2, 1]
    assert play.saved[0][0]["status"] == "running"


def test_budget_leaves_out_what_does_not_fit_and_goes_on_with_what_does():
    """Catches a budget that is overrun, or that stops at the first section that is too long."""
    play = Play(a=[(70, row("a1")), (0, END)], b=[], c=[(5, row("c1")), (0, END)])
    results = play.check([section("a", 60), section("b", 60), section("c", 30)], budget_s=100)
    assert [r["status"] for r in results.values()] == ["passed", "skipped", "passed"]
    assert play.calls == [("a", 100), ("c", 30)]
    assert results["b"]["rows"] == []


def test_section_that_runs_into_the_end_of_the_budget_is_no_failure():
    """Catches rows that are thrown away because there was no time for the next, and a missing row that is hidden."""
    killed = {"error": ["Timeout (0:00:20)!", "exit code 1"]}
    play = Play(a=[(15, row("a1")), (0, CUT)])
    assert play.check([section("a")], budget_s=12)["a"]["status"] == "cut short"
    play = Play(a=[(5, row("a1")), (30, killed)])
    assert play.check([section("a")], budget_s=12)["a"]["status"] == "cut short"
    play = Play(a=[(5, row("a1")), (5, killed)])
    assert play.check([section("a")], budget_s=12)["a"]["status"] == "failed"


def test_failing_section_does_not_stop_the_others():
    """Catches a check that ends at the first mistake, and one that passes although a row is wrong."""
    lines = ["Traceback (most recent call last):", "ValueError: no such kernel", "exit code 1"]
    play = Play(
        a=[(1, row("a1")), (1, {"error": lines})],
        b=[(1, row("b1", is_ok=True)), (1, row("b2", is_ok=False)), (0, END)],
        c=[(1, row("c1")), (0, END)],
    )
    results = play.check([section("a"), section("b"), section("c")])
    assert [r["status"] for r in results.values()] == ["failed", "failed", "passed"]
    assert results["a"]["error"] == lines and results["a"]["rows"] == [{"what": "a1"}]
    text = gpu_check.summary(list(results.values()))
    assert "a: ValueError: no such kernel" in text and "b: WRONG  b2" in text


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143)])
def test_interrupted_run_keeps_its_rows(stop):
    """Catches a record that still says "running" after Ctrl-C or SIGTERM, or that has lost the last rows."""
    play = Play(a=[(1, row("a1")), (1, stop)])
    with pytest.raises(type(stop)):
        play.check([section("a")])
    assert play.saved[-1][0]["status"] == "interrupted" and play.saved[-1][0]["rows"] == [{"what": "a1"}]


def test_dry_run_lists_everything_without_torch(capsys):
    """Catches a listing that needs what only the device machine has, or seconds of imports."""
    command = [sys.executable, "-X", "importtime", "-m", "bench.gpu_check", "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert not [line for line in done.stderr.splitlines() if line.endswith((" torch", " triton", " transformers"))]
    names = [line.split("|")[2].strip() for line in done.stdout.splitlines() if line.startswith("|")]
    assert names[2:] == [s.name for s in SECTIONS]
    assert f"total: {sum(s.estimate_s for s in SECTIONS):.0f} s" in done.stdout


def test_dry_run_follows_only_and_budget(capsys):
    """Catches a listing of other sections than those that the same flags would run."""
    first, second = SECTIONS[:2]
    budget_s = first.estimate_s + second.estimate_s - 1
    assert gpu_check.main(["--dry-run", "--only", second.name, first.name, "--budget-s", str(budget_s)]) == 0
    head, rule, one, two, total = capsys.readouterr().out.splitlines()
    assert first.name in one and "skipped" not in one
    assert second.name in two and "skipped" in two
    assert total.startswith(f"total: {first.estimate_s:.0f} s") and f"budget of {budget_s:.0f} s" in total


def test_unknown_section_is_a_usage_error(capsys):
    """Catches a misspelt name that silently checks nothing."""
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(["--only", "exactnes"])
    assert "exactness" in capsys.readouterr().err


def test_without_a_gpu_one_line_and_exit_code_2(capsys, monkeypatch):
    """Catches a traceback, or an empty record, where there is nothing to measure."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1 and "--dry-run" in printed.err


@pytest.fixture
def on_test_gpu(monkeypatch, tmp_path):
    """A GPU of that name, records in tmp_path; signal handlers as they were."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Test GPU 9000")
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


def test_record_is_stamped_numbered_and_there_after_each_section(on_test_gpu, monkeypatch, capsys):
    """Catches a run that overwrites the one before it, and figures that nobody can place."""
    play = Play(exactness=[(1, row("one")), (0, END)], capture=[(1, {"error": ["it broke", "exit code 1"]})])
    after_first = []

    def run(section: Section, left_s):
        if section.name == "capture":
            after_first.extend(json.loads(file.read_text()) for file in on_test_gpu.glob("*.json"))
        yield from play.run(section, left_s)

    monkeypatch.setattr(gpu_check, "in_process", lambda ship: run)
    for _ in range(2):
        assert gpu_check.main(["--only", "exactness", "capture"]) == 1
    first, second = sorted(on_test_gpu.glob("*.json"), key=lambda file: len(file.name))
    assert first.name.startswith("gpu_check_test-gpu-9000_20") and second.name == f"{first.stem}_2.json"
    written = json.loads(first.read_text())
    assert {"name", "date", "flags", "commit", "versions", "platform", "cpu", "gpus"} <= set(written)
    assert [s["status"] for s in written["sections"]] == ["passed", "failed"]
    assert after_first[0]["sections"][0]["rows"] == [{"what": "one"}]
    assert not list(on_test_gpu.glob(".*"))
    assert "it broke" in capsys.readouterr().out


def test_section_in_a_process_of_its_own_that_fails(monkeypatch):
    """Catches an exception in a section that is lost on its way: the record must show where it came from."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # what every section needs is not there
    events = list(gpu_check.in_process(ship=False)(gpu_section.BY_NAME["skinny"], 60.0))
    assert [list(event) for event in events] == [["error"]]
    assert events[0]["error"][-1] == "exit code 1"
    assert any("bench_gemm.py" in line for line in events[0]["error"])


@pytest.fixture
def fake_rows(monkeypatch):
    """fake_rows(generator): what the rows of sections called `fake:rows` are."""

    def install(generator) -> None:
        module = types.ModuleType("bench.on_gpu.fake")
        module.rows = generator
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return install


def test_section_stops_between_rows_when_its_seconds_have_passed(fake_rows, capsys):
    """Catches a section that goes on to its own end, and one that loses the row that it had."""
    now = iter(range(0, 1000, 4))
    fake_rows(lambda options: ({"what": str(i)} for i in range(100)))
    gpu_section.run(section("fake"), Options(), 10.0, clock=lambda: next(now))
    *rows, end = map(json.loads, capsys.readouterr().out.splitlines())
    assert 1 <= len(rows) <= 3 and rows[0] == {"row": {"what": "0"}}
    assert end["end"]["is_complete"] is False


def test_section_without_a_limit_runs_to_its_end(fake_rows, capsys):
    """Catches an end that is not told, or options that do not reach the section."""
    fake_rows(lambda options: iter([{"what": f"ship={options.ship}"}]))
    gpu_section.run(section("fake"), Options(ship=True), None)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == {"row": {"what": "ship=True"}} and rows[1]["end"]["is_complete"]


def test_hanging_section_ends_with_its_stack():
    """Catches a deadlock on the device that takes the whole run, and the machine's time, with it."""
    program = """
        import sys, threading, types
        from bench import gpu_section

        def hangs(options):
            yield {"what": "one"}
            threading.Event().wait()

        sys.modules["bench.on_gpu.fake"] = types.SimpleNamespace(rows=hangs)
        gpu_section.ROW_LIMIT_S = 1
        gpu_section.run(gpu_section.Section("fake", "", 1, "fake:rows"), gpu_section.Options(), None)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout.startswith('{"row": {"what": "one"}}\n')
    assert "in hangs" in done.stdout


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
def test_every_line_of_the_table_leads_to_rows(section):
    """Catches a section whose module or generator is called otherwise: it would fail only on the GPU."""
    assert list(inspect.signature(section.generator()).parameters)[0] == "options"
    assert section.estimate_s > 0 and section.shows

"""LLM: ranks of one's own, from a plain script and from a notebook cell."""

import os
import select
import signal
import subprocess
import sys
import textwrap

import pytest
from command_server import REPOSITORY

import tp_runtime


@pytest.fixture(scope="module")
def llm():
    with tp_runtime.LLM("demo:llama", tp_size=3, dtype="float32") as model:
        yield model


def test_generates_a_batch(llm):
    """Catches completions in another order, or without their text."""
    completions = llm.generate(["27+58=", "1+1=", "99+99="])
    assert [c.text for c in completions] == ["85", "2", "198"]
    assert {c.finish_reason for c in completions} == {"stop"}
    assert llm.generate("2+2=")[0].prompt == "2+2="


def test_options_reach_the_ranks(llm):
    """Catches options that are dropped on the way, and a seed that means nothing."""
    assert len(llm.generate(">7+3=", max_new_tokens=5)[0].tokens) == 5
    assert llm.generate(">7+3=", stop=";13")[0].text == "10;10+3=13"
    drawn = [llm.generate(">7+3=", temperature=5.0, max_new_tokens=12, seed=seed)[0].tokens for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_sampling_without_a_seed_stays_in_step(llm):
    """Catches ranks that draw for themselves (they would wait for each other for ever) or that always draw the same."""
    assert len({tuple(llm.generate(">7+3=", temperature=5.0, max_new_tokens=12)[0].tokens) for _ in range(3)}) > 1


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("1+1=", {"beams": 3}, "unknown option beams; known: do_sample"),
        ("1+1=", {"temperature": -1}, "temperature=-1"),
        ("", {}, "empty"),
        ("1" * 300, {}, "256"),
        (7, {}, "a prompt is a int"),
    ],
)
def test_a_bad_request_is_the_callers_error_and_nothing_else(llm, prompt, options, message):
    """Catches a request that kills the ranks, and an option that is silently dropped."""
    with pytest.raises(ValueError, match=message):
        llm.generate([prompt], **options)
    assert llm.generate("2+2=")[0].text == "4"


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("/nowhere", {}, "/nowhere"),
        ("demo:llama", {"tp_size": 9}, "tp_size=9 exceeds 8 query heads"),
        ("demo:llama", {"dtyp": "float32"}, "unknown option dtyp; known: backend"),
        ("demo:llama", {"dtype": "int8"}, "dtype='int8'"),
    ],
)
def test_what_cannot_work_starts_nothing(path, options, message):
    """Catches processes that are started before the checks, and an error that comes from a rank."""
    with pytest.raises(ValueError, match=message):
        tp_runtime.LLM(path, **options)


def children_of(pid: int) -> list[int]:
    return [int(p) for p in open(f"/proc/{pid}/task/{pid}/children").read().split()]


def test_a_killed_rank_is_a_runtime_error_that_names_it():
    """Catches a caller that waits for a dead rank, and ranks that outlive their LLM."""
    with tp_runtime.LLM("demo:llama", tp_size=2, backend="gloo") as llm:
        launcher = children_of(os.getpid())[-1]
        ranks = children_of(launcher)
        os.kill(ranks[1], signal.SIGKILL)
        with pytest.raises(RuntimeError, match="rank 1 was killed by SIGKILL"):
            llm.generate("1+1=")
    assert not any(os.path.exists(f"/proc/{pid}") for pid in ranks)
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate("1+1=")


def test_ranks_end_with_their_owner():
    """Catches orphans: a script that is killed, without close() and without a context manager."""
    script = """
        import tp_runtime, os
        llm = tp_runtime.LLM("demo:llama", tp_size=2)
        launcher = int(open(f"/proc/self/task/{os.getpid()}/children").read().split()[0])
        print(launcher, *open(f"/proc/{launcher}/task/{launcher}/children").read().split(), flush=True)
        input()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 3
    ends = [os.pidfd_open(pid) for pid in pids]  # they tell of an end before anybody has buried the process
    process.kill()
    process.communicate()
    for pid, end in zip(pids, ends, strict=True):
        assert select.select([end], [], [], 10)[0], f"{pid} of {pids} is left"
        os.close(end)


def test_a_notebook_cell(tmp_path):
    """Catches what only a notebook has: threads, a running event loop, no __main__ file."""
    nbclient = pytest.importorskip("nbclient", reason="the notebook test needs nbclient and ipykernel")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel", reason="the notebook test needs nbclient and ipykernel")
    cells = [
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})",
        "import tp_runtime\nllm = tp_runtime.LLM('demo:mixtral', tp_size=3)",
        "print(llm.generate('27+58=')[0].text)",
        "llm.close()",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    spec = tmp_path / "kernels" / "tp-test"
    spec.mkdir(parents=True)
    argv = f'["{sys.executable}", "-m", "ipykernel_launcher", "-f", "{{connection_file}}"]'
    (spec / "kernel.json").write_text(f'{{"argv": {argv}, "display_name": "test", "language": "python"}}')
    os.environ["JUPYTER_PATH"], before = str(tmp_path), os.environ.get("JUPYTER_PATH")
    try:
        nbclient.NotebookClient(notebook, kernel_name="tp-test", timeout=120).execute()
    finally:
        os.environ.pop("JUPYTER_PATH")
        if before is not None:
            os.environ["JUPYTER_PATH"] = before
    printed = "".join(out.text for out in notebook.cells[2].outputs if out.get("name") == "stdout")
    assert printed == "85\n"

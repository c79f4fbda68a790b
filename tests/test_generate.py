"""The command, as a user types it: right text at every size, its streams, its exit codes, its errors."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from command_server import REPOSITORY, CommandServer


@pytest.fixture(scope="module")
def command():
    server = CommandServer()
    yield server
    server.close()


def shell(*argv, **options):
    """The real thing, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "tp_runtime.generate", *argv],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=120,
        **options,
    )


def completions(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["completions"]


@pytest.mark.parametrize(("model", "sizes"), [("demo:llama", (1, 2, 3, 5, 8)), ("demo:mixtral", (1, 2, 3, 4, 7))])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_sum_is_right_and_tokens_are_equal_at_every_size(command, model, sizes, dtype):
    """Catches a cut that changes the model: another sum, or other tokens, at some number of ranks."""
    tokens = set()
    for size in sizes:
        done = command.run("--model", model, "--tp", str(size), "--prompt", "27+58=", "--json", "--dtype", dtype)
        (completion,) = completions(done)
        assert (completion["text"], completion["finish_reason"]) == ("85", "stop"), size
        assert "verified: 27+58=85" in done.stderr
        tokens.add(tuple(completion["tokens"]))
    assert len(tokens) == 1


def test_no_arguments_run_the_demo():
    """Catches a first impression that is an error: the bare command, in a process of its own, from the shell."""
    done = shell()
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "[0] 85"
    assert "verified: 27+58=85" in done.stderr and "verified: 99+1=100" in done.stderr
    assert re.search(r"^tp 2 \| cpu \| bfloat16 \| load .* ms/token", done.stderr, re.M)


def test_json_holds_what_was_promised(command):
    """Catches a field of the report that was renamed or lost, and anything else on stdout."""
    done = command.run("--tp", "2", "--prompt", "1+1=", "--prompt", ">7+3=", "--json")
    answer = json.loads(done.stdout)
    assert [sorted(c) for c in answer["completions"]] == [["finish_reason", "prompt", "text", "tokens"]] * 2
    report = answer["report"]
    for name in (
        "tp_size",
        "model",
        "dtype",
        "device",
        "load_s",
        "prefill_tokens_per_s",
        "decode_ms_per_token",
        "tokens_per_s",
    ):
        assert report[name], name
    assert len(report["peak_memory_bytes"]) == len(report["predicted"]["weight_bytes"]) == 2


def test_batch_equals_single_prompts(command):
    """Catches left padding that leaks into attention or positions: a prompt's answer depends on its neighbours."""
    prompts = ["27+58=", "1+1=", ">7+3=", "99+99="]
    alone = [completions(command.run("--tp", "2", "--prompt", p, "--json"))[0] for p in prompts]
    flags = [flag for p in prompts for flag in ("--prompt", p)]
    assert completions(command.run("--tp", "2", *flags, "--json")) == alone
    from_file = command.run("--tp", "2", "--prompt-file", "-", "--json", stdin="\n".join(prompts) + "\n\n")
    assert completions(from_file) == alone


def test_streaming_prints_the_same_text(command):
    """Catches text that is lost, doubled or reordered between tokens, and several prompts in one muddle."""
    streamed = command.run("--prompt", ">7+3=")
    whole = command.run("--prompt", ">7+3=", "--no-stream")
    assert streamed.stdout == whole.stdout and streamed.stdout.startswith("10;10+3=13;13+3=16")
    several = command.run("--prompt", "1+1=", "--prompt", "2+2=")
    assert sorted(several.stdout.splitlines()) == ["[0] 2", "[1] 4"]


def test_stop_strings_and_length(command):
    """Catches a stop string that is printed, or that does not end the run; a limit that is off by one."""
    (completion,) = completions(command.run("--prompt", ">7+3=", "--stop", ";13", "--stop", "never", "--json"))
    assert (completion["text"], completion["finish_reason"]) == ("10;10+3=13", "stop")
    (completion,) = completions(command.run("--prompt", ">7+3=", "--max-new-tokens", "5", "--json"))
    assert (len(completion["tokens"]), completion["finish_reason"]) == (5, "length")


def test_chat_uses_the_template(command):
    """Catches --chat that sends the bare prompt, or a second <bos>."""
    (completion,) = completions(command.run("--chat", "--prompt", "27+58", "--json"))
    assert completion["text"] == "85"


def test_sampling_is_in_step_and_seeded(command):
    """Catches ranks that draw for themselves: without a seed they would stop at different steps and hang; and a seed
    that does not fix the draw, or that means something else at another number of ranks."""
    flags = ("--prompt", ">7+3=", "--temperature", "3", "--json", "--dtype", "float32", "--max-new-tokens", "16")
    free = {tuple(completions(command.run("--tp", "3", *flags))[0]["tokens"]) for _ in range(3)}
    assert len(free) > 1
    seeded = {tuple(completions(command.run("--tp", n, "--seed", "7", *flags))[0]["tokens"]) for n in "1235"}
    assert len(seeded) == 1


def test_local_backend(command):
    """Catches ranks as threads that differ from ranks as processes."""
    expected = completions(command.run("--tp", "3", "--prompt", ">7+3=", "--json"))
    assert completions(command.run("--tp", "3", "--prompt", ">7+3=", "--json", "--backend", "local")) == expected


def test_every_flag_has_both_forms(command):
    """Catches `--max_new_tokens` refused, and one of the four names of --tp."""
    for size in (["-tp", "2"], ["--tp_size", "2"], ["--tensor-parallel-size=2"], ["--tensor_parallel_size", "2"]):
        done = command.run(*size, "--max_new_tokens", "3", "--prompt=1+1=", "--json")
        assert json.loads(done.stdout)["report"]["tp_size"] == 2


def test_four_runs_at_once(command):
    """Row N1. Catches a fixed port or file: four runs at the same time."""
    jobs = [command.start("--tp", "2", "--prompt", f"{n}+{n}=", "--json") for n in range(4)]
    assert [completions(command.wait(job))[0]["text"] for job in jobs] == ["0", "2", "4", "6"]


def test_plan_prints_a_table_without_torch():
    """Catches --plan that needs weights, torch or a second."""
    done = without_torch("--plan", "--tp", "3", "--model", "demo:mixtral")
    assert done.returncode == 0, done.stderr
    assert "model.layers.*.mlp.experts.gate_up_proj" in done.stdout and "packed_colwise" in done.stdout
    assert "collectives per layer: 2" in done.stdout


def without_torch(*argv):
    """The command in a process of its own, which fails if torch or transformers was imported."""
    code = f"import sys; from tp_runtime.generate import main; code = main({list(argv)!r})\n"
    code += "assert not {'torch', 'transformers'} & sys.modules.keys()\nsys.exit(code)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)


REJECTED = {
    "no checkpoint": (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
    "unknown demo": (["--model", "demo:gpt"], "demo:llama, demo:mixtral"),
    "tp 0": (["--tp", "0"], "0"),
    "tp negative": (["--tp", "-1"], "-1"),
    "tp above heads": (["--tp", "9"], "tp_size=9 exceeds 8 query heads; choose 1 to 8"),
    "tp no number": (["--tp", "two"], "'two'"),
    "unknown flag": (["--no-such-flag"], "--no-such-flag"),
    "unknown schedule": (["--overlap", "two-shot"], "--overlap"),
    "profile": (["--profile", "trace.json"], "--profile"),
    "verify": (["--verify"], "--verify"),
    "empty prompt": (["--prompt", ""], "empty prompt"),
    "no such file": (["--prompt-file", "/nowhere"], "/nowhere"),
    "temperature": (["--temperature", "-1"], "temperature=-1.0: must be 0 (greedy) or above"),
    "top_p": (["--top-p", "1.5"], "top_p=1.5"),
    "max_new_tokens": (["--max-new-tokens", "0"], "max_new_tokens=0"),
    "dtype": (["--dtype", "int8"], "'int8'"),
    "timeout": (["--timeout", "0"], "timeout_s=0"),
    "cuda": (["--device", "cuda"], "cuda"),
    "nccl": (["--backend", "nccl", "--device", "cpu"], "nccl"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_bad_input_is_one_line_and_exit_2_before_torch(case):
    """Catches a traceback, a silent default, a second line, or a wait for torch before a hopeless run is refused."""
    argv, part = REJECTED[case]
    if case == "cuda" and os.path.exists("/dev/nvidia0"):
        pytest.skip("this machine has a GPU")
    done = without_torch(*argv)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert len(done.stderr.splitlines()) == 1 and part in done.stderr, done.stderr


def test_prompt_longer_than_the_context(command):
    """Catches positions beyond what the model was trained for: silent garbage."""
    done = command.run("--prompt", "1" * 300 + "=")
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "256" in done.stderr and "302" in done.stderr, done.stderr


def test_tp_unlike_world_size(command):
    """Catches a rank count that contradicts torchrun's: half a model, or a hang."""
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    done = command.run("--tp", "3", "--prompt", "1+1=", env=env)
    assert done.returncode == 2 and "--tp 3" in done.stderr and "WORLD_SIZE=2" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def ranks_of(launcher: int) -> list[int]:
    return [int(pid) for pid in open(f"/proc/{launcher}/task/{launcher}/children").read().split()]


def wait_for(condition, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.01)
    return value


@pytest.fixture
def long_run(command):
    """A run that streams for a while, with its two ranks at work."""
    flags = ["--tp", "2", "--prompt", ">0+1=", "--max-new-tokens", "245", "--timeout", "2"]
    job = command.start(*flags, step_s=0.05)  # 12 seconds
    ranks = wait_for(lambda: len(found := ranks_of(job["pid"])) == 2 and found)
    wait_for(lambda: os.path.getsize(job["folder"] + "/out") > 0)
    yield job, ranks
    assert not [pid for pid in ranks if os.path.exists(f"/proc/{pid}")], "ranks are left"


def test_killed_rank(command, long_run):
    """Row R1. Catches a run that waits for a dead rank, or does not say which one it was."""
    job, ranks = long_run
    os.kill(ranks[1], signal.SIGKILL)
    began = time.monotonic()
    done = command.wait(job)
    assert done.returncode == 1 and time.monotonic() - began < 2
    assert "rank 1 was killed by SIGKILL" in done.stderr and len(done.stderr.splitlines()) <= 5, done.stderr


def test_stopped_rank(command, long_run):
    """Row R4. Catches a hang that lasts, or that nobody explains."""
    job, ranks = long_run
    os.kill(ranks[1], signal.SIGSTOP)
    began = time.monotonic()
    done = command.wait(job)
    assert done.returncode == 124 and time.monotonic() - began < 4
    assert "rank 1 lags in decode" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("signum", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_interrupted(command, long_run, signum, code, word):
    """Rows R6, R7. Catches tracebacks of every rank, and ranks that go on."""
    job, _ = long_run
    os.kill(job["pid"], signum)
    began = time.monotonic()
    done = command.wait(job)
    assert done.returncode == code and time.monotonic() - began < 1
    assert done.stderr.splitlines() == [f"tp_runtime: {word}"], done.stderr


def test_killed_launcher(command, long_run):
    """Row R5. Catches orphans."""
    job, ranks = long_run
    os.kill(job["pid"], signal.SIGKILL)
    wait_for(lambda: not [pid for pid in ranks if os.path.exists(f"/proc/{pid}")], 2)
    assert command.wait(job).returncode == -signal.SIGKILL


def test_only_loopback_listens(command, long_run):
    """Row S1. Catches a rendezvous or a data connection that other machines can reach."""
    job, ranks = long_run
    inodes = set()
    for pid in [job["pid"], *ranks]:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    listening = []
    for table in ("tcp", "tcp6"):
        for line in open(f"/proc/{ranks[0]}/net/{table}").read().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                listening.append(fields[1].split(":")[0])
    loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    assert set(listening) <= loopback, listening
    os.kill(job["pid"], signal.SIGTERM)
    command.wait(job)


def test_closed_stdout():
    """Row M3. Catches a traceback, or ranks that run on, when the reader leaves: `... | head -1`."""
    line = f"{sys.executable} -m tp_runtime.generate --prompt '>7+3=' --prompt '1+1=' --max-new-tokens 200 | head -1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stderr, done.stderr

"""The launcher against faults: rows R1 to R9, M3 and N1 of the fault board, with ranks that need no torch.

Every program below runs in a process of its own, so that pytest is neither forked nor signalled. Its output pipes are
inherited by the ranks and by what they start: `communicate` returns only when all of these are gone.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import tp_runtime.launch
from tp_runtime.heartbeat import Heartbeat, HeartbeatPage

PROGRAM = """
import io, json, os, signal, subprocess, sys, time
from pathlib import Path
from tp_runtime import launch as launcher
from tp_runtime.launch import launch

signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever pytest was started under: nohup, a script's "&"
signal.signal(signal.SIGHUP, signal.SIG_DFL)

def block():
    signal.alarm(20)  # the end of an orphan, if a test fails
    while True:
        signal.pause()

def tell(*words):  # one write: the ranks share the pipe
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def pipe(env, source, target, mode):  # as between two ranks of a process group: it ends when the source dies
    path = Path(env.store_path).with_name(f"{source}-{target}")
    try:
        os.mkfifo(path)
    except FileExistsError:
        pass
    return open(path, mode)

def connect(env, to):
    return pipe(env, env.rank, to, "w")

def wait_for_end_of(env, source):
    pipe(env, source, env.rank, "r").read()
"""


@pytest.fixture
def start(tmp_path):
    """Starts a program; its temporary folders lie in `tmp_path / "tmp"`."""
    (tmp_path / "tmp").mkdir()
    package = Path(tp_runtime.launch.__file__).parents[1]
    unset = ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "PYTORCH_NVML_BASED_CUDA_CHECK", "PYTHONUNBUFFERED")
    environ = {name: value for name, value in os.environ.items() if name not in unset}
    environ |= {"TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(package)}
    started = []

    def start(body: str, end: str = "sys.exit(launch(main, 3, timeout_s=30))", **popen) -> subprocess.Popen:
        script = tmp_path / f"program{len(started)}.py"
        script.write_text(f"{PROGRAM}\n{body}\n{end}\n")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, script], env=environ, **pipes, **popen)
        watchdog = threading.Timer(15, process.kill)  # the ranks die with it: no read below waits for ever
        watchdog.start()
        started.append((process, watchdog))
        return process

    yield start
    for process, watchdog in started:
        watchdog.cancel()
        with process:  # closes the pipes and waits
            process.kill()


@pytest.fixture
def finish(tmp_path):
    """Waits until a program and all of its ranks have ended, which leave no folder behind."""

    def finish(process: subprocess.Popen, within_s: float = 5.0) -> SimpleNamespace:
        out, err = process.communicate(timeout=within_s)
        assert list((tmp_path / "tmp").iterdir()) == []
        ours = [line.removeprefix("tp_runtime: ") for line in err.splitlines() if line.startswith("tp_runtime: ")]
        assert len(ours) <= 5
        return SimpleNamespace(code=process.returncode, out=out, err=err, ours=ours)

    return finish


def ready(process: subprocess.Popen, ranks: int = 3) -> dict[int, int]:
    """Process id by rank, when every rank has said `tell(env.rank, os.getpid())`."""
    return dict(tuple(map(int, process.stdout.readline().split())) for _ in range(ranks))


def test_success_leaves_the_process_as_it_was(start, finish):
    """Catches handlers, descriptors or children left behind, buffered text printed by every rank, repeated imports."""
    body = """
def preload():
    tell("preload")

def main(env):
    env.heartbeat.beat("decode", 1)
    mode = Path(env.store_path).parent.stat().st_mode & 0o777
    print("rank", env.rank, env.world_size, env.local_rank, env.local_world_size, mode)
"""
    end = """
def state():
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
    wakeup_fd = signal.set_wakeup_fd(-1)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return [signal.getsignal(s) for s in signals], wakeup_fd, blocked, os.listdir("/proc/self/fd")

print("before")
at_first = state()
code = launch(main, 3, timeout_s=30, preload=preload)
assert state() == at_first
try:
    os.waitpid(-1, 0)
except ChildProcessError:
    print("no child; torch imported:", "torch" in sys.modules)
sys.exit(code)
"""
    done = finish(start(body, end))
    assert (done.code, done.err) == (0, "")
    preload, *lines, last = done.out.splitlines()
    assert preload == "preload"
    assert last == "no child; torch imported: False"
    assert sorted(lines) == ["before"] + [f"rank {rank} 3 {rank} 3 {0o700}" for rank in range(3)]


def test_libraries_are_told_cores_and_loopback_unless_the_user_did(start, finish):
    """Catches settings that come after the imports, and settings of the user that are overwritten."""
    body = """
names = "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "PYTORCH_NVML_BASED_CUDA_CHECK"
os.environ["NCCL_SOCKET_IFNAME"] = "mine"
def preload():
    tell(*(os.environ[name] for name in names))
"""
    done = finish(start(body, "launch(lambda env: None, 2, timeout_s=30, preload=preload)"))
    assert done.out.split() == [str(max(1, len(os.sched_getaffinity(0)) // 2)), "lo", "mine", "1"]


def test_r1_killed_rank_is_named(start, finish):
    """Catches ranks that outlive a killed peer, and a message without rank, signal, phase or step."""
    body = """
def main(env):
    os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C is the launcher's
    env.heartbeat.beat("decode", 57)
    tell(env.rank, os.getpid())
    block()
"""
    process = start(body)
    os.kill(ready(process)[1], signal.SIGKILL)
    done = finish(process, within_s=2)
    assert done.code == 1
    assert done.err.splitlines() == [f"tp_runtime: {line}" for line in done.ours]
    assert done.ours == ["rank 1 was killed by SIGKILL (possibly out of memory) in decode, step 57, no collective yet"]


def test_r2_random_kills(start, tmp_path):
    """Catches a hang, or the wrong rank blamed, for any signal in any phase, also with peers that ignore SIGTERM."""
    draw = random.Random(2)
    names = ("SIGABRT", "SIGSEGV", "SIGKILL", "SIGTERM")
    phases = ("before the session", "start", "load", "decode", "idle", "after main")
    kills = [(draw.randrange(3), draw.choice(names), draw.choice(phases), draw.random() < 0.2) for _ in range(50)]
    body = """
def main_of(victim, name, phase, stubborn):
    def main(env):
        def at(here):
            if env.rank == victim and here == phase:
                os.kill(os.getpid(), getattr(signal, name))
        if stubborn and env.rank != victim:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        at("start")
        env.heartbeat.enter("rendezvous")
        for here in ("load", "decode", "idle"):
            env.heartbeat.beat(here)
            at(here)
        if env.rank == victim and phase == "after main":
            sys.stdout = type("Stream", (), {"flush": lambda self: at("after main")})()
        else:
            block()
    return main

def fork_killed(victim, name, fork=os.fork):
    pids = []
    def fork_one():
        pid = fork()
        pids.append(pid)
        if pid and len(pids) == victim + 1:
            os.kill(pid, getattr(signal, name))
        return pid
    return fork_one
"""
    end = """
fork = os.fork
for victim, name, phase, stubborn in kills:
    os.fork = fork_killed(victim, name) if phase == "before the session" else fork
    began, messages = time.monotonic(), io.StringIO()
    code = launch(main_of(victim, name, phase, stubborn), 3, timeout_s=30, stderr=messages)
    print(json.dumps([code, time.monotonic() - began, messages.getvalue()]), flush=True)
"""
    programs = [(kills[i::5], start(f"{body}\nkills = {kills[i::5]}", end)) for i in range(5)]
    for part, process in programs:
        out, err = process.communicate(timeout=15)
        assert (process.returncode, err) == (0, "")
        for (victim, name, *rest), line in zip(part, out.splitlines(), strict=True):
            code, seconds, messages = json.loads(line)
            assert code == 1 and seconds < 2, (victim, name, *rest)
            assert f"rank {victim} was killed by {name}" in messages, (victim, name, *rest)
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("peers_come", ["later", "earlier"])
def test_r3_own_error_is_shown_and_not_its_echo(start, finish, peers_come):
    """Catches a peer's "connection closed" shown in place of, or beside, the error behind it, whichever comes first."""
    body = f"""
earlier = {peers_come == "earlier"}
launcher._GRACE_S *= 5  # a busy machine
def main(env):
    env.heartbeat.beat("decode", 3)
    if env.rank == 1:
        kept = [] if earlier else [connect(env, 0), connect(env, 2)]
        if earlier:
            wait_for_end_of(env, 0)
        raise ValueError("the own error")
    if not earlier:
        wait_for_end_of(env, 1)
    elif env.rank == 0:
        kept = connect(env, 1)
    else:
        block()
    raise RuntimeError("Connection closed by peer [127.0.0.1]")
"""
    done = finish(start(body), within_s=3)
    assert done.code == 1
    assert done.err.count("Traceback") == 1 and "closed by peer" not in done.err and "be_rank" not in done.err
    assert "ValueError: the own error" in done.err
    assert done.ours == ["rank 1 failed in decode, step 3, no collective yet"]


def test_echo_alone_is_shown_with_the_rank_that_had_finished(start, finish):
    """Catches an error dropped as a consequence where there is no cause to show."""
    body = """
def main(env):
    if env.rank == 1:
        kept = connect(env, 0)
    else:
        wait_for_end_of(env, 1)
        raise RuntimeError("Connection closed by peer [127.0.0.1]")
"""
    done = finish(start(body, "sys.exit(launch(main, 2, timeout_s=30))"))
    assert done.code == 1 and "Connection closed by peer" in done.err
    assert done.ours[-1] == "finished before that: rank 1"


@pytest.mark.parametrize("how", ["stopped", "stuck"])
def test_r4_hang_names_rank_step_and_collective(start, finish, how):
    """Catches a hang that is not noticed, blamed on a rank that only waits, or shown without its stack."""
    body = f"""
def stand_still():
    os.kill(os.getpid(), signal.SIGSTOP) if {how == "stopped"} else block()

def main(env):
    for step in range(8):
        env.heartbeat.beat("decode", step)
        if env.rank == 1 and step == 7:
            stand_still()
        env.heartbeat.enter("all_reduce")
    tell(env.rank, os.getpid())
    block()
"""
    process = start(body, "sys.exit(launch(main, 3, timeout_s=0.5))")
    ready(process, 2)
    done = finish(process, within_s=2.5)
    assert done.code == 124
    where = "rank 1 lags in decode, step 7, last collective all_reduce number 7"
    assert done.ours == [f"no progress for 0.5 s: {where}" + ", its process stopped" * (how == "stopped")]
    assert "in stand_still" in done.err and "be_rank" not in done.err


def test_waiting_for_a_request_is_no_hang(start, finish):
    """Catches an idle rank taken for a hung one, and one that is not watched any more after its pause."""
    body = """
def main(env):
    env.heartbeat.beat("idle")
    time.sleep(0.6)
    env.heartbeat.beat("decode")
    if env.rank == 0:
        block()
"""
    done = finish(start(body, "sys.exit(launch(main, 2, timeout_s=0.3))"))
    assert done.code == 124
    assert done.ours == ["no progress for 0.3 s: rank 0 lags in decode, step 0, no collective yet"]


def test_r5_ranks_die_with_the_launcher(start):
    """Catches orphans: also a rank that ignores SIGTERM, and one that is stopped."""
    body = """
def main(env):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    tell(env.rank, os.getpid())
    if env.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    block()
"""
    process = start(body)
    ready(process)
    process.kill()
    process.communicate(timeout=2)


def test_r5_launcher_dies_while_it_forks(start):
    """Catches an orphan whose launcher was dead before the rank could ask the kernel to be told."""
    body = """
real_setsid, first = os.setsid, os.getpid()
def setsid():
    real_setsid()
    os.kill(first, signal.SIGKILL)
    while os.getppid() == first:
        time.sleep(0.001)
os.setsid = setsid

def main(env):
    tell("orphan")
    block()
"""
    out, _ = start(body, "launch(main, 1, timeout_s=30)").communicate(timeout=2)
    assert out == ""


@pytest.mark.parametrize(
    ("signum", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "terminated")],
)
@pytest.mark.parametrize("when", ["importing", "running"])
def test_r6_r7_signals(start, finish, when, signum, code, word):
    """Catches wrong exit codes, tracebacks of KeyboardInterrupt, and imports that swallow an interrupt."""
    body = """
def preload():
    tell("importing")
    while importing:
        try:
            block()
        except BaseException:
            pass

def main(env):
    tell("running")
    block()
"""
    end = f"importing = {when == 'importing'}\nsys.exit(launch(main, 3, timeout_s=30, preload=preload))"
    process = start(body, end, start_new_session=True)
    while process.stdout.readline().strip() != when:
        pass
    os.killpg(process.pid, signum)  # as a terminal does: to everybody who is still in its group
    done = finish(process, within_s=1)
    assert (done.code, done.err) == (code, f"tp_runtime: {word}\n")


def test_nohup(start, finish):
    """Catches a run that was told to outlive its terminal, and does not."""
    body = """
signal.signal(signal.SIGHUP, signal.SIG_IGN)
def main(env):
    os.kill(os.getppid(), signal.SIGHUP)
"""
    assert finish(start(body)).code == 0


def test_r6_second_interrupt_kills_at_once(start, finish):
    """Catches a second Ctrl-C that is lost while the ranks are given time to end."""
    body = """
launcher._TERM_S = 60
def main(env):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    tell(env.rank, os.getpid())
    block()
"""
    process = start(body)
    ready(process)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "tp_runtime: interrupted\n"
    process.send_signal(signal.SIGINT)
    done = finish(process, within_s=1)
    assert (done.code, done.err) == (130, "")


def test_r7_stopped_rank_ends_at_once(start, finish):
    """Catches SIGTERM that a stopped process never gets to see."""
    body = """
launcher._TERM_S = 60
def main(env):
    tell(env.rank, os.getpid())
    os.kill(os.getpid(), signal.SIGSTOP)
"""
    process = start(body)
    ready(process)
    process.terminate()
    assert finish(process, within_s=1).code == 143


def test_r7_sigterm_that_reaches_the_ranks_first(start, finish):
    """Catches a job that was cancelled as a whole reported as a failure of the rank that died first."""
    body = """
launcher._GRACE_S *= 50  # a busy machine; it is not waited for
def main(env):
    if env.rank == 1:
        kept = connect(env, 0)
        os.kill(os.getpid(), signal.SIGTERM)
    wait_for_end_of(env, 1)
    os.kill(os.getppid(), signal.SIGTERM)
"""
    done = finish(start(body, "sys.exit(launch(main, 2, timeout_s=30))"))
    assert (done.code, done.ours) == (143, ["terminated"])


def test_r8_rank_that_dies_before_it_joins(start, finish):
    """Catches peers that wait for a rank which will never come."""
    body = """
def main(env):
    if env.rank == 2:
        os._exit(3)
    env.heartbeat.enter("rendezvous")
    tell(env.rank, os.getpid())
    block()
"""
    process = start(body)
    done = finish(process, within_s=2)
    assert done.code == 1
    assert done.ours[0].startswith("rank 2 exited with code 3 in start, step 0, no collective yet; ")


def test_r9_rank_that_never_joins(start, finish):
    """Catches the short step timeout used for joining, and a message without the count and the missing rank."""
    body = """
def main(env):
    if env.rank == 1:
        block()
    env.heartbeat.enter("rendezvous")
    block()
"""
    began = time.monotonic()
    done = finish(start(body, "sys.exit(launch(main, 3, timeout_s=0.1, startup_timeout_s=0.6))"), within_s=2.6)
    assert time.monotonic() - began > 0.6
    assert done.code == 124
    assert done.ours == ["no progress for 0.6 s: rank 1 lags in start, step 0, no collective yet; 2 of 3 ranks joined"]


def test_m3_reader_of_stdout_leaves(start, finish):
    """Catches a BrokenPipeError shown to a user of `| head -1`, or taken for a failure."""
    body = """
def main(env):
    while env.rank == 0:
        print("token", flush=True)
    block()
"""
    process = start(body)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0


def test_broken_pipe_that_is_not_stdout_is_an_error(start, finish):
    """Catches a real failure silenced because it looks like a closed stdout."""
    body = """
def main(env):
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    os.write(write_fd, b"x")
"""
    done = finish(start(body, "sys.exit(launch(main, 1, timeout_s=30))"))
    assert done.code == 1 and "BrokenPipeError" in done.err


def test_n1_four_launches_at_once(start, finish):
    """Catches names or ports that two runs share."""
    body = """
def main(env):
    with open(env.store_path, "a") as store:
        store.write("x")
    if env.rank == 0:
        tell(env.store_path)
        sys.stdin.read()
"""
    processes = [start(body, stdin=subprocess.PIPE) for _ in range(4)]
    stores = {process.stdout.readline() for process in processes}
    assert len(stores) == 4
    for process in processes:
        process.stdin.close()
        process.stdin = None
        assert process.wait(timeout=5) == 0
    assert [finish(process).err for process in processes] == [""] * 4


@pytest.mark.parametrize(
    ("argument", "code", "err"),
    [("7", 7, ""), ("0", 0, ""), ("None", 0, ""), ("'prompts differ'", 1, "tp_runtime: rank 0: prompts differ\n")],
)
def test_system_exit(start, finish, argument, code, err):
    """Catches a rank's own exit code replaced, or its message buried in a traceback."""
    done = finish(start(f"def main(env): sys.exit({argument})", "sys.exit(launch(main, 1, timeout_s=30))"))
    assert (done.code, done.err) == (code, err)


def test_what_a_rank_printed_before_it_failed_is_not_lost(start, finish):
    """Catches os._exit throwing away text that is still in the buffer."""
    body = """
def main(env):
    print("token")
    raise ValueError("no")
"""
    done = finish(start(body, "sys.exit(launch(main, 1, timeout_s=30))"))
    assert (done.code, done.out) == (1, "token\n")


def test_what_a_rank_started_ends_with_it(start, finish):
    """Catches compilers and other children of a rank left running, also when the rank ended well."""
    body = """
def main(env):
    subprocess.Popen(["sleep", "60"])
"""
    assert finish(start(body), within_s=3).code == 0


def test_end_of_the_owner_stops_the_ranks(start, finish):
    """Catches ranks that outlive the notebook which started them, and a request on the pipe taken for its end."""
    read_fd, write_fd = os.pipe()
    body = """
def main(env):
    tell(env.rank, os.getpid())
    block()
"""
    process = start(body, f"sys.exit(launch(main, 3, timeout_s=30, parent_fd={read_fd}))", pass_fds=[read_fd])
    os.close(read_fd)
    os.write(write_fd, b"request")
    ready(process)
    assert process.poll() is None
    os.close(write_fd)
    done = finish(process, within_s=1)
    assert (done.code, done.err) == (0, "")


def test_error_of_preload_is_the_callers(start, finish):
    """Catches an import error swallowed, or handlers that stay installed after it."""
    end = """
try:
    launch(block, 2, timeout_s=30, preload=lambda: 1 / 0)
except ZeroDivisionError:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    print("raised")
"""
    assert finish(start("", end)).out == "raised\n"


@pytest.mark.parametrize(("tp_size", "timeout_s"), [(0, 1.0), (2, 0.0), (2, float("nan"))])
def test_sizes_and_timeouts_are_positive(tp_size, timeout_s):
    """Catches a run that could only hang, or end at once."""
    with pytest.raises(ValueError, match=f"tp_size={tp_size} timeout_s={timeout_s}"):
        tp_runtime.launch.launch(print, tp_size, timeout_s=timeout_s)


@pytest.fixture
def torchrun(monkeypatch):
    def set_environment(**variables: str) -> None:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_environment


def test_joined(torchrun):
    """Catches local and global rank mixed up, and a lone variable taken for torchrun."""
    torchrun(RANK="1")
    assert tp_runtime.launch.joined(30) is None
    torchrun(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4")
    env = tp_runtime.launch.joined(30)
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size) == (5, 8, 1, 4)
    assert (env.store_path, env.timeout_s) == (None, 30)
    env.heartbeat.beat("decode", 1)
    torchrun(RANK="1", WORLD_SIZE="2")
    env = tp_runtime.launch.joined(30)
    assert (env.local_rank, env.local_world_size) == (1, 2)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one'"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE=''"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 WORLD_SIZE=2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1"),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK=3 LOCAL_WORLD_SIZE=2"),
    ],
)
def test_joined_refuses_what_is_malformed(torchrun, variables, message):
    """Catches a rank that waits for ever for ranks that cannot exist."""
    torchrun(**variables)
    with pytest.raises(ValueError, match=message):
        tp_runtime.launch.joined(30)


def test_heartbeat_page():
    """Catches slots that overlap, long names that spill over, and a suspended launcher that sees a hang."""
    page = HeartbeatPage(3, now=100.0)
    page.heartbeats[1].beat("a phase with a long name", 2**40)
    page.heartbeats[1].enter("a collective with a very long name")
    page.look(100.5)
    assert page.beats[1] == (3, 2**40, 1, "a phase with a l", "a collective with a very")
    assert [str(page.beats[rank]) for rank in (0, 2)] == ["start, step 0, no collective yet"] * 2
    assert page.still_s == [0.5, 0.0, 0.5]
    assert [beat.joined for beat in page.beats] == [False, True, False]
    page.heartbeats[0].beat("idle")
    page.look(4000.0)
    assert page.still_s == [0.0, 1.0, 1.5]
    assert [beat.resting for beat in page.beats] == [True, False, False]
    Heartbeat.unwatched().beat("idle")

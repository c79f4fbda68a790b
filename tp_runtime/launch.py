"""Start the ranks of one machine and see them through to their end, or join the ranks that torchrun started.

    launcher   preload, fork x n ---- watch -------------------------- stop ---- say why ---- exit code
    rank 0                   main ... all_reduce, beat, beat, beat ...
    rank 1                   main ... all_reduce, beat, X                         X: raises, is killed, or stops moving

The launcher has one thread, imports what the ranks need once (`preload`: seconds) and forks them (milliseconds). It
waits for three things: a signal, among them SIGCHLD; the end of its own owner; and a heartbeat that stands still.
Whatever happens, `launch` returns with every rank gone and with one exit code:

    0                everything went well, or the reader of our output left (`| head -1`)
    1                a rank failed: the first one's own error is shown, and not what it did to its peers
    124              a rank made no progress: named, with its Python stack
    130, 143, 129    SIGINT, SIGTERM, SIGHUP
    other            the code of a rank's own SystemExit
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from .failure import STDOUT_CLOSED, Exit, failure_of, last_stack
from .heartbeat import START, HeartbeatPage
from .rank import RankEnv, be_rank, flush_output, joined

__all__ = ["RankEnv", "joined", "launch"]

_LOOK_EVERY_S = 0.2  # at the heartbeats
_GRACE_S = 0.2  # from the first bad exit until the others are stopped: the cause may be a rank that takes longer to die
_TERM_S = 0.5  # from SIGTERM to SIGKILL
_STACK_S = 0.5  # for a rank to write its Python stack
_BURIAL_S = 10.0  # for a killed rank to be gone: the driver may still have to free its device memory
_STARTUP_S = 120.0  # least default for joining: the devices and the process group are made in this time


def launch(
    main: Callable[[RankEnv], object],
    tp_size: int,
    *,
    timeout_s: float,
    startup_timeout_s: float | None = None,
    preload: Callable[[], object] | None = None,
    stderr: TextIO | None = None,
    parent_fd: int | None = None,
) -> int:
    """Runs `main(env)` in `tp_size` processes and returns the exit code of the whole (the table above).

    Call it from the main thread of a process without other threads. The ranks are forked: `main` may be a closure, and
    begins with everything that `preload` imported. They end without running `atexit` functions. A signal that arrives
    while `preload` runs ends this process on the spot. Where nothing else is left to do, leave with
    `os._exit(launch(...))`: an interpreter that has imported torch takes a second to shut down.

    Args:
        main: what a rank does. It may raise; `SystemExit(code)` sets the exit code, `SystemExit(text)` shows the text
            in place of a traceback.
        timeout_s: the longest time without a heartbeat, in seconds, unless the rank is "idle" or "done".
        startup_timeout_s: the same until a rank reports a phase other than "start"; by default `timeout_s`, but at
            least two minutes.
        preload: imports what the ranks need. It may ask how many GPUs there are, but must not touch one.
        stderr: where the messages go; by default `sys.stderr`.
        parent_fd: the read end of a pipe whose write end the owner of this process holds: when that is closed, the
            ranks are stopped without a word. Nothing is read from it.

    Raises:
        ValueError: a size or a timeout that is not positive.
        Exception: whatever `preload` raises.
    """
    startup_timeout_s = max(timeout_s, _STARTUP_S) if startup_timeout_s is None else startup_timeout_s
    if tp_size < 1 or not timeout_s > 0 or not startup_timeout_s > 0:
        raise ValueError(f"{tp_size=} {timeout_s=} {startup_timeout_s=}: all of them must be positive")
    say = _Voice(sys.stderr if stderr is None else stderr)
    _set_environment(tp_size)
    with _Events(parent_fd) as events:
        if preload is not None:
            # Importing, there is nothing to tidy up yet, and an exception may well be swallowed by what is imported.
            with events.answered_by(lambda signum: os._exit(_interrupted(signum, say))), _without_collection():
                preload()
        with tempfile.TemporaryDirectory(prefix="tp_runtime-", ignore_cleanup_errors=True) as folder:  # mode 0700
            ranks = _Ranks(tp_size, Path(folder), events)
            try:
                ranks.start(main, timeout_s)
                return _watch(ranks, events, timeout_s, startup_timeout_s, say)
            finally:
                ranks.stop()


def _set_environment(tp_size: int) -> None:
    """What libraries read when `preload` imports them; what the user has set stays."""
    defaults = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // tp_size)),
        # `torch.cuda.is_available()` then asks the driver's management library. Asking CUDA itself would initialise it
        # here, and it works in no process that is forked from one where it is initialised.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        # All ranks are on this machine: nothing listens on an address that others can reach.
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """No garbage collection: while 2500 modules are imported it finds nothing, and takes 0.5 of 2.3 seconds. Nor is
    what is there afterwards looked at: the first full collection would take 0.3 seconds, before a rank is forked."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


class _Events:
    """Signals, the death of a rank (SIGCHLD) and the end of the owner, as something to wait for.

    On leaving, the handlers and the wakeup descriptor are again what they were on entering.
    """

    def __init__(self, parent_fd: int | None):
        self.received: list[int] = []  # signals that ask us to stop, in their order
        self.owner_gone = False
        self._answer: Callable[[int], object] = self.received.append
        self._parent_fd = parent_fd

    def __enter__(self) -> _Events:
        self._poll = select.poll()
        if self._parent_fd is not None:
            os.fstat(self._parent_fd)  # OSError for what is no descriptor
            self._poll.register(self._parent_fd, 0)  # only its end is reported
        self._read_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poll.register(self._read_fd, select.POLLIN)
        self._wakeup_fd_before = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        watched = [signal.SIGCHLD, signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            watched.append(signal.SIGHUP)
        self._handlers_before = {signum: signal.signal(signum, self._handle) for signum in watched}
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._handlers_before.items():
            signal.signal(signum, handler or signal.SIG_DFL)  # None: a handler that was not set from Python
        signal.set_wakeup_fd(self._wakeup_fd_before)
        os.close(self._read_fd)
        os.close(self._write_fd)

    def _handle(self, signum: int, frame: object) -> None:
        if signum != signal.SIGCHLD:
            self._answer(signum)

    @contextlib.contextmanager
    def answered_by(self, answer: Callable[[int], object]) -> Iterator[None]:
        """Signals that ask us to stop get this answer at once, in place of being noted in `received`."""
        self._answer = answer
        try:
            yield
        finally:
            self._answer = self.received.append

    def wait(self, timeout_s: float) -> None:
        """Returns after `timeout_s` or, sooner, when anything has happened."""
        for fd, _ in self._poll.poll(math.ceil(max(0.0, timeout_s) * 1000)):
            if fd == self._read_fd:
                os.read(fd, 4096)  # it has woken us; the handlers and `sweep` know the rest
            else:
                self.owner_gone = True
                self._poll.unregister(fd)


class _Ranks:
    """The forked processes: their ids, their heartbeats, and how each of them ended."""

    def __init__(self, size: int, folder: Path, events: _Events):
        self.size = size
        self.folder = folder
        self.page = HeartbeatPage(size, time.monotonic())
        self.exits: dict[int, Exit] = {}
        self._pids: list[int] = []
        self._events = events
        self._stopped_at = math.inf

    def start(self, main: Callable[[RankEnv], object], timeout_s: float) -> None:
        flush_output()  # or every rank would write once more what is still in the buffers
        launcher, store_path = os.getpid(), str(self.folder / "store")
        # Until a new process has handlers of its own, a signal must not reach it: it would write to our wakeup pipe.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            for rank, heartbeat in enumerate(self.page.heartbeats):
                env = RankEnv(rank, self.size, rank, self.size, store_path, timeout_s, heartbeat)
                pid = os.fork()
                if pid == 0:
                    be_rank(main, env, self.folder, launcher, mask)
                self._pids.append(pid)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    @property
    def alive(self) -> list[int]:
        return [rank for rank in range(len(self._pids)) if rank not in self.exits]

    def sweep(self) -> None:
        """Notes which ranks have ended. They stay zombies until `stop`, so that no process id is reused under us."""
        for rank in self.alive:
            status = os.waitid(os.P_PID, self._pids[rank], os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if status is not None:
                now = time.monotonic()
                by_signal = status.si_code != os.CLD_EXITED
                by_us = by_signal and now >= self._stopped_at and status.si_status in (signal.SIGTERM, signal.SIGKILL)
                self.exits[rank] = Exit(now, status.si_status, by_signal, by_us)

    def stop(self) -> None:
        """Ends and buries every rank and whatever it started: SIGTERM; SIGKILL after 0.5 s or at a second Ctrl-C."""
        self.sweep()
        self._stopped_at = time.monotonic()
        self._send(signal.SIGTERM, signal.SIGCONT)  # a stopped process takes SIGTERM when it is continued
        self._wait_for_all(_TERM_S, lambda: len(self._events.received) > 1)
        self._send(signal.SIGKILL)
        self._wait_for_all(_BURIAL_S)
        self.page.look(time.monotonic())
        for rank, pid in enumerate(self._pids):
            if rank in self.exits:
                os.waitpid(pid, 0)
        self._pids.clear()

    def is_stopped(self, rank: int) -> bool:
        """Whether the process was halted by a signal or a debugger, as its state in /proc says."""
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{self._pids[rank]}/stat").read_text()
            return stat.rpartition(")")[2].split()[0] in "Tt"
        return False

    def stack(self, rank: int) -> str:
        """The Python stack of a living rank; empty if it does not answer."""
        for signum in (signal.SIGUSR1, signal.SIGCONT):
            os.kill(self._pids[rank], signum)
        before, deadline = "", time.monotonic() + _STACK_S
        while time.monotonic() < deadline:
            time.sleep(0.02)
            text = last_stack(rank, self.folder)
            if text and text == before:  # it has stopped growing
                break
            before = text
        return before

    def _send(self, *signals: int) -> None:
        for pid in self._pids:
            for signum in signals:
                try:
                    os.killpg(pid, signum)
                except ProcessLookupError:  # it has not made its session yet
                    os.kill(pid, signum)

    def _wait_for_all(self, timeout_s: float, hurry: Callable[[], bool] = lambda: False) -> None:
        deadline = time.monotonic() + timeout_s
        while self.alive and time.monotonic() < deadline and not hurry():
            self._events.wait(deadline - time.monotonic())
            self.sweep()


def _watch(ranks: _Ranks, events: _Events, timeout_s: float, startup_timeout_s: float, say: _Voice) -> int:
    """Waits for the end of all ranks, or for the first reason to stop them; returns the exit code."""
    give_up_at = math.inf
    while True:
        ranks.sweep()
        now = time.monotonic()
        if events.received:
            return _interrupted(events.received[0], say)
        if events.owner_gone:
            return 0
        if any(end.failed for end in ranks.exits.values()):
            # Even when all are dead: a SIGTERM that was meant for all of us may reach the launcher last.
            give_up_at = min(give_up_at, now + _GRACE_S)
            if now >= give_up_at:
                ranks.stop()
                return _failed(ranks, say)
        elif not ranks.alive:
            return 0
        else:
            ranks.page.look(now)
            for rank in ranks.alive:
                beat = ranks.page.beats[rank]
                limit_s = startup_timeout_s if beat.phase == START else timeout_s
                if ranks.page.still_s[rank] >= limit_s and not beat.resting:
                    return _hung(ranks, limit_s, say)
        events.wait(min(_LOOK_EVERY_S, give_up_at - now))


def _interrupted(signum: int, say: _Voice) -> int:
    say("interrupted" if signum == signal.SIGINT else "terminated")
    return 128 + signum


def _hung(ranks: _Ranks, limit_s: float, say: _Voice) -> int:
    """Names the rank that the others wait for, with its Python stack."""
    beats = ranks.page.beats
    suspects = [rank for rank in ranks.alive if not beats[rank].resting]
    stopped = {rank for rank in suspects if ranks.is_stopped(rank)}  # SIGSTOP: then the counts may well be equal
    lagging = min(suspects, key=lambda rank: (rank not in stopped, beats[rank].collectives, beats[rank].beats))
    why = ", its process stopped" if lagging in stopped else ""
    say(f"no progress for {limit_s:g} s: rank {lagging} lags in {_place(ranks, lagging)}{why}")
    stack = ranks.stack(lagging)
    ranks.stop()
    if stack:
        say.verbatim(stack)
    else:
        say(f"rank {lagging} did not answer when asked for its stack")
    return 124


def _place(ranks: _Ranks, rank: int) -> str:
    beat = ranks.page.beats[rank]
    joined_count = sum(beat.joined for beat in ranks.page.beats)
    return f"{beat}" + (f"; {joined_count} of {ranks.size} ranks joined" if beat.phase == START else "")


def _failed(ranks: _Ranks, say: _Voice) -> int:
    """Shows the first failure that is not the consequence of another; returns its exit code."""
    failures = [failure_of(rank, end, _place(ranks, rank), ranks.folder) for rank, end in ranks.exits.items()]
    first = min(filter(None, failures), key=lambda failure: (failure.consequence, failure.time))
    if first.code == STDOUT_CLOSED:
        return 0
    say.verbatim(first.detail)
    if first.line:
        say(first.line)
    finished = [str(rank) for rank, end in sorted(ranks.exits.items()) if end.status == 0]
    if first.consequence and finished:
        say(f"finished before that: rank {', '.join(finished)}")
    return first.code


class _Voice:
    """Messages to the user; a stream that is closed stays silent."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __call__(self, line: str) -> None:
        self.verbatim(f"tp_runtime: {line}\n")

    def verbatim(self, text: str) -> None:
        # RuntimeError: called by a signal handler in the middle of another write.
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            self._stream.write(text)
            self._stream.flush()

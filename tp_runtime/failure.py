"""How a rank says why it failed, and how the launcher reads it."""

from __future__ import annotations

import json
import re
import select
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

STDOUT_CLOSED = 128 + signal.SIGPIPE  # exit code of a rank whose reader has left

# What the peers of a failed rank say.
_CONSEQUENCE = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|by (remote )?peer|socket (closed|timeout)"
    r"|pair closure|failed to (recv|send)|remote process exited|remoteerror|(communicator|process ?group) was aborted"
    r"|watchdog|timed out|wait timeout",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class LastWords:
    """A rank's error.

    Attributes:
        time: when it was raised: monotonic, seconds, one clock for all processes of the machine.
        code: exit code of the rank.
        message: type and text of the exception; for `SystemExit(text)` the text, for `SystemExit(number)` empty.
        traceback: from `main` on; empty for `SystemExit`.
    """

    time: float
    code: int
    message: str
    traceback: str


def leave_words(error: BaseException, rank: int, folder: Path) -> int:
    """Writes this rank's error where the launcher finds it; returns the exit code."""
    now = time.monotonic()
    if isinstance(error, SystemExit):
        code = error.code & 0xFF if isinstance(error.code, int) else int(error.code is not None)
        words = LastWords(now, code, "" if isinstance(error.code, int) else str(error.code), "")
    else:
        code = STDOUT_CLOSED if isinstance(error, BrokenPipeError) and _stdout_has_no_reader() else 1
        message = "".join(traceback.format_exception_only(error)).strip()
        from_main_on = error.__traceback__ and error.__traceback__.tb_next
        trace = traceback.format_exception(type(error), error, from_main_on)
        words = LastWords(now, code, message, "".join(trace))
    if code != 0:
        path, unfinished = folder / f"error.{rank}", folder / f"error.{rank}.unfinished"
        try:
            unfinished.write_text(json.dumps(asdict(words)))
            unfinished.replace(path)
        except OSError:  # a full disk; then in the rank's own voice
            print(words.traceback or words.message, file=sys.stderr)
    return code


def _stdout_has_no_reader() -> bool:
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _last_words(rank: int, folder: Path) -> LastWords | None:
    """What the rank said when it failed, if it could."""
    try:
        return LastWords(**json.loads((folder / f"error.{rank}").read_text()))
    except FileNotFoundError:
        return None


def stack_path(rank: int, folder: Path) -> Path:
    """Where the rank writes its Python stack at a fatal signal, or at SIGUSR1."""
    return folder / f"stack.{rank}"


def last_stack(rank: int, folder: Path) -> str:
    """The Python stack that the rank wrote, from `main` on; empty if it did not."""
    try:
        text = stack_path(rank, folder).read_text(errors="replace")
    except FileNotFoundError:
        return ""
    text = re.sub(r"\nExtension modules: .*\n", "", text)
    return re.sub(r"  File .* in be_rank\n(  File .*\n)*", "", text)  # what follows is the launcher's


@dataclass(frozen=True)
class Exit:
    """How a rank ended: `status` is its exit code, or the signal that killed it."""

    time: float  # when it was noticed; monotonic, seconds
    status: int
    by_signal: bool
    by_us: bool

    @property
    def failed(self) -> bool:
        return self.status != 0 and not self.by_us


@dataclass(frozen=True)
class Failure:
    """One rank's failure, as it will be shown if it was the first."""

    time: float  # monotonic, seconds
    code: int  # what the command exits with
    consequence: bool  # of another rank's failure
    line: str  # what happened to the rank; empty if it has said so itself
    detail: str = ""  # traceback or stack


def failure_of(rank: int, end: Exit, place: str, folder: Path) -> Failure | None:
    """How the rank failed, `place` being where it was; None if it did not fail, or if the launcher ended it."""
    words = _last_words(rank, folder)
    if words:
        consequence = words.code == 1 and bool(_CONSEQUENCE.search(words.message))
        line = words.message and f"rank {rank}: {words.message}"
        if words.traceback:
            line = f"rank {rank} failed in {place}"
        return Failure(words.time, words.code, consequence, line, words.traceback)
    if not end.failed:
        return None
    if not end.by_signal:
        return Failure(end.time, 1, False, f"rank {rank} exited with code {end.status} in {place}")
    name = signal.Signals(end.status).name if end.status in set(signal.Signals) else f"signal {end.status}"
    cause = " (possibly out of memory)" if end.status == signal.SIGKILL else ""
    line = f"rank {rank} was killed by {name}{cause} in {place}"
    return Failure(end.time, 1, False, line, last_stack(rank, folder))

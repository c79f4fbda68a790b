"""One rank: what it knows about itself, and how it lives as a forked process."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from .failure import leave_words, stack_path
from .heartbeat import DONE, Heartbeat


@dataclass(frozen=True)
class RankEnv:
    """What one rank knows about itself.

    Attributes:
        store_path: file for `torch.distributed.FileStore`, in a folder that only this user can read; None under
            torchrun, whose ranks meet at `env://`.
        timeout_s: the longest time, in seconds, for which a rank may make no progress.
        heartbeat: of this rank. Call `enter("rendezvous")` before joining the others, `beat(phase, step)` while
            working, `beat("idle")` before waiting for a request.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    store_path: str | None
    timeout_s: float
    heartbeat: Heartbeat


def joined(timeout_s: float) -> RankEnv | None:
    """The rank that torchrun's environment variables make of this process; None unless RANK and WORLD_SIZE are set.

    Raises:
        ValueError: they are no numbers, or contradict one another.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    world_size, rank = _number("WORLD_SIZE"), _number("RANK")
    local_world_size = _number("LOCAL_WORLD_SIZE", world_size)  # absent: one node
    local_rank = _number("LOCAL_RANK", rank)
    if not (0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size):
        raise ValueError(
            f"RANK={rank} WORLD_SIZE={world_size} LOCAL_RANK={local_rank} LOCAL_WORLD_SIZE={local_world_size} "
            "contradict one another; start with torchrun, or unset RANK and WORLD_SIZE"
        )
    return RankEnv(rank, world_size, local_rank, local_world_size, None, timeout_s, Heartbeat.unwatched())


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is no number; start with torchrun, or unset RANK and WORLD_SIZE") from None


def be_rank(main: Callable[[RankEnv], object], env: RankEnv, folder: Path, launcher: int, mask: set[int]) -> NoReturn:
    """The life of a process that was just forked. It ends here: above this frame is code of the launcher.

    Args:
        folder: where the launcher looks for what this rank has to say.
        launcher: its process id.
        mask: the signals to block, once they can be told from the launcher's.
    """
    code = 1
    try:
        os.setsid()  # Ctrl-C is the launcher's; and it can signal the rank together with whatever the rank starts
        _die_with(launcher)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        stack_file = stack_path(env.rank, folder).open("w")
        faulthandler.enable(stack_file)
        faulthandler.register(signal.SIGUSR1, stack_file)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        gc.freeze()  # what is imported is no garbage: a full collection takes 0.4 ms, not 300, and copies no pages
        main(env)
        env.heartbeat.beat(DONE)
        flush_output()
        code = 0
    except BaseException as error:
        code = leave_words(error, env.rank, folder)
        with contextlib.suppress(OSError, ValueError):
            flush_output()
    finally:
        os._exit(code)


def _die_with(launcher: int) -> None:
    """Has the kernel kill this process when the launcher dies, however it dies."""
    pr_set_pdeathsig = 1
    if ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != launcher:  # it was dead before the kernel knew
        os._exit(1)


def flush_output() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()

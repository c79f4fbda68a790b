"""Runs a function of a test module as the ranks of a gloo group: processes that the launcher forks."""

from __future__ import annotations

import importlib
import inspect
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def run_gloo(fn: Callable, tp_size: int, timeout_s: float = 120.0) -> list:
    """fn(comm) in `tp_size` processes; what it returned, in rank order.

    Starting costs the seconds of importing `fn`'s module anew, once for all ranks: let one call serve many checks.

    Args:
        fn: stands at the top of a module of this folder; what it returns can be pickled.
    """
    with tempfile.TemporaryDirectory() as folder:
        done = end_of(fn, tp_size, folder, timeout_s)
        assert done.returncode == 0, f"{fn.__name__} ended with {done.returncode}:\n{done.stderr}"
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(tp_size)]


def end_of(
    fn: Callable, tp_size: int, folder: str | Path, timeout_s: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """How `run_gloo`'s launcher ends; in `folder` lies what the ranks returned."""
    module = Path(inspect.getfile(fn)).stem
    command = [sys.executable, __file__, module, fn.__name__, str(tp_size), str(folder)]
    environ = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}  # bits as on one thread here
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=timeout_s)


def _launch(module: str, name: str, tp_size: int, folder: Path) -> int:
    from tp_runtime.launch import launch

    def main(env) -> None:
        from tp_runtime.local import run_ranks

        fn = getattr(importlib.import_module(module), name)
        save = Path(folder, str(env.rank)).write_bytes
        run_ranks(env, "gloo", "cpu", tp_size, lambda comm: save(pickle.dumps(fn(comm))))

    return launch(main, tp_size, timeout_s=60, preload=lambda: importlib.import_module(module))


if __name__ == "__main__":
    os._exit(_launch(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])))

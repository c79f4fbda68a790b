"""Runs a module of this folder on several ranks under torchrun; requests and replies are JSON files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_TIMEOUT_S = 1800


def command(module: str, tp_size: int) -> list[str]:
    """The start of a command line; arguments of the module follow."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(tp_size)]
    return [*torchrun, "-m", module]


def environment() -> dict[str, str]:
    """The same for every contender: one thread a rank, the loopback interface, no network."""
    ours = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **ours}


def run(module: str, request: dict, tp_size: int) -> list[dict]:
    """What `module`, which calls `serve`, answers to `request` on each rank, in rank order.

    Raises:
        RuntimeError: a rank failed; with what the ranks wrote to stderr.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        (Path(folder) / "request.json").write_text(json.dumps(request))
        done = subprocess.run(
            [*command(module, tp_size), folder],
            cwd=ROOT, env=environment(), timeout=_TIMEOUT_S,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"{module} ended with exit code {done.returncode}:\n{done.stdout}")
        return [json.loads((Path(folder) / f"reply{rank}.json").read_text()) for rank in range(tp_size)]


def serve(answer: Callable[[dict], dict]) -> None:
    """One rank of `run`: joins a gloo group, then answers the request."""
    import torch.distributed as dist

    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    try:
        reply = answer(json.loads((folder / "request.json").read_text()))
        (folder / f"reply{dist.get_rank()}.json").write_text(json.dumps(reply))
    finally:
        dist.destroy_process_group()

"""Versions, devices and links: for bug reports (`python -m tp_runtime.env`) and benchmark records."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

PACKAGES = ("tp-runtime", "torch", "triton", "transformers", "safetensors", "tokenizers", "huggingface_hub", "numpy")


def versions() -> dict[str, str]:
    """Python and the packages that matter, name -> version; "absent" where one is not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def cpu() -> dict[str, str | int]:
    """The CPU's name and the cores that this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return {"name": name, "cores": len(os.sched_getaffinity(0))}


def gpus() -> list[dict[str, str]]:
    """Name, driver and memory of each GPU, as the driver's own tool says; empty where there is none."""
    text = _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    rows = [line.split(", ") for line in text.splitlines()]
    return [dict(zip(("name", "driver", "memory"), row, strict=False)) for row in rows]


def links() -> list[str]:
    """Which GPUs are linked how, as lines of the driver's own table; empty where there is no GPU."""
    return _output("nvidia-smi", "topo", "-m").splitlines()


def commit() -> str:
    """The checkout's commit, `-dirty` behind it where files differ; empty outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # git would look further up, where another project's checkout may be
        return ""
    return _output("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12").strip()


def describe() -> dict:
    """All of it, JSON-able."""
    return {
        "commit": commit(),
        "versions": versions(),
        "platform": platform.platform(),
        "cpu": cpu(),
        "gpus": gpus(),
        "links": links(),
    }


def _output(*command: str) -> str:
    """What a command prints; empty where it is not installed, fails or does not answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


if __name__ == "__main__":
    print(json.dumps(describe(), indent=2))

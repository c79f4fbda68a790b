"""What a bug report says about the machine: complete where things are there, quiet where they are not."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from tp_runtime import env

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A folder that is the whole PATH; `tools(name, script)` puts a program there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def add(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return add


def test_versions_are_those_that_run():
    """Catches a version of another installation than the one that is imported, and a package that is not named."""
    found = env.versions()
    assert found["python"] == platform.python_version()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]  # the build's tag is torch's own
    assert found["transformers"] == transformers.__version__
    assert {"triton", "safetensors", "tokenizers", "huggingface_hub", "numpy", "tp-runtime"} <= found.keys()


def test_absent_package_is_said_to_be_absent(monkeypatch):
    """Catches a traceback in a bug report about a broken installation."""
    monkeypatch.setattr(env, "PACKAGES", ("no-such-package-of-ours",))
    assert env.versions() == {"python": platform.python_version(), "no-such-package-of-ours": "absent"}


def test_cpu():
    """Catches cores of the machine where the process may use fewer, and a CPU without a name."""
    found = env.cpu()
    assert found["name"] and found["cores"] == len(os.sched_getaffinity(0))


def test_gpus_and_links(tools):
    """Catches a column of the driver's tool taken for another one."""
    tools(
        "nvidia-smi",
        'case "$*" in\n'
        '  "topo -m") echo "GPU0 GPU1"; echo "X NV18";;\n'
        "  *name,driver_version,memory.total*noheader*)\n"
        '    echo "NVIDIA H200, 570.1, 143771 MiB"; echo "NVIDIA A, 5, 1 MiB";;\n'
        "esac",
    )
    assert env.gpus() == [
        {"name": "NVIDIA H200", "driver": "570.1", "memory": "143771 MiB"},
        {"name": "NVIDIA A", "driver": "5", "memory": "1 MiB"},
    ]
    assert env.links() == ["GPU0 GPU1", "X NV18"]


@pytest.mark.parametrize("script", [None, "echo no devices were found; exit 6"], ids=["absent", "failing"])
def test_no_gpu_tool(tools, script):
    """Catches an error message reported as a GPU, and a traceback where there is no driver."""
    if script:
        tools("nvidia-smi", script)
    assert env.gpus() == env.links() == []


def test_hanging_tool(tools, monkeypatch):
    """Catches a bug report that never ends because the driver does not answer."""
    tools("nvidia-smi", "exec sleep 60")
    monkeypatch.setenv("PATH", os.environ["PATH"] + os.pathsep + "/bin" + os.pathsep + "/usr/bin")
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: run(*args, **{**kwargs, "timeout": 0.1}))
    assert env.gpus() == []


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit(tmp_path, monkeypatch):
    """Catches the commit of a project that our installation lies in reported as ours, and a change not marked."""

    def git(*command: str) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
        return subprocess.check_output(["git", "-C", str(tmp_path), *identity, *command], text=True).strip()

    ours = tmp_path / "site-packages" / "tp_runtime" / "env.py"
    ours.parent.mkdir(parents=True)
    ours.write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "of another project")
    monkeypatch.setattr(env, "__file__", str(ours))
    assert env.commit() == ""

    monkeypatch.setattr(env, "__file__", str(tmp_path / "tp_runtime" / "env.py"))
    assert env.commit() == git("rev-parse", "--short=12", "HEAD")
    ours.write_text("changed")
    assert env.commit() == git("rev-parse", "--short=12", "HEAD") + "-dirty"


def test_command_prints_json_alone():
    """Catches output that no program can read, and a report that needs the torch that it is about."""
    program = (
        "import runpy, sys; runpy.run_module('tp_runtime.env', run_name='__main__');"
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    )
    printed = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True)
    found = json.loads(printed)
    assert found.keys() == {"commit", "versions", "platform", "cpu", "gpus", "links"}
    assert found["versions"] == env.versions()

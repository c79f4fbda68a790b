"""Ranks that torchrun started, on one node and on two (two agents on this machine)."""

import json
import re
import socket
import subprocess
import sys

import pytest
from command_server import REPOSITORY

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENV_LINES = re.compile(r"^(W|E|I)\d{4} |^\s*$")


def run(agents, timeout=120):
    """Runs the agents side by side; their exit codes, outputs and errors."""
    processes = [
        subprocess.Popen(argv, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for argv in agents
    ]
    done = [process.communicate(timeout=timeout) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, done, strict=True)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


COMMAND = ["-m", "tp_runtime.generate", "--prompt", "27+58=", "--json"]


def test_one_node():
    """Catches ranks that start ranks of their own under torchrun, or that all print."""
    ((code, out, err),) = run([[*TORCHRUN, "--standalone", "--nproc-per-node", "3", *COMMAND]])
    assert code == 0, err
    answer = json.loads(out)
    assert answer["completions"][0]["text"] == "85" and answer["report"]["tp_size"] == 3


def test_two_nodes_of_two_ranks():
    """Catches a rank that takes its number on the node for its number in the group; a rendezvous by a local file."""
    flags = ["--nnodes", "2", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    agents = [[*TORCHRUN, *flags, "--node-rank", str(node), *COMMAND] for node in range(2)]
    (first, second) = run(agents)
    assert first[0] == second[0] == 0, first[2] + second[2]
    answer = json.loads(first[1])
    assert answer["completions"][0]["text"] == "85" and answer["report"]["tp_size"] == 4
    assert second[1] == ""


@pytest.mark.parametrize(
    ("flags", "differs"),
    [(["--prompt", "1+{rank}="], "prompt"), (["--prompt", "1+1=", "--seed", "{rank}"], "seed")],
)
def test_ranks_that_disagree_are_named(tmp_path, flags, differs):
    """Row R10. Catches ranks with another prompt or option: silent garbage, different texts, or a hang."""
    script = tmp_path / "different.py"
    script.write_text(
        f"import os, sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from tp_runtime.generate import main\n"
        f"sys.exit(main([flag.replace('{{rank}}', os.environ['RANK']) for flag in {flags!r}]))\n"
    )
    ((code, out, err),) = run([[*TORCHRUN, "--standalone", "--nproc-per-node", "2", str(script)]])
    assert code != 0 and out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("tp_runtime: ")]
    assert line.startswith(f"tp_runtime: ranks disagree on {differs} (rank 0: ") and "; rank 1: " in line

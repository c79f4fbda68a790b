"""scripts/kernel_tests.py: the kernels' tests with the Triton that was asked for."""

import subprocess
import sys

import pytest

from scripts import kernel_tests


class Became(BaseException):
    """Instead of becoming another program."""


@pytest.fixture
def installs(tmp_path, monkeypatch):
    """The installer's commands, recorded instead of run."""
    commands = []

    def record(command, **_):
        commands.append(command)
        (tmp_path / command[command.index("--target") + 1] / "triton").mkdir(parents=True)
        return subprocess.CompletedProcess(command, returncode=0)

    monkeypatch.setattr(kernel_tests, "ROOT", tmp_path)
    monkeypatch.setattr(kernel_tests, "BUILD", tmp_path / "build")
    monkeypatch.setattr(kernel_tests.subprocess, "run", record)
    return commands


@pytest.fixture
def became(monkeypatch):
    """main(arguments) -> the command and the environment that it goes on as."""

    def execve(program, command, environment):
        raise Became(command, environment)

    def main(*arguments):
        with pytest.raises(Became) as caught:
            kernel_tests.main(list(arguments))
        return caught.value.args

    monkeypatch.setattr(kernel_tests.os, "execve", execve)
    return main


def test_every_test_of_a_kernel_runs():
    """Catches a list that forgot a file, and the whole suite being run instead."""
    names = {file.rsplit("/", 1)[1] for file in kernel_tests.test_files()}
    assert {"test_interpreted.py", "test_compiled.py", "test_compile.py"} <= names
    assert not {"test_plan.py", "test_kernel_tests.py", "test_comm.py"} & names


def test_the_installed_triton_needs_no_installation(installs, became, monkeypatch):
    """Catches a download of what is there, and pytest's arguments lost."""
    monkeypatch.setattr(kernel_tests, "version", {"triton": "3.7.1"}.get)
    for arguments in (["-x"], ["--triton", "3.7.1", "-x"]):
        command, _ = became(*arguments)
        assert command[:3] == [sys.executable, "-m", "pytest"]
        assert command[-1] == "-x"
    assert installs == []


def test_another_triton_is_installed_alone_and_once(installs, became, tmp_path, monkeypatch):
    """Catches a second torch dragged along, an install at each run, and the other Triton behind the installed one."""
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    for _ in range(2):
        _, environment = became("--triton", "0.1.0")
        first, second = environment["PYTHONPATH"].split(":")
        assert first.startswith(str(tmp_path / "build" / "triton-0.1.0-"))
        assert second == "elsewhere"
    (command,) = installs
    assert "--no-deps" in command
    assert command[-1] == "triton==0.1.0"


def test_old_tritons_bring_their_numpy(installs, became, monkeypatch):
    """Catches an interpreter that fails in every test, for an error that is numpy's."""
    monkeypatch.setattr(kernel_tests, "version", lambda _: "3.7.1")  # neither is the installed one
    became("--triton", "3.6.0")
    became("--triton", "3.9.0")
    assert installs[0][-2:] == ["triton==3.6.0", "numpy<2.4"] and installs[1][-1] == "triton==3.9.0"


def test_a_failed_install_leaves_nothing(installs, monkeypatch, tmp_path):
    """Catches half a Triton that the next run takes for a whole one."""
    record = kernel_tests.subprocess.run

    def fail(command, **_):
        return subprocess.CompletedProcess(record(command).args, returncode=1)

    monkeypatch.setattr(kernel_tests.subprocess, "run", fail)
    with pytest.raises(SystemExit, match="This failed: .*triton==0.1.0"):
        kernel_tests.main(["--triton", "0.1.0"])
    assert list((tmp_path / "build").iterdir()) == []

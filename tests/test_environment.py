"""scripts/environment.py: which python `make demo` and `make test` run with, and what they install for it."""

import subprocess
import sys
from importlib.metadata import version

import pytest
from packaging.requirements import Requirement

from scripts import environment


@pytest.fixture
def installs(tmp_path, monkeypatch):
    """The installer's commands, recorded instead of run; `.venv` is a folder of the test, and always fit to use."""
    commands = []

    def record(command, **_):
        commands.append(command)
        environment.VENV.mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, returncode=0)

    monkeypatch.setattr(environment, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(environment, "VENV_PYTHON", tmp_path / ".venv/bin/python")
    monkeypatch.setattr(environment, "STAMP", tmp_path / ".venv/installed")
    monkeypatch.setattr(environment, "venv_runs", lambda code: True)
    monkeypatch.setattr(environment, "is_met", lambda requirement: False)
    monkeypatch.setattr(environment.subprocess, "run", record)
    return commands


def test_groups_are_those_of_pyproject():
    """Catches a list in pyproject.toml that the script reads otherwise than pip does: a comment, another form."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11's tomllib")
    project = tomllib.loads(environment.PYPROJECT.read_text())["project"]
    groups = {"run": project["dependencies"], **project["optional-dependencies"]}
    for group, expected in groups.items():
        assert environment.requirements(group) == expected
        for requirement in expected:
            environment.is_met(requirement)


def test_pins_are_admitted_by_pyproject():
    """Catches a pin below the package's own floor, a pin with a range, and a direct dependency that is not pinned."""
    lines = environment.CONSTRAINTS.read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(str(pin.specifier).startswith("==") for pin in pins)
    for group in ("run", "test", "notebook", "bench", "check"):
        for requirement in map(Requirement, environment.requirements(group)):
            pinned = [str(pin.specifier)[2:] for pin in pins if pin.name == requirement.name]
            assert pinned, requirement
            assert all(requirement.specifier.contains(pin) for pin in pinned), requirement


@pytest.mark.parametrize(
    ("floor", "expected"), [("0", True), (version("pytest"), True), ("999", False), (version("pytest") + ".1", False)]
)
def test_floors_are_compared_as_numbers(floor, expected):
    """Catches "10.0" taken for older than "9.2"."""
    assert environment.is_met(f"pytest>={floor}") is expected
    assert environment.release("2.13.0+cpu") > environment.release("2.9.1")
    assert environment.release("2.12.0a0+b558c98.nv26") == (2, 12, 0)


def test_other_platforms_requirements_are_met_and_absent_packages_are_not():
    """Catches triton being asked for where it does not exist, and a missing package being taken for an old one."""
    assert environment.is_met("no-such-package>=1; sys_platform == 'plan9'")
    assert not environment.is_met("no-such-package>=1")


def test_a_python_with_everything_is_used_as_it_is(installs, monkeypatch):
    """Catches an offline or GPU machine being made to install what it has, or what a test can do without."""
    monkeypatch.setattr(environment, "is_met", lambda requirement: requirement not in ("nbclient", "ipykernel"))
    assert environment.main(["run", "test", "notebook?"]) == sys.executable
    assert installs == []


def test_each_group_is_installed_once(installs):
    """Catches a reinstall on every call, and `make demo` installing what only the tests need."""
    for groups in (["run"], ["run"], ["run", "test", "notebook?"], ["run", "test", "notebook?"], ["run"]):
        assert environment.main(groups) == environment.VENV_PYTHON
    first, second = installs
    assert "transformers>=5.17" in first
    assert "pytest>=8" not in first
    assert {"pytest>=8", "nbclient"} <= set(second)


def test_changed_pins_install_again(installs, tmp_path, monkeypatch):
    """Catches a `.venv` that keeps the versions of an older checkout."""
    environment.main(["run"])
    changed = tmp_path / "constraints.txt"
    changed.write_text("torch==2.14.1\n")
    monkeypatch.setattr(environment, "CONSTRAINTS", changed)
    environment.main(["run"])
    assert len(installs) == 2


def test_a_failed_install_is_tried_again(installs, monkeypatch):
    """Catches a half-made `.venv` that is taken for a finished one."""
    record = environment.subprocess.run

    def fail(command, **_):
        return subprocess.CompletedProcess(record(command).args, returncode=1)

    monkeypatch.setattr(environment.subprocess, "run", fail)
    for _ in range(2):
        with pytest.raises(SystemExit, match="This failed"):
            environment.main(["run"])
    assert len(installs) == 2
    assert not environment.STAMP.exists()


def test_a_venv_that_does_not_run_is_made_anew(installs, monkeypatch):
    """Catches a dangling `.venv/bin/python` and the groups of the old `.venv` being taken for the new one's."""
    environment.main(["run", "test"])
    installs.clear()
    monkeypatch.setattr(environment, "venv_runs", lambda code: False)
    record = environment.subprocess.run

    def clear(command, **_):
        if "--clear" in command:
            environment.STAMP.unlink()
        return record(command)

    monkeypatch.setattr(environment.subprocess, "run", clear)
    environment.main(["check"])
    make, install = installs
    assert "venv" in make
    assert "mypy>=1.17" in install
    assert environment.STAMP.read_text().split()[1:] == ["check"]


def test_an_old_python_is_told_what_to_do(installs, monkeypatch):
    """Catches a traceback, or a package's own refusal after minutes, as the answer to Python 3.9."""
    monkeypatch.setattr(environment, "OLDEST", (999, 0))
    monkeypatch.setattr(environment.shutil, "which", lambda program: None)
    with pytest.raises(SystemExit, match="Python 3.10 or newer first on PATH, or install uv"):
        environment.main(["run"])
    assert installs == []

"""Print the path of the python that a target of the Makefile runs with.

    python3 scripts/environment.py run test notebook?

That is this very python where it has the named groups of requirements: then nothing is installed, no network is needed.
Else it is the one in `.venv`, which is made, mended or completed here by uv if found, otherwise by venv and pip, within
constraints.txt. Indexes and options are the user's own (PIP_*, UV_*, pip.conf).

A group is an extra of pyproject.toml, or `run`: what the package itself depends on. A group that ends in `?` goes into
`.venv`, but this python will do without it.

Standard library only; and Python 3.6 can read it, to be told that it is too old.
"""

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST = (3, 10)
ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = ROOT / "pyproject.toml"
CONSTRAINTS = ROOT / "constraints.txt"
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed"  # written last: the hash of the two files above, then the groups


def requirements(group):
    """The strings of a group in pyproject.toml, read by its layout because Python 3.10 has no tomllib."""
    key = "dependencies" if group == "run" else group
    array = re.search(rf"^{key} = \[(.*?)\]$", PYPROJECT.read_text(), re.MULTILINE | re.DOTALL)
    if array is None:
        raise SystemExit(f"pyproject.toml has no group {group!r}")
    return re.findall(r'"(.+?)"', array[1])


def release(version):
    """(2, 13, 0) of "2.13.0+cpu"; what follows the numbers (pre-release, build) does not count."""
    return tuple(int(number) for number in re.match(r"\d+(\.\d+)*", version)[0].split("."))


def is_met(requirement):
    """Whether this python has `name>=floor`: by the installers' records, as importing torch alone takes seconds."""
    from importlib.metadata import PackageNotFoundError, version

    name, floor, platform = re.match(r"([\w-]+)(?:>=([\d.]+))?(?:; sys_platform == '(\w+)')?$", requirement).groups()
    if platform and platform != sys.platform:
        return True
    try:
        return release(version(name)) >= release(floor or "0")
    except PackageNotFoundError:
        return False


def installed_groups(key):
    """The groups that `.venv` holds as of `key`, the hash of what they were installed by."""
    stamp = STAMP.read_text().split() if STAMP.exists() else []
    return set(stamp[1:]) if stamp[:1] == [key] else set()


def venv_runs(code):
    """Whether `.venv` has a python, not older than OLDEST, that runs `code`."""
    check = f"import sys; assert sys.version_info >= {OLDEST}; {code}"
    try:
        return subprocess.run([str(VENV_PYTHON), "-c", check], stderr=subprocess.DEVNULL).returncode == 0
    except OSError:  # not there, or made for another machine
        return False


def install(groups):
    """Make `.venv` unless there is one that works, and install the groups' requirements into it."""
    uv = shutil.which("uv")
    if uv:
        make = [uv, "venv", "--clear", VENV]
        if sys.version_info >= OLDEST:  # else uv finds one that pyproject.toml admits
            make += ["--python", sys.executable]
        pip = [uv, "pip", "install", "--python", VENV_PYTHON]
    elif sys.version_info < OLDEST:
        raise SystemExit(f"python3 is {sys.version.split()[0]}: put Python 3.10 or newer first on PATH, or install uv")
    elif importlib.util.find_spec("ensurepip") is None:
        raise SystemExit("python3 cannot make environments: install its venv (apt install python3-venv), or install uv")
    else:
        make = [sys.executable, "-m", "venv", "--clear", VENV]
        pip = [VENV_PYTHON, "-m", "pip", "install"]

    wanted = [requirement for group in groups for requirement in requirements(group)]
    print("Installing into .venv:", *wanted, sep="\n  ", file=sys.stderr)
    if not sys.stderr.isatty():
        pip += ["--quiet"]  # a log wants no progress bars
    steps = [] if venv_runs("" if uv else "import pip") else [make]
    for step in [*steps, [*pip, "-c", CONSTRAINTS, *wanted]]:
        command = [str(word) for word in step]
        if subprocess.run(command, stdout=sys.stderr).returncode != 0:  # stdout is for the path alone
            raise SystemExit(f"This failed; the next try goes on from here: {' '.join(command)}")


def main(arguments):
    needed = [requirement for group in arguments if not group.endswith("?") for requirement in requirements(group)]
    if sys.version_info >= OLDEST and all(map(is_met, needed)):
        return sys.executable

    groups = [group.rstrip("?") for group in arguments]
    key = hashlib.sha256(PYPROJECT.read_bytes() + CONSTRAINTS.read_bytes()).hexdigest()
    if not (installed_groups(key).issuperset(groups) and venv_runs("")):
        install(groups)
        STAMP.write_text(" ".join([key, *sorted(installed_groups(key).union(groups))]) + "\n")
    return VENV_PYTHON


if __name__ == "__main__":
    try:
        print(main(sys.argv[1:]))
    except KeyboardInterrupt:
        raise SystemExit(130) from None

"""Run the tests that interpret or compile kernels, with another Triton than the installed one if asked.

    python -m scripts.kernel_tests [--triton VERSION] [PYTEST ARGUMENT...]

Such a Triton is installed once, by itself, into a folder under `build/` and stands before the installed one on the
path; nothing else changes, torch included. Indexes and options are the user's own (PIP_*, UV_*, pip.conf).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
TESTS = ROOT / "tests"
# Every test file that imports one of the harnesses.
HARNESS = re.compile(r"^(from|import) (interpreted|bench\.compile)", re.MULTILINE)


def test_files():
    """The tests of kernels that need no GPU."""
    return [str(file) for file in sorted(TESTS.glob("test_*.py")) if HARNESS.search(file.read_text())]


def requirements(wanted):
    """Triton, and what it needs beside it: 3.6 interpreted makes numbers of arrays, which numpy 2.4 refuses."""
    return [f"triton=={wanted}", *(["numpy<2.4"] if wanted.startswith("3.6.") else [])]


def triton_folder(wanted):
    """The folder that holds Triton `wanted` for this python; installs it there unless it is there already."""
    folder = BUILD / f"triton-{wanted}-{sys.implementation.cache_tag}"
    if folder.exists():
        return folder
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as unfinished:
        target = Path(unfinished, "site")
        uv = shutil.which("uv")
        pip = [uv, "pip", "install", "--python", sys.executable] if uv else [sys.executable, "-m", "pip", "install"]
        command = [*pip, "--quiet", "--no-deps", "--target", str(target), *requirements(wanted)]
        print(f"Installing triton {wanted} into {folder.relative_to(ROOT)}", file=sys.stderr)
        if subprocess.run(command, stdout=sys.stderr).returncode != 0:
            raise SystemExit(f"This failed: {' '.join(command)}")
        target.rename(folder)
    return folder


def main(arguments):
    """Become pytest."""
    parser = argparse.ArgumentParser("python -m scripts.kernel_tests", description=__doc__.splitlines()[0])
    parser.add_argument("--triton", metavar="VERSION", help="such as 3.9.0; default: the installed one")
    wanted, pytest_arguments = parser.parse_known_args(arguments)
    environment = dict(os.environ)
    if wanted.triton and wanted.triton != version("triton"):
        path = [str(triton_folder(wanted.triton)), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(path)
    command = [sys.executable, "-m", "pytest", "-m", "slow or not slow", *test_files(), *pytest_arguments]
    os.execve(sys.executable, command, environment)


if __name__ == "__main__":
    main(sys.argv[1:])

"""What is installed, and the name `kernels`: ours is `tp_runtime.kernels`, the top-level one stays Hugging Face's."""

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGED = ("pyproject.toml", "setup.cfg", "README.md", "LICENSE", "tp_runtime", "kernels", "models")


def run(arguments: list[str], cwd: Path, *path: Path) -> str:
    """What `python ARGUMENTS` prints when it starts in `cwd`, with `path` before the installed packages."""
    python_path = [*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(python_path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    finished = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    """The wheel, editable wheel or sdist that pip would have the build backend make of `source`: no pip, no network."""
    run(["-c", f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"], source)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what is packaged: building leaves files behind."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in PACKAGED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, checkout / name)
    (checkout / "kernels" / "tuned_tables").mkdir(exist_ok=True)
    (checkout / "kernels" / "tuned_tables" / "a-gpu.json").write_text("{}\n")  # a table, whether we ship one or not
    return checkout


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    return build("wheel", checkout, tmp_path_factory.mktemp("wheel") / "dist")


@pytest.fixture(scope="module")
def doors(checkout, wheel, tmp_path_factory) -> dict[str, Path]:
    """The folder that each way of installing puts on the path, in which `tp_runtime` is found."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    ZipFile(wheel).extractall(unpacked)
    editable = tmp_path_factory.mktemp("editable")
    ZipFile(build("editable", checkout, editable / "dist")).extractall(editable)
    # A folder of PYTHONPATH is no site folder, whose .pth files are read: make it one, as soon as python starts.
    (editable / "sitecustomize.py").write_text(f"import site; site.addsitedir({str(editable)!r})\n")
    return {"checkout": checkout, "wheel": unpacked, "editable": editable}


@pytest.fixture(scope="module")
def hugging_face_kernels(tmp_path_factory) -> Path:
    """A folder with a package `kernels` of the version that transformers accepts.

    A stand-in for the real one, which brings a dozen dependencies, and which has to match each release of transformers.
    """
    accepted = next(line for line in metadata.requires("transformers") if re.match(r"kernels\b", line))
    version = re.search(r">=([\d.]+)", accepted)[1]
    folder = tmp_path_factory.mktemp("hugging_face")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text(
        "from unittest.mock import MagicMock\ndef __getattr__(name): return MagicMock(name=name)\n"
    )
    (folder / f"kernels-{version}.dist-info").mkdir()
    (folder / f"kernels-{version}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n"
    )
    return folder


def test_wheel_holds_the_package_and_nothing_beside_it(wheel, checkout):
    """Catches a top-level `kernels` or `models` in site-packages, and a file of ours that was left behind."""
    packed = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    source = [path for folder in ("", "kernels", "models") for path in (checkout / "tp_runtime" / folder).glob("*.py")]
    source += [path for path in (checkout / "tp_runtime" / "demo").rglob("*") if path.is_file()]
    source += (checkout / "tp_runtime" / "kernels" / "tuned_tables").glob("*.json")
    assert packed == {str(path.relative_to(checkout)) for path in source}


def test_sdist_builds_the_same_wheel(wheel, checkout, tmp_path):
    """Catches the links to kernels/ and models/ that point to nothing in the unpacked sdist, and demo data left out."""
    shutil.unpack_archive(build("sdist", checkout, tmp_path / "dist"), tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    again = build("wheel", unpacked, tmp_path / "again")
    assert sorted(ZipFile(again).namelist()) == sorted(ZipFile(wheel).namelist())


def test_versions_agree(wheel):
    """Catches a version raised in one place only."""
    import tp_runtime

    assert wheel.name == f"tp_runtime-{tp_runtime.__version__}-py3-none-any.whl"


@pytest.mark.parametrize("door", ["checkout", "wheel", "editable"])
def test_works_from_elsewhere(door, doors, tmp_path):
    """Catches a package that is found only because the working directory is the repository."""
    program = "import tp_runtime.kernels, tp_runtime.models.llama as llama; print(llama.__file__)"
    file = run(["-c", program], tmp_path, doors[door]).strip()
    assert Path(file).is_relative_to(doors["wheel"] if door == "wheel" else doors["checkout"])
    assert "--tp" in run(["-m", "tp_runtime.generate", "--help"], tmp_path, doors[door])


@pytest.mark.parametrize("door", ["checkout", "wheel", pytest.param("editable", marks=pytest.mark.slow)])
def test_kernels_stays_hugging_faces(door, doors, hugging_face_kernels, tmp_path):
    """Catches our folder `kernels/`, installed or in the working directory, hiding what transformers imports."""
    program = (
        "import transformers.integrations.hub_kernels as hub, kernels, tp_runtime.kernels, tp_runtime.models.llama;"
        "print(hub.is_kernels_available(), kernels.__file__)"
    )
    cwd = tmp_path if door == "wheel" else doors["checkout"]
    available, file = run(["-c", program], cwd, doors[door], hugging_face_kernels).split()
    assert available == "True"
    assert Path(file).is_relative_to(hugging_face_kernels)


def test_our_folder_is_not_taken_for_hugging_faces(checkout):
    """Catches transformers finding a package in the folder `kernels/` where Hugging Face's is not installed."""
    if list(metadata.distributions(name="kernels")):
        pytest.skip("Hugging Face's package `kernels` is installed")
    program = "import transformers.integrations.hub_kernels as hub; print(hub.is_kernels_available())"
    assert run(["-c", program], checkout).split() == ["False"]

"""The rules of the house that a program can check: who imports whom, what stands where, what is named what."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The floors of tp_runtime: a file imports only files that stand before it.
FLOORS = (
    "config flags completion sums display env heartbeat failure rank "
    "checkpoint_folder safetensors_header model_config preflight plan estimate shard checkpoint "
    "collective_ops communicator peer_memory comm local race overlap lanes layers experts cache attention block "
    "sampling in_step replacement patching loading verification text engine report launch llm generate"
).split()
# The launcher starts ranks before it knows what they will run: its floor is lower than its place in the list.
LAUNCH_IMPORTS = {"config", "env", "heartbeat", "failure", "rank"}

RUNTIME = sorted((ROOT / "tp_runtime").glob("*.py"))
FLOORED = [path for path in RUNTIME if path.stem != "__init__"]
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
MODELS = sorted((ROOT / "models").glob("*.py"))
FOLDERS = ("kernels", "models", "tp_runtime", "bench", "tests", "scripts")
EVERYWHERE = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(source: Path | ast.AST) -> Iterator[str]:
    """Every module or name that a file imports, at its top or inside a function; dots of relative imports are kept."""
    for node in ast.walk(ast.parse(source.read_text()) if isinstance(source, Path) else source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            separator = "" if module.endswith(".") else "."
            yield from (module + separator + alias.name for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """What of ours a file of tp_runtime imports: plan for `.plan.Plan`, models for `.models.x`, /bench for `bench.x`.

    Absolute `kernels` and `models` are the folders at the top, or Hugging Face's package: never what is meant.
    """
    modules = list(imports(path))
    inside = (re.match(r"(?:tp_runtime\b\.?|\.+)(\w*)", module) for module in modules)
    beside = {module.split(".")[0] for module in modules} & set(FOLDERS) - {"tp_runtime"}
    return {match[1] for match in inside if match} | {f"/{folder}" for folder in beside}


def dotted_names(path: Path) -> set[str]:
    """Every `a`, `a.b`, `a.b.c` in a file's code, and every name that it imports."""
    tree = ast.parse(path.read_text())
    chains = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name)}
    return chains | set(imports(path))


@pytest.mark.parametrize("path", FLOORED, ids=name)
def test_runtime_imports_only_upper_floors(path):
    """Catches import cycles and short cuts, also those hidden inside functions or behind TYPE_CHECKING."""
    assert path.stem in FLOORS, f"{name(path)} has no floor: give it a place in FLOORS"
    upper = LAUNCH_IMPORTS if path.stem == "launch" else set(FLOORS[: FLOORS.index(path.stem)])
    assert own_imports(path) <= upper | {"kernels", "models"}


@pytest.mark.parametrize("path", KERNELS, ids=name)
def test_kernels_import_torch_and_triton_only(path):
    """Catches a kernel that cannot be read, tested or lifted out without the runtime."""
    allowed = {"", "torch", "triton"} | sys.stdlib_module_names  # "": another kernel file, relative
    assert {module.split(".")[0] for module in imports(path)} <= allowed
    assert not any(module.startswith("..") for module in imports(path))


def test_what_a_cpu_rank_imports_leaves_triton_alone():
    """Catches a kernel at the top of a file: every rank on a CPU would wait for its decorators, and need Triton."""

    def at_top(path: Path) -> Iterator[list[str]]:
        """The dotted parts of what a file imports, what its functions import left out."""
        of_module = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        return (module.split(".") for module in imports(ast.Module(of_module, [])))

    of_kernels = {path.stem: {part for module in at_top(path) for part in module if part} for path in KERNELS}

    def reached(stem: str) -> set[str]:
        return {stem}.union(*(reached(other) for other in of_kernels[stem] if other in of_kernels))

    of_runtime = {module[2] for path in RUNTIME for module in at_top(path) if module[:2] == ["", "kernels"]}
    assert of_runtime >= {"gemm", "gated_gemm", "grouped_gemm", "routing", "rms_norm"}
    assert not {stem for op in of_runtime for stem in reached(op) if "triton" in of_kernels[stem]}


@pytest.mark.parametrize("path", MODELS, ids=name)
def test_models_import_the_standard_library_only(path):
    """Catches an adapter that is more than data, or that makes pre-flight import torch."""
    assert {module.split(".")[0] for module in imports(path)} <= {""} | sys.stdlib_module_names
    assert not any(module.startswith("..") for module in imports(path))


def test_one_file_names_streams_and_one_talks_to_torch_distributed():
    """Catches a second place where streams are ordered or ranks are met."""
    files = [*RUNTIME, *KERNELS, *MODELS]
    of_streams = {name(path) for path in files if any(re.search(r"(^|\.)Stream$", n) for n in dotted_names(path))}
    of_ranks = {name(path) for path in files if any(n.startswith("torch.distributed") for n in dotted_names(path))}
    assert of_streams <= {"tp_runtime/overlap.py", "tp_runtime/local.py"}  # schedules; ranks that share a device
    assert of_ranks <= {"tp_runtime/comm.py"}


def test_kernels_and_models_are_linked_folders_without_init():
    """Catches the `__init__.py` that would hide Hugging Face's package `kernels`, and a link that became a copy."""
    for folder in ("kernels", "models"):
        assert (ROOT / "tp_runtime" / folder).readlink() == Path("..", folder)
        assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("path", EVERYWHERE, ids=name)
def test_file_names_say_what_is_inside(path):
    """Catches drawers: files whose name does not say what belongs in them."""
    drawers = "util utils helper helpers misc manager base impl v2 new fast optimized".split()
    assert not set(drawers) & set(path.stem.split("_"))


def test_no_environment_variables_of_our_own():
    """Catches a switch that no `--help` shows."""
    prefix = re.compile("TP_" + "RUNTIME_")
    files = [*EVERYWHERE, ROOT / "Makefile", *(ROOT / "scripts").glob("*.sh")]
    assert not [name(path) for path in files if prefix.search(path.read_text())]


def test_no_index_address():
    """Catches an index written down: an unreachable one costs pip minutes, and it is the user's to choose."""
    files = ["pyproject.toml", "setup.cfg", "constraints.txt", "Makefile", ".ci/run"]
    files += [name(path) for path in (ROOT / "scripts").iterdir() if path.is_file()]
    assert not [file for file in files if re.search(r"index-url|find-links|://", (ROOT / file).read_text())]


def test_import_is_light():
    """Catches an eager import: `--help` and every rejected argument would wait seconds for torch or transformers."""
    program = (
        "import sys, time; import tp_runtime;"
        "print(time.process_time(), *({'torch', 'transformers', 'triton', 'numpy'} & set(sys.modules)))"
    )
    printed = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True)
    cpu_s, *heavy = printed.split()
    assert heavy == []
    assert float(cpu_s) < 0.2  # processor time, the interpreter's own start included; about 0.02

"""interpreted.py: kernels run by Triton's interpreter beside the same kernels compiled, in one process."""

import importlib
import sys
from types import ModuleType

import interpreted as harness
import pytest
import torch
import triton
from interpreted import interpreted
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from bench.compiled import recording

LOWER = """
import torch, triton, triton.language as tl

@triton.constexpr_function
def doubled(n):
    return 2 * n

@triton.jit
def twice(x):
    return x * 2
"""

OP = """
library = torch.library.Library("tp_runtime_probe", "FRAGMENT")
library.define("twice(Tensor x) -> Tensor")

@torch.library.register_fake("tp_runtime_probe::twice", lib=library)
def fake(x):
    return torch.empty_like(x)
"""

UPPER = """
import torch, triton, triton.language as tl

from .lower import doubled, twice

@triton.jit
def _rows_kernel(x_ptr, y_ptr, K, BLOCK_K: tl.constexpr):
    offs = tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + tl.program_id(0) * K + offs, mask=offs < K, other=0.0)
    half = tl.cdiv(K, 2)
    sums = tl.sum(x, 0) + x.sum(0) + tl.max(x, axis=0) + tl.sum(tl.zeros((BLOCK_K,), tl.float32) + 1)
    tl.store(y_ptr + tl.program_id(0), sums + twice(half) + doubled(BLOCK_K) + tl.sum(tl.cumsum(x, 0) * (offs < K)))

def launch(x):
    from . import lower  # late: is a copy as well
    y = torch.full((len(x),), float("nan"), device=x.device)
    _rows_kernel[(len(x),)](x, y, x.shape[1], BLOCK_K=8)
    return y, lower.twice
"""


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """Two files in a folder of kernels; `probe()` imports the upper one in the ordinary way."""
    (tmp_path / "lower.py").write_text(LOWER)
    (tmp_path / "upper.py").write_text(UPPER)
    monkeypatch.setattr(harness, "KERNELS", tmp_path)
    package = ModuleType("probe_kernels")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "probe_kernels", package)
    yield lambda: importlib.import_module("probe_kernels.upper")
    for name in ("lower", "upper"):
        sys.modules.pop(f"{harness.PACKAGE}.{name}", None)
        sys.modules.pop(f"probe_kernels.{name}", None)


def expected(x):
    k = x.shape[1]
    return 2 * x.sum(1) + x.amax(1) + 8 + 2 * ((k + 1) // 2) + 16 + x.cumsum(1).sum(1)


def test_interpreted_and_compiled_take_turns(probe):
    """Catches an interpreter that stays on (nothing compiles any more), or leaves Triton's language changed."""
    x = torch.randn(3, 5)
    ptx = set()
    for _ in range(2):
        y, _ = interpreted("upper").launch(x)
        torch.testing.assert_close(y, expected(x))
        with recording(arch=90) as compiled:
            probe().launch(x.to("meta"))
        ptx.add(compiled[0].ptx)
    assert len(ptx) == 1
    assert not triton.knobs.runtime.interpret


def test_neighbours_are_copies_too(probe):
    """Catches a compiled function called from an interpreted kernel, and an interpreted one left in `kernels`."""
    _, twice = interpreted("upper").launch(torch.zeros(1, 1))
    assert isinstance(twice, InterpretedFunction)
    assert isinstance(probe().twice, JITFunction)


def test_ops_are_registered_once(probe, tmp_path):
    """Catches the copy defining an op a second time: torch refuses that, or calls the copy from then on."""
    (tmp_path / "lower.py").write_text(LOWER + OP)
    interpreted("upper")
    assert not hasattr(torch.ops.tp_runtime_probe, "twice")
    probe()
    assert torch.ops.tp_runtime_probe.twice(torch.empty(2, device="meta")).shape == (2,)


def test_a_failing_kernel_switches_the_interpreter_off(probe, tmp_path):
    """Catches one failure that makes every later compile test fail as well."""
    (tmp_path / "upper.py").write_text(UPPER.replace("twice(half)", "nowhere"))
    with pytest.raises(triton.runtime.errors.InterpreterError, match="nowhere"):
        interpreted("upper").launch(torch.zeros(1, 1))
    assert not triton.knobs.runtime.interpret
    with pytest.raises(RuntimeError, match="Cannot call @triton.jit"):
        triton.language.cdiv(3, 2)


def test_an_unknown_file_is_an_import_error():
    """Catches a typing error that would give an empty module."""
    with pytest.raises(ModuleNotFoundError, match="no_such_kernel"):
        interpreted("no_such_kernel")

"""Which shapes, tokens and candidates the sections go through, and how a candidate is called."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from bench.choice import compile_ahead, label
from bench.gpu_section import Row
from bench.kernel_ops import OPS, Op
from bench.kernel_shapes import SKINNY, model_shapes, shape

DTYPES = ("bfloat16", "float16")
M_DECODE = (1, 4, 16, 64)
M_PREFILL = (512, 4096)
# Off every grid, and past it by one unit of 16 bytes or one token.
ODD_SIZES = ((70, 45), (70, 136), (1000, 1032), (4104, 4096))
ODD_M = (1, 3, 33, 64, 65, 200)


@dataclass(frozen=True)
class Case:
    """One op at one size; `name` says whose it is."""

    op: Op
    name: str
    m: int
    n: int
    k: int
    dtype: str
    is_odd: bool = False

    @property
    def what(self) -> str:
        return f"{self.op.name} {self.name}, {self.n}x{self.k}, M={self.m}, {self.dtype}"

    def operands(self, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """x [m, k] and one weight."""
        x = torch.randn(self.m, self.k, dtype=getattr(torch, self.dtype), device=device)
        w = torch.empty(self.op.stacked * self.n, self.k, dtype=x.dtype, device=device)
        return x, w.normal_(std=self.k**-0.5)

    def candidates(self) -> dict[str, tuple[str, Any]]:
        """Label -> kernel and configuration."""
        return {label(*c): c for c in self.op.candidates(self.m, self.n, self.k, getattr(torch, self.dtype))}


def model_cases(ms: Iterable[int], dtypes: Iterable[str] = DTYPES, models=()) -> list[Case]:
    """The shapes of the skinny target, and those of (model, tp_size), by the ops that run them; equal ones once."""
    shapes = [*map(shape, SKINNY), *(s for model, tp_size in models for s in model_shapes(model, tp_size))]
    found: dict[tuple, Case] = {}
    for op, s, dtype, m in itertools.product(OPS.values(), shapes, dtypes, ms):
        if s.role in op.roles and s.role != "lm_head":
            case = Case(op, s.name, m, *op.size(s), dtype)
            found.setdefault((op.name, case.n, case.k, dtype, m), case)
    return list(found.values())


def odd_cases() -> list[Case]:
    sizes = itertools.product(OPS.values(), DTYPES, ODD_SIZES, ODD_M)
    return [Case(op, "odd", m, n, k, dtype, is_odd=True) for op, dtype, (n, k), m in sizes]


def compiled_ahead(case: Case, x: torch.Tensor, w: torch.Tensor) -> dict[str, tuple[str, Any]]:
    """The case's candidates, compiled several at a time."""
    candidates = case.candidates()
    if x.is_cuda:
        compile_ahead(case.op, candidates.values(), x, w)
    return candidates


def poisoned_block(m: int, n: int, like: torch.Tensor, pad: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor [m, n + 2 * pad] full of NaN, and its columns [pad, pad + n), which a kernel is to fill."""
    wide = torch.full((m, n + 2 * pad), float("nan"), dtype=like.dtype, device=like.device)
    return wide, wide[:, pad : pad + n]


def is_framed(wide: torch.Tensor, pad: int = 16) -> bool:
    """Whether what stands around the block is still NaN."""
    return bool(wide[:, :pad].isnan().all() and wide[:, -pad:].isnan().all())


class Faults:
    """What is wrong with the candidates of one case, each by its label.

    Args:
        may_refuse: whether a ValueError is a right answer, as it is to operands that a kernel cannot take.
    """

    def __init__(self, device: str, may_refuse: bool = False):
        self.found: list[str] = []
        self.num_right = self.num_refused = 0
        self._device, self._refusal = device, ValueError if may_refuse else ()

    def check(self, name: str, fault: Callable[[], str]) -> None:
        """Calls `fault`, which returns what is wrong, "" if nothing is. The others are checked even if it raises.

        Raises:
            RuntimeError: the device is lost.
        """
        try:
            text = fault()
        except self._refusal:
            self.num_refused += 1
            return
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            if self._device == "cuda":
                torch.cuda.synchronize()  # raises where nothing more can be checked
        if text:
            self.found.append(f"{name}: {text}")
        else:
            self.num_right += 1

    def row(self, what: str, **figures) -> Row:
        counts = {"right": self.num_right, "refused": self.num_refused}
        return {"what": what, **figures, **counts, "wrong": self.found, "is_ok": not self.found}

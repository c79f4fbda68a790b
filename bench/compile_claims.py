"""What a kernel claims of its compiled form, and whether it holds.

    for case, kernel in zip(several, compile_all(several)):
        case.broken_claims(kernel)      # [] or what it is not, in words

The cases themselves: `compile_cases`.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.compiled import CHIPS, Compiled, CompileError, recording

TENSOR_CORES = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma\b"}
# Instructions that are counted, by the name of their column.
INSTRUCTIONS = {
    "mma": "|".join(TENSOR_CORES.values()),
    "cp.async 16 B": r"cp\.async\.cg\.shared\.global.*, 0x10\b",
    "cp.async 8 B": r"cp\.async\.ca\.shared\.global.*, 0x8\b",
    "cp.async 4 B": r"cp\.async\.ca\.shared\.global.*, 0x4\b",
    "TMA": r"cp\.async\.bulk\.tensor",
    "ld 16 B": r"ld\.global(?:\.\w+(?:::\w+)*)*\.(?:v4\.[bfu]32|v2\.[bfu]64|v8\.[bfu]16)",
    "setmaxnreg": r"setmaxnreg",
    "PDL": r"griddepcontrol",
}


@dataclass(frozen=True)
class Case:
    """One launch of one kernel, and what the compiler has to make of it."""

    op: str
    kernel: str
    arch: int
    dtype: torch.dtype
    shape: str
    launch: Callable[[], object]  # within a recording
    config: Any = None  # a NamedTuple
    place: int | None = None  # of the kernel among those that are launched; None: it is the only one
    tensor_cores: str = ""  # the instruction that is meant, a regular expression; "": none is
    has_wide_loads: bool = False  # by 16 bytes: the weights, and so most of what the loop over K loads
    is_specialized: bool = False  # warps that load and warps that compute
    has_pdl: bool = True  # from sm_90 on
    may_spill: bool = False  # loads of one element at a time, of rows that do not lie at multiples of 16 bytes

    @property
    def label(self) -> str:
        """`decode(block_n=64, num_warps=4)`, without fields that have their default."""
        if self.config is None:
            return self.kernel
        fields, defaults = self.config._asdict().items(), self.config._field_defaults.items()
        return f"{self.kernel}({', '.join(f'{f}={value}' for f, value in fields if (f, value) not in defaults)})"

    @property
    def name(self) -> str:
        return f"sm_{self.arch} {self.op} {self.label} {self.shape} {str(self.dtype).removeprefix('torch.')}"

    def compile(self) -> Compiled:
        """The kernel that is meant.

        Raises:
            CompileError: it does not compile.
        """
        with recording(self.arch) as compiled:
            self.launch()
        assert self.place is not None or len(compiled) == 1, [kernel.name for kernel in compiled]
        return compiled[self.place or 0]

    def broken_claims(self, kernel: Compiled | CompileError) -> list[str]:
        """What `kernel` is not although it should be; empty if all is well."""
        if isinstance(kernel, CompileError):
            return [f"does not compile: {kernel}"]
        count = counts(kernel)
        wide_bytes = 16 * (count["cp.async 16 B"] + count["TMA"] + count["ld 16 B"])
        narrow_bytes = 8 * count["cp.async 8 B"] + 4 * count["cp.async 4 B"]
        limit = CHIPS[self.arch].block_shared_bytes
        size = f"{kernel.registers} registers, {kernel.num_warps} warps"
        checks = {
            f"spills {kernel.spill_bytes} bytes a thread": self.may_spill or kernel.spill_bytes == 0,
            f"takes {kernel.shared_bytes} bytes of shared memory, there are {limit}": kernel.shared_bytes <= limit,
            f"does not fit on a multiprocessor: {size}": kernel.occupancy,
            f"has no {self.tensor_cores}": not self.tensor_cores or kernel.count(self.tensor_cores),
            f"loads {wide_bytes} bytes by 16, {narrow_bytes} by less": not self.has_wide_loads
            or wide_bytes > 3 * narrow_bytes,
            "is not specialized": not self.is_specialized or count["setmaxnreg"],
            "has no griddepcontrol": not (self.has_pdl and self.arch >= 90) or count["PDL"],
            "was launched without launch_pdl": not count["PDL"] or kernel.launch_pdl,
        }
        return [broken for broken, is_well in checks.items() if not is_well]


def compile_all(several: Sequence[Case]) -> Iterator[Compiled | CompileError]:
    """The kernel of each case, in order, or why there is none; on as many processes as there are cores for this one."""
    launches = [list(group) for _, group in itertools.groupby(several, key=lambda case: case.launch)]
    processes = min(len(os.sched_getaffinity(0)), max(1, len(launches)))
    with multiprocessing.get_context("fork").Pool(processes, _inherit, (launches,)) as pool:
        yield from itertools.chain.from_iterable(pool.imap(_compile, range(len(launches))))


_launches: list[list[Case]] = []


def _inherit(launches: list[list[Case]]) -> None:
    """A fork has the cases without being sent them: launchers cannot be."""
    _launches[:] = launches


def _compile(i: int) -> list[Compiled | CompileError]:
    """The kernels of one launch: several cases share one that launches several, and Triton's memory of it."""
    found: list[Compiled | CompileError] = []
    for case in _launches[i]:
        try:
            kernel = case.compile()
        except CompileError as error:
            found.append(CompileError(str(error)))  # without its causes, which hold what cannot be sent
        else:
            assert kernel.registers  # looked up here, beside other processes, and sent along
            found.append(kernel)
    return found


def counts(kernel: Compiled) -> dict[str, int]:
    """How often each of INSTRUCTIONS stands in the PTX."""
    return {name: kernel.count(pattern) for name, pattern in INSTRUCTIONS.items()}

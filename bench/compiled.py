"""What a launcher would launch, compiled for a GPU that need not be there.

    x = torch.empty(16, 4096, dtype=torch.bfloat16, device="meta")
    with recording(arch=90) as compiled:
        gemm.run(x, w, ...)                     # the very launcher that runs on a GPU
    compiled[0].registers, compiled[0].count("wgmma"), compiled[0].occupancy

Within `recording`, Triton's driver says "sm_90" whatever the machine has, and a launch ends after compiling. So what is
inspected is what runs: the same specialisation of the arguments, the same options, the same pipeline down to the cubin.
Triton keeps what it compiled on disk, as always: a second time takes milliseconds.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.errors import CompilationError
from triton.runtime import driver
from triton.runtime.errors import PTXASError
from triton.runtime.jit import JITFunction

WARP_SIZE = 32
_RUN = JITFunction.run  # compiles, then launches


class Chip(NamedTuple):
    """What one multiprocessor (SM) offers to the blocks that live on it."""

    shared_bytes: int  # of all blocks together
    block_shared_bytes: int  # of one block
    registers: int = 65536
    warps: int = 64
    blocks: int = 32
    tensor_memory_columns: int = 512  # sm_100 alone has them


KIB = 1024
CHIPS = {
    80: Chip(164 * KIB, 163 * KIB),
    90: Chip(228 * KIB, 227 * KIB),
    100: Chip(228 * KIB, 227 * KIB),
}


class CompileError(RuntimeError):
    """A kernel that does not compile for an architecture: which one, and the compiler's own first complaint."""


@dataclass(frozen=True)
class Compiled:
    """One kernel as it would be launched."""

    name: str
    arch: int  # 90 for sm_90
    num_warps: int  # of one block, those of warp specialisation included
    shared_bytes: int  # of one block
    tensor_memory_columns: int  # of one block
    launch_pdl: bool  # may start while the kernel before it in the stream still runs
    ptx: str
    cubin: bytes

    @functools.cached_property
    def _resources(self) -> dict[str, int]:
        """REG, STACK, SHARED, LOCAL ... of the kernel, as the cubin says them."""
        printed = _run_tool("cuobjdump", "--dump-resource-usage", cubin=self.cubin)
        usage = re.search(rf"Function {re.escape(self.name)}:\s*(.*)", printed)
        assert usage, printed
        return {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage[1])}

    @property
    def registers(self) -> int:
        """Of one thread; with warp specialisation, of one thread at launch, before the warps share them out anew."""
        return self._resources["REG"]

    @property
    def spill_bytes(self) -> int:
        """Local memory of one thread. Triton's kernels put nothing there but registers that they had no room for."""
        return self._resources["STACK"] + self._resources["LOCAL"]

    @functools.cached_property
    def sass(self) -> str:
        """The machine code, disassembled when it is first asked for."""
        return _run_tool("nvdisasm", "--print-code", cubin=self.cubin)

    def count(self, pattern: str) -> int:
        """How often a regular expression matches in the PTX."""
        return len(re.findall(pattern, self.ptx))

    def count_sass(self, pattern: str) -> int:
        """How often a regular expression matches in the machine code."""
        return len(re.findall(pattern, self.sass))

    @property
    def occupancy(self) -> int:
        """Blocks that live on one SM at a time; 0 where not even one fits."""
        return occupancy(self.arch, self.num_warps, self.registers, self.shared_bytes, self.tensor_memory_columns)


def occupancy(arch: int, num_warps: int, registers: int, shared_bytes: int, tensor_memory_columns: int = 0) -> int:
    """Blocks of one kernel that fit on one SM at a time.

    Registers are handed out to warps, 256 at a time, by the SM's four quarters, each from its own; shared memory to
    blocks, 128 bytes at a time, 1 KiB more than they asked for.
    """
    chip = CHIPS[arch]
    if shared_bytes > chip.block_shared_bytes:
        return 0
    warp_registers = _round_up(registers * WARP_SIZE, 256)
    warps = min(chip.warps, 4 * (chip.registers // 4 // warp_registers)) if registers else chip.warps
    limits = [chip.blocks, warps // _round_up(num_warps, 4), chip.shared_bytes // _round_up(shared_bytes + KIB, 128)]
    if tensor_memory_columns:
        limits.append(chip.tensor_memory_columns // tensor_memory_columns)
    return min(limits)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class _AbsentGpu:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, arch: int):
        self._target = GPUTarget("cuda", arch, WARP_SIZE)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device: no real one has such a number, and each architecture has its own.
        return self._target.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def recording(arch: int) -> Iterator[list[Compiled]]:
    """A list that fills with the kernels launched within: each is compiled for `arch` and not run.

    Launchers are called with tensors on the meta device: they have shapes, strides and dtypes, and count as aligned
    to 16 bytes. It holds for the whole process, other threads included, until the block ends, however it ends.

    Raises:
        ValueError: an architecture that is not in CHIPS.
        CompileError: from within, by the launch of a kernel that does not compile.
    """
    if arch not in CHIPS:
        raise ValueError(f"arch={arch} is unknown; choose one of {', '.join(map(str, CHIPS))}")
    compiled: list[Compiled] = []

    def record(kernel, *args, grid, warmup, **options):
        with _short_errors(kernel.fn.__name__, arch):
            result = _RUN(kernel, *args, grid=grid, warmup=True, **options)
        compiled.append(_compiled(result, arch))
        return result

    with mock.patch.object(driver, "_active", _AbsentGpu(arch)), mock.patch.object(JITFunction, "run", record):
        yield compiled


def _compiled(kernel, arch: int) -> Compiled:
    data, asm = kernel.metadata, kernel.asm
    columns = getattr(data, "tmem_size", None) or 0
    pdl = getattr(data, "launch_pdl", False)
    return Compiled(kernel.name, arch, data.num_warps, data.shared, columns, pdl, asm["ptx"], asm["cubin"])


@contextmanager
def _short_errors(name: str, arch: int) -> Iterator[None]:
    """Turns pages of PTX or MLIR, printed and raised, into one line; passes on what is said when nothing fails."""
    printed, log = StringIO(), bytearray()
    try:
        with redirect_stdout(printed), _stderr_into(log):
            yield
    except (CompilationError, PTXASError, RuntimeError) as error:
        said = error.error_message if isinstance(error, CompilationError) else str(error)
        complaint = _complaint(f"{said}\n{log.decode(errors='replace')}") or said or type(error).__name__
        why = None if isinstance(error, PTXASError) else error  # the former holds all of the PTX's troubles, at length
        raise CompileError(f"{name} for sm_{arch}: {complaint[:500]}") from why
    print(printed.getvalue(), end="")
    os.write(2, log)


def _complaint(text: str) -> str:
    """The first line in which ptxas or a pass of the compiler speaks of an error."""
    text = re.sub(r"(?m)^(ptxas\S*) /\S*\.ptx,", r"\1:", text)
    found = re.search(r"^(ptxas\S* .*\b(?:error|fatal)\b.*|.*: error: .*)$", text, re.MULTILINE)
    return found[1] if found else ""


@contextmanager
def _stderr_into(log: bytearray) -> Iterator[None]:
    """Appends to `log` what is written to file descriptor 2 within: the compiler's C++ knows no sys.stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            log += file.read()


def _run_tool(name: str, *options: str, cubin: bytes) -> str:
    """What a program that Triton ships says about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = getattr(triton.knobs.nvidia, name).path
        return subprocess.run([tool, *options, file.name], check=True, capture_output=True, text=True).stdout

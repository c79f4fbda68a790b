"""What kernels are compiled for and launched on: the architecture, multiprocessors, how launches follow each other."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from triton.runtime import driver

# Triton decides this when `triton.jit` decorates, so it is decided here at the same moment, once.
INTERPRETED = triton.knobs.runtime.interpret

# Multiprocessors of the part of each architecture that is meant where there is no device to ask.
_SMS = {80: 108, 90: 132, 100: 148}

# One row of counters a stream; no grid that counts arrivals has more tiles than a row has counters.
COUNTERS = 4096
_STREAMS = 32
_rows: dict[tuple[torch.device, int], torch.Tensor] = {}
_unused_rows: dict[torch.device, list[torch.Tensor]] = {}

_sms_left = 0  # for others, by persistent kernels


@functools.cache
def _arch(device: int) -> int:
    return driver.active.get_current_target().arch


def arch() -> int:
    """The compute capability that Triton compiles for now, 10 * major + minor: 90 on a H200; 0 in the interpreter."""
    return 0 if INTERPRETED else _arch(driver.active.get_current_device())


@functools.cache
def _sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def num_sms(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; elsewhere those of the architecture that is compiled for (interpreter: 3)."""
    return _sms(device) if device.type == "cuda" else _SMS.get(arch(), 3)


def free_sms(device: torch.device) -> int:
    """Multiprocessors that a persistent kernel takes: all, but for those that are left to others just now."""
    return max(1, num_sms(device) - _sms_left)


@contextlib.contextmanager
def leaving_sms(count: int) -> Iterator[None]:
    """Within it persistent kernels are launched on all multiprocessors but `count`, in every thread of this process.

    Else a collective that starts meanwhile would wait for a whole GEMM: its programs fit beside none of these.
    """
    global _sms_left
    before, _sms_left = _sms_left, count
    try:
        yield
    finally:
        _sms_left = before


def has_pdl() -> bool:
    """Whether launches may overlap by programmatic dependent launch: from sm_90 on; below, its PTX does not assemble.

    A kernel that is launched with `**launch_options()` may start while the kernel before it in the stream still runs.
    So it calls `gdc_wait`, on every path and before any loop, before it reads anything that a kernel may have written
    and before it writes anything at all: outputs, workspaces and counters alike, as the kernel before may still use
    them. The wait returns when the kernel before has completed, and with it, because it has waited too, all before that
    one. What may stand before the wait is index arithmetic and `prefetch_l2`, which is right even for memory that is
    being written. (Triton moves pipelined loads above a wait inside their loop: triton-lang/triton#11905.)
    """
    return arch() >= 90


def launch_options() -> dict[str, bool]:
    """Options for the launch of a kernel that is given PDL=has_pdl()."""
    return {"launch_pdl": True} if has_pdl() else {}


@triton.jit
def prefetch_l2(pointers):
    """Starts bringing the lines at `pointers` into L2 and does not wait.

    A hint that cannot go stale: all multiprocessors' writes meet in L2, so a line fetched early is read as it is then.
    """
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )


def arrival_counters(device: torch.device) -> torch.Tensor:
    """int32 [COUNTERS] of the current stream, all 0: who counts arrivals in them leaves them 0, by its last to arrive.

    Kernels of one stream run one after another and so share a row; like cuBLAS' workspaces, the rows assume that a
    captured graph does not run at the same time as another one captured on the same stream.

    Raises:
        RuntimeError: no row is left and the stream is being captured: zeroing new ones would become part of the graph.
    """
    stream = driver.active.get_current_stream(device.index) if device.type == "cuda" else 0
    row = _rows.get((device, stream))
    if row is None:
        unused = _unused_rows.setdefault(device, [])
        if not unused:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("a kernel that counts arrivals runs once outside a CUDA graph before it is captured")
            unused.extend(torch.zeros(_STREAMS, COUNTERS, dtype=torch.int32, device=device))
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # the other rows go to other streams
        row = _rows[device, stream] = unused.pop()
    return row

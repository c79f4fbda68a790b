"""A group of ranks on one GPU, of which one runs and whose all-reduces are emulated: as long and as wide as NCCL's.

    all_reduce(x) = size * x        as if every rank held what this one holds; exact in every dtype for 2, 4, 8 ranks

An emulated all-reduce is a copy kernel on a high-priority side stream. It has as many programs (CTAs) as NCCL takes,
and moves bytes back and forth for as long as NCCL was published to take for that size; only then it writes the sum, so
that who does not wait for it reads something else.

    compute   [ gemm 0 ][ gemm 1 ]        [ next
    side                [ copy ..., x * R ][ copy ..., x * R ]

What is real: the schedules' own code, streams, events, CUDA graphs; the SMs and the memory traffic that a GEMM goes
without. What is not: NVLink, the other ranks' delays, NCCL's own launch. How many bytes are moved is measured on this
GPU, once for each size of message, so that the kernel alone, in a CUDA graph, takes the published time.

On the CPU, for tests, the side stream is a thread that sleeps for that time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl
from torch.profiler import record_function

from bench.on_gpu.all_reduce import PUBLISHED_US
from bench.record import spread
from bench.timing import time_us
from tp_runtime.comm import Handle, NullCommunicator

# "NVLS-class all-reduce saturates at 4 to 16 CTAs": the most of them, which leaves the GEMM the least.
CTAS = 16
# One program fills an SM's registers, as NCCL's do: none of its threads share an SM with a GEMM's (see the tests).
NUM_WARPS = 16
BLOCK_BYTES = 128 << 10
EMULATED = f"NCCL emulated: {CTAS} CTAs, its published time"
NCCL, ONE_SHOT = "NCCL", "SGLang"  # whose times are taken: for low-latency kernels SGLang's, published to 1 MiB
ONE_SHOT_BYTES = 1 << 20
_PROBE_SHARE = 1 << 20
_UNIT = 16  # elements: a share of whole ones is moved by 16 bytes at a time
_CORRECTIONS = 3


def published_us(size: int, num_bytes: int, peer: str = NCCL) -> float:
    """How long a peer's all-reduce takes in a CUDA graph, on H200s with NVLink.

    Between two published sizes a straight line in the logarithms; below the least as long as that one, which is
    latency; above the largest in proportion to the bytes.

    Raises:
        ValueError: nothing is published for that many ranks.
    """
    if size not in PUBLISHED_US:
        raise ValueError(f"tp_size={size}: NCCL's times are published for {', '.join(map(str, PUBLISHED_US))} ranks")
    points = sorted((num, of[peer]) for num, of in PUBLISHED_US[size].items() if peer in of)
    (least, least_us), (most, most_us) = points[0], points[-1]
    if num_bytes <= least:
        return least_us
    if num_bytes >= most:
        return most_us * num_bytes / most
    (a, a_us), (b, b_us) = next(pair for pair in zip(points, points[1:]) if num_bytes <= pair[1][0])
    return a_us * (b_us / a_us) ** (math.log(num_bytes / a) / math.log(b / a))


@triton.jit
def _all_reduce_kernel(x_ptr, scratch_ptr, n, share, size, BLOCK: tl.constexpr):
    """Each program moves `share` elements from one half of the scratch to the other: a block on the way there, past the
    last one on the way back. Then the sum."""
    first, programs, blocks = tl.program_id(0), tl.num_programs(0), tl.cdiv(n, BLOCK)
    cols = tl.arange(0, BLOCK)
    for moved in range(0, share, BLOCK):
        block = first + moved // BLOCK * programs
        offs = block % blocks * BLOCK + cols
        mask = (offs < n) & (cols < share - moved)
        source = block // blocks % 2 * n
        part = tl.load(scratch_ptr + source + offs, mask=mask)
        tl.store(scratch_ptr + (n - source) + offs, part, mask=mask)
    for block in range(first, blocks, programs):
        offs = block * BLOCK + cols
        x = tl.load(x_ptr + offs, mask=offs < n)
        tl.store(x_ptr + offs, (x * size).to(x.dtype), mask=offs < n)


def launch(
    x: torch.Tensor, scratch: torch.Tensor, share: int, size: int, ctas: int = CTAS, block_bytes: int = BLOCK_BYTES
) -> None:
    """size * x, in place, after each of `ctas` programs has moved `share` elements.

    Args:
        x: contiguous.
        scratch: [2, number of elements of x], of x's dtype.
    """
    assert x.is_contiguous() and scratch.shape == (2, x.numel()) and scratch.dtype == x.dtype
    _all_reduce_kernel[(ctas,)](
        x, scratch, x.numel(), share, size, BLOCK=block_bytes // x.itemsize, num_warps=NUM_WARPS
    )  # fmt: skip


class EmulatedCommunicator(NullCommunicator):
    """Rank 0 of `size`, alone in this process.

    Attributes:
        calibrated_us: peer, message bytes -> what the emulated all-reduce alone was measured to take.

    Raises:
        ValueError: NCCL's times are not published for that many ranks.
    """

    one_shot_above = 0
    collective_sms = CTAS

    def __init__(self, size: int, device: torch.device | str):
        super().__init__(0, size, device)
        published_us(size, 0)
        self.calibrated_us: dict[tuple[str, int], float] = {}
        self._shares: dict[tuple, tuple[torch.Tensor, int]] = {}  # by peer, dtype and number of elements
        self._on_cuda = self.device.type == "cuda"
        self._side = torch.cuda.Stream(self.device, priority=-1) if self._on_cuda else ThreadPoolExecutor(1)

    def all_reduce(self, x):
        self.all_reduce_async(x).wait()
        return x

    def all_reduce_async(self, x):
        if not self._on_cuda:
            return Handle(self._side.submit(self._sum_late, x, NCCL).result)
        scratch, share = self._calibrated(x, NCCL)
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            launch(x, scratch, share, self.size)
            done = self._side.record_event()
        return Handle(lambda: torch.cuda.current_stream().wait_event(done))

    def all_reduce_one_shot(self, x):
        """In the current stream, for as long as a low-latency kernel was published to take; large ones are NCCL's."""
        if x.nbytes > ONE_SHOT_BYTES:
            return self.all_reduce(x)
        if self._on_cuda:
            launch(x, *self._calibrated(x, ONE_SHOT), self.size)
        else:
            self._sum_late(x, ONE_SHOT)
        return x

    def barrier(self):
        """Nobody to wait for."""

    @torch.inference_mode()
    def _sum_late(self, x: torch.Tensor, peer: str) -> None:
        with record_function("emulated:all_reduce"):
            time.sleep(published_us(self.size, x.nbytes, peer) / 1e6)
            x.mul_(self.size)

    def _calibrated(self, x: torch.Tensor, peer: str) -> tuple[torch.Tensor, int]:
        """A scratch buffer and each program's share for messages like x; measured at the first one."""
        key = peer, x.dtype, x.numel()
        if key not in self._shares:
            assert not torch.cuda.is_current_stream_capturing(), "a message of a size that the call before had not"
            self._shares[key] = self._calibrate(torch.zeros_like(x), peer)
        return self._shares[key]

    def _calibrate(self, x: torch.Tensor, peer: str) -> tuple[torch.Tensor, int]:
        scratch = torch.zeros(2, x.numel(), dtype=x.dtype, device=x.device)

        def alone_us(share: int) -> float:
            times = time_us({"": lambda i: launch(x, scratch, share, self.size)}, 1, repeats=5)
            return spread(times[""])["median"]

        share, us = calibrate(alone_us, published_us(self.size, x.nbytes, peer))
        self.calibrated_us[peer, x.nbytes] = us
        return scratch, share


def calibrate(alone_us: Callable[[int], float], target_us: float) -> tuple[int, float]:
    """A share that takes `target_us`, and what it was measured to take; 0 where the launch alone takes longer.

    Args:
        alone_us: share -> measured time.
    """
    share, us = 0, alone_us(0)
    per_element_us = (alone_us(_PROBE_SHARE) - us) / _PROBE_SHARE
    for _ in range(_CORRECTIONS):
        share = max(0, round((share + (target_us - us) / per_element_us) / _UNIT) * _UNIT)
        us = alone_us(share)
    return share, us

"""bench/compiled.py: kernels compiled for GPUs that are not there, as their launcher would launch them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.compiled import CHIPS, CompileError, occupancy, recording

ROOT = Path(__file__).resolve().parent.parent
TENSOR_CORES = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}


@triton.jit
def _product_kernel(x_ptr, w_ptr, y_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    offs_m, offs_n, offs_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((N, M), tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        x = tl.load(x_ptr + offs_m[:, None] * K + (k + offs_k)[None, :])
        w = tl.load(w_ptr + offs_n[:, None] * K + (k + offs_k)[None, :])
        acc = tl.dot(w, x.T, acc)
    tl.store(y_ptr + offs_m[None, :] * N + offs_n[:, None], acc.to(y_ptr.dtype.element_ty))


@triton.jit
def _refused_kernel(x_ptr):
    tl.static_print("before it is refused")
    value = tl.inline_asm_elementwise("no.such $0, $1;", "=r,r", [tl.load(x_ptr)], tl.int32, is_pure=False, pack=1)
    tl.store(x_ptr, value)


@triton.jit
def _unnamed_kernel(x_ptr):
    tl.store(x_ptr, no_such_name)  # noqa: F821


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def product(m=16, n=64, block_k=64, **options):
    """One launch of the sample kernel, as a launcher makes it."""
    x, w, y = meta(m, 4096), meta(n, 4096), meta(m, n)
    _product_kernel[(1,)](x, w, y, 4096, m, n, block_k, **options)


@pytest.mark.parametrize("arch", CHIPS)
def test_a_launch_is_compiled_for_the_named_chip(arch):
    """Catches figures of another chip, or of other options, than were asked for."""
    with recording(arch) as compiled:
        product(num_warps=4, num_stages=3)
        product(num_warps=8, num_stages=3)
    four, eight = compiled
    assert (four.name, four.arch, four.num_warps, eight.num_warps) == ("_product_kernel", arch, 4, 8)
    for kernel in compiled:
        assert f".target sm_{arch}" in kernel.ptx
        assert 16 <= kernel.registers <= 255
        assert kernel.spill_bytes == 0
        # three stages of x and w
        assert 2 * (16 + 64) * 64 * 2 <= kernel.shared_bytes <= 3 * (16 + 64) * 64 * 2 + 2048
        assert kernel.occupancy >= 2
    assert four.count(TENSOR_CORES[arch]) > 0
    assert four.count_sass("HMMA|HGMMA|UTCHMMA") > 0


def test_spills_are_seen():
    """Catches a spill count that is always 0."""
    with recording(80) as compiled:
        product(m=128, n=128, num_warps=4, maxnreg=64)
    (kernel,) = compiled
    assert kernel.registers == 64
    assert kernel.spill_bytes > 0


def test_one_process_compiles_for_all_chips_in_turn():
    """Catches Triton's caches answering with the first chip's kernel."""
    targets = []
    for arch in (90, 80, 100, 90):
        with recording(arch) as compiled:
            product()
        targets.append(compiled[0].ptx.split(".target sm_")[1].split()[0].strip("a,"))
    assert targets == ["90", "80", "100", "90"]


def test_everything_is_put_back():
    """Catches a driver that says sm_90 ever after, on a machine that has another GPU or none."""
    before = driver._active, JITFunction.run
    with pytest.raises(KeyError), recording(90):
        raise KeyError
    with recording(80), pytest.raises(CompileError):
        _refused_kernel[(1,)](meta(1, dtype=torch.int32))
    assert (driver._active, JITFunction.run) == before


def test_recordings_nest():
    """Catches an inner recording that takes the outer one's launches, or ends it."""
    with recording(90) as outer:
        product()
        with recording(80) as inner:
            product()
        product()
    assert [kernel.arch for kernel in outer + inner] == [90, 90, 80]


def test_what_ptxas_refuses_is_one_line(capfd):
    """Catches the pages of PTX that Triton prints and raises."""
    with pytest.raises(CompileError) as caught, recording(90):
        _refused_kernel[(1,)](meta(1, dtype=torch.int32))
    message = str(caught.value)
    assert message.startswith("_refused_kernel for sm_90: ptxas")
    assert ".such" in message
    assert "\n" not in message and len(message) < 200
    assert capfd.readouterr() == ("", "")


def test_what_triton_refuses_names_the_kernel():
    """Catches an error among hundreds of configurations that does not say whose it is."""
    with pytest.raises(CompileError, match="_unnamed_kernel for sm_100: .*no_such_name"), recording(100):
        _unnamed_kernel[(1,)](meta(1))


def test_an_unknown_chip_is_refused():
    """Catches a chip whose limits nobody wrote down."""
    with pytest.raises(ValueError, match="arch=75 is unknown; choose one of 80, 90, 100"), recording(75):
        pass


# NVIDIA's occupancy calculator, sm_80 and sm_90: warps, registers, shared bytes -> blocks on one SM
@pytest.mark.parametrize(
    ("arch", "num_warps", "registers", "shared_bytes", "blocks"),
    [
        (80, 4, 32, 0, 16),  # 64 warps
        (90, 1, 32, 0, 16),  # a warp's place is a quarter of the SM: 64 places, 4 a block
        (80, 4, 128, 0, 4),
        (80, 4, 129, 0, 3),  # 136 registers: 3 warps a quarter
        (80, 8, 255, 0, 1),
        (90, 12, 168, 200 * 1024, 1),
        (80, 4, 32, 41 * 1024, 3),  # 1 KiB more a block: 3 x 42, not 4 x 41
        (90, 4, 32, 113 * 1024, 2),
        (90, 4, 32, 114 * 1024, 1),
        (80, 4, 32, 164 * 1024, 0),
        (90, 4, 32, 228 * 1024, 0),
        (90, 32, 72, 0, 0),  # 1024 threads of 72 registers: no room for one block
    ],
)
def test_occupancy(arch, num_warps, registers, shared_bytes, blocks):
    """Catches a limit that is forgotten, or a rounding."""
    assert occupancy(arch, num_warps, registers, shared_bytes) == blocks


def test_tensor_memory_limits_occupancy():
    """Catches two blocks counted where the first has taken all columns."""
    assert occupancy(100, 4, 32, 0, tensor_memory_columns=256) == 2


def test_what_is_printed_while_all_goes_well_arrives():
    """Catches messages lost: `static_print`, a warning of the compiler, a child's, the test runner's own."""
    program = (
        "import os, sys; from bench.compiled import _short_errors\n"
        "with _short_errors('k', 90): print('out'); print('err', file=sys.stderr); os.write(2, b'raw\\n')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert (done.stdout, done.stderr) == ("out\n", "err\nraw\n")

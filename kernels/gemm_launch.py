"""How the kernels of `gemm_kernels` are launched, and which configurations of them make sense for a shape."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from .gemm_configs import Config, Configs, Decode, Prefill, Vector, as_rows, has_tma_layout
from .gemm_kernels import _decode_kernel, _prefill_kernel, _vector_kernel
from .target import COUNTERS, arch, arrival_counters, free_sms, has_pdl, launch_options, num_sms
from .tuned import triton_minor

DECODE_M = 128  # most tokens of the decode kernel
LANE = 8  # elements of 16 bits in the 16 bytes of the widest load
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # of one program, at most
TRITON = tuple(map(int, triton_minor().split(".")))


def split_k(n: int, k: int, config: Decode, sms: int) -> int:
    """Programs that share a tile of the decode kernel."""
    tiles = triton.cdiv(n, config.block_n)
    return max(1, min(sms * config.programs_per_sm // tiles, triton.cdiv(k, config.block_k), 16))


def block_m(m: int) -> int:
    """Tokens of a decode tile: M, padded to what tensor cores take."""
    return max(16, triton.next_power_of_2(m))


def store_n(config: Prefill) -> int:
    """Columns of a prefill tile that go through bias, activation and residual to y at a time: as many as the registers
    beside the accumulators have room for."""
    if config.specialize and TRITON < (3, 7):  # which does not compile the cutting of such a tile
        return config.block_n
    return min(config.block_n, 64)


def launched(config: Config, activation: str | None) -> Config:
    """What is launched in place of `config`: the erf of exact gelu wants more registers than a flattened loop and
    specialised warps leave it."""
    if activation == "gelu" and isinstance(config, Prefill) and (config.flatten or config.specialize):
        return config._replace(num_warps=8, flatten=False, specialize=False)
    return config


def shared_bytes(m: int, config: Config, gated: bool) -> int:
    """Shared memory of a program, at most: what its loads have in flight, and for prefill what is being stored."""
    rows = {Vector: 1, Decode: block_m(m), Prefill: getattr(config, "block_m", 0)}[type(config)]
    step = (rows + (2 if gated else 1) * config.block_n) * config.block_k * 2
    if not isinstance(config, Prefill):
        return step * config.num_stages
    tiles = 2 if config.flatten and not gated else 1  # of y, and of the residual; else that lies where y will
    return step * config.num_stages + tiles * rows * store_n(config) * 2


def launch(
    x: torch.Tensor,
    w: torch.Tensor,
    up: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    activation: str | None,
    config: Config,
    sms: int | None = None,
) -> torch.Tensor:
    """Fill y[..., N] by the kernel that `config` configures, and return it.

    Args:
        x: [..., K]; w, up: [N, K]; residual, y: [..., N]: floats of one dtype, no dimension 0, each with `has_rows`.
        bias: [N], of w; with `up` [2 * N], of both.
        activation: of the product with w; None: the identity.
        sms: multiprocessors that a Prefill takes, and that a Decode splits K for; None: all that are free.

    Raises:
        ValueError: rows that the kernel cannot read or write, or more of them than it takes.
    """
    if x.is_cuda and x.get_device() != torch.cuda.current_device():  # where Triton launches
        with torch.cuda.device(x.device):
            return launch(x, w, up, bias, residual, y, activation, config, sms)
    config = launched(config, activation)
    bias = None if bias is None else bias.contiguous()
    x, w, up, residual, rows_of_y = map(as_rows, (x, w, up, residual, y))
    operands = (x, w, up, bias, residual, rows_of_y, activation)
    if isinstance(config, Vector):
        _launch_vector(*operands, config)
    elif isinstance(config, Decode):
        _launch_decode(*operands, config, sms or num_sms(x.device))
    else:
        _launch_prefill(*operands, config, sms or free_sms(x.device))
    return y


def _launch_vector(x, w, up, bias, residual, y, activation, config: Vector) -> None:
    n, k = w.shape
    if len(x) != 1:
        raise ValueError(f"the vector kernel takes one row of x, not {len(x)}")
    _vector_kernel[(triton.cdiv(n, config.block_n),)](
        x, w, up, bias, residual, y, n, k, w.stride(0), 0 if up is None else up.stride(0),
        ACTIVATION=activation, PREFETCH_K=_prefetch_k(config), PDL=has_pdl(),
        BLOCK_N=config.block_n, BLOCK_K=config.block_k, STAGES=config.num_stages, num_warps=config.num_warps,
        **launch_options(),
    )  # fmt: skip


def _launch_decode(x, w, up, bias, residual, y, activation, config: Decode, sms: int) -> None:
    (m, k), n = x.shape, len(w)
    if m > DECODE_M:
        raise ValueError(f"the decode kernel takes at most {DECODE_M} rows of x, not {m}")
    tiles, splits, rows = triton.cdiv(n, config.block_n), split_k(n, k, config, sms), block_m(m)
    partials = arrived = None
    if splits > 1:
        assert tiles <= COUNTERS  # there are several programs a tile only where tiles are few
        size = tiles * splits * config.block_n * rows * (1 if up is None else 2)
        partials = torch.empty(size, dtype=torch.float32, device=x.device)
        arrived = arrival_counters(x.device)
    _decode_kernel[(tiles, splits)](
        x, w, up, bias, residual, y, partials, arrived,
        m, n, k, x.stride(0), w.stride(0), 0 if up is None else up.stride(0),
        0 if residual is None else residual.stride(0), y.stride(0),
        ACTIVATION=activation, SPLITS=splits, PREFETCH_K=_prefetch_k(config), PDL=has_pdl(),
        BLOCK_M=rows, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages, **launch_options(),
    )  # fmt: skip


def _prefetch_k(config: Vector | Decode) -> int:
    """Columns of w that are fetched before the kernel before ends: as many as the pipeline then asks for first."""
    return max(64, triton.next_power_of_2(config.block_k * (config.num_stages - 1)))


def _launch_prefill(x, w, up, bias, residual, y, activation, config: Prefill, sms: int) -> None:
    (m, k), n = x.shape, len(w)
    if not has_tma_layout(x, w, up, residual, y):
        raise ValueError("the prefill kernel takes matrices whose rows lie at multiples of 16 bytes")

    grid = min(sms, triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n))
    columns = store_n(config)
    blocks = {"x": (x, config.block_m, config.block_k), "w": (w, config.block_n, config.block_k)}
    blocks |= {"w_up": (up, config.block_n, config.block_k)}
    blocks |= {"residual": (residual, config.block_m, columns), "y": (y, config.block_m, columns)}
    if config.specialize:
        triton.set_allocator(_scratch)
        arguments = {name: matrix for name, (matrix, *_) in blocks.items()}
    else:
        arguments = {
            name: None if matrix is None else TensorDescriptor.from_tensor(matrix, block)
            for name, (matrix, *block) in blocks.items()
        }
        arguments["maxnreg"] = 255  # no second program fits beside it; else ptxas spills at fewer, on sm_100
    _prefill_kernel[(grid,)](
        **arguments, bias_ptr=bias, M=m, N=n, K=k,
        stride_xm=x.stride(0), stride_wn=w.stride(0), stride_un=0 if up is None else up.stride(0),
        stride_rm=0 if residual is None else residual.stride(0), stride_ym=y.stride(0),
        ACTIVATION=activation, PDL=has_pdl(), FLATTEN=config.flatten, SPECIALIZE=config.specialize,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, STORE_N=columns,
        GROUP_M=config.group_m, num_warps=config.num_warps, num_stages=config.num_stages, **launch_options(),
    )  # fmt: skip


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory in which a kernel makes its descriptors; the caching allocator's, as that of all other workspaces."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def candidates_for(m: int, k: int, configs: Configs, gated: bool) -> Iterator[tuple[str, Config]]:
    """(kernel, configuration) that make sense for M tokens of K features on the architecture that is compiled for."""
    limit = SHARED_BYTES.get(arch(), 1 << 20)
    for kernel, several in configs.items():
        for config in several:
            resident = max(1, getattr(config, "programs_per_sm", 1))  # at a time: each waits for those of its tile
            if _suits(m, k, config, gated) and resident * shared_bytes(m, config, gated) <= limit:
                yield kernel, config


def _suits(m: int, k: int, config: Config, gated: bool) -> bool:
    if isinstance(config, Vector):
        return m == 1
    if isinstance(config, Decode):  # two accumulators fill the registers sooner; with short steps, sm_100's spill
        return m <= (DECODE_M // 2 if gated else DECODE_M) and (arch() != 100 or config.block_k > 64)
    # Below sm_90 Triton neither pipelines loads by descriptor nor keeps their pointers in registers; on sm_100 it
    # specialises warps in a way that spills, and that Triton 3.6 does not compile.
    fits_chip = arch() != 80 and (arch() != 100 or not config.specialize)
    return fits_chip and m > 32 and k % LANE == 0 and config.block_m <= 2 * triton.next_power_of_2(m)

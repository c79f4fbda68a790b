"""The mean squares of q and of k over all heads, of which this rank holds some: its part of both, in one launch.

    y[..., 0] = sum(x[..., q_start : q_stop]^2) / q_width          y[..., 1]: of k, likewise

Where each element is in the part of one rank, the ranks' y add up to what a norm over all heads divides by. The launch
is what it costs: two programs a token read a row that the GEMM before has just left in L2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def mean_squares_ref(x: torch.Tensor, bounds: Sequence[int], widths: Sequence[int]) -> torch.Tensor:
    """`mean_squares` in plain torch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = (x[..., bounds[i] : bounds[i + 1]].to(wide) for i in (0, 2))
    return torch.stack([row.square().sum(-1) / width for row, width in zip(rows, widths)], dim=-1)


def mean_squares(x: torch.Tensor, bounds: Sequence[int], widths: Sequence[int]) -> torch.Tensor:
    """This rank's part of the mean squares of two ranges of columns.

    Args:
        x: [..., W], rows anywhere, each contiguous.
        bounds: (q_start, q_stop, k_start, k_stop): the columns that this rank answers for; a range may be empty.
        widths: (q_width, k_width) over all ranks.

    Returns:
        float32 [..., 2]. The same bits at each run.

    Raises:
        ValueError: bounds that are no columns of x.

    Numerics: summed in fp32.
    """
    if torch.compiler.is_compiling():
        return torch.ops.tp_runtime.mean_squares(x, bounds, widths)
    return _op(x, bounds, widths) if x.is_cuda else mean_squares_ref(x, bounds, widths)


_library = torch.library.Library("tp_runtime", "FRAGMENT")
_library.define("mean_squares(Tensor x, int[] bounds, int[] widths) -> Tensor")


def _op(x: torch.Tensor, bounds: Sequence[int], widths: Sequence[int]) -> torch.Tensor:
    if (len(bounds), len(widths)) != (4, 2) or not all(0 <= bounds[i] <= bounds[i + 1] <= x.shape[-1] for i in (0, 2)):
        raise ValueError(f"bounds {[*bounds]} and widths {[*widths]} are not of two ranges of {x.shape[-1]} columns")
    if not x.is_cuda:
        return mean_squares_ref(x, bounds, widths)
    from .mean_squares_kernel import run

    return run(x, bounds, widths)


def _fake(x: torch.Tensor, bounds: Sequence[int], widths: Sequence[int]) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], 2, dtype=torch.float32)


_library.impl("mean_squares", _op, "CPU")
_library.impl("mean_squares", _op, "CUDA")
_library.impl("mean_squares", _fake, "Meta")

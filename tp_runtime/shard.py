"""Plan entry + rank -> which slice of a tensor goes where. Pure arithmetic on slices; knows neither torch nor files.

A parameter may lie in one tensor or, like packed experts, in many; a rank holds one or several ranges of it. Both cuts
are applied here, once, for reading checkpoints, for cutting a live model and for putting it together again.
"""

from __future__ import annotations

from dataclasses import dataclass

from .models.adapter import Source
from .plan import ParameterPlan


@dataclass(frozen=True)
class Copy:
    """`local[local_index] = stored[stored_index]`, the last two dimensions of stored swapped if `transposed`."""

    stored_index: tuple[slice, ...]
    local_index: tuple[int | slice, ...]
    transposed: bool = False


def copies(parameter: ParameterPlan, rank: int, source: Source) -> list[Copy]:
    """The copies that bring `rank`'s part of one stored tensor into the rank's local parameter.

    Args:
        parameter: the parameter's plan, full shape [..., rows, columns].
        source: a stored tensor: the whole parameter, or some rows of one expert of it.

    Returns:
        Copies with non-empty slices; none where the rank holds nothing of this tensor.
    """
    # The box of the full parameter that the stored tensor covers.
    low, high = [0] * len(parameter.shape), list(parameter.shape)
    if source.expert is not None:
        low[0], high[0] = source.expert, source.expert + 1
        low[1], high[1] = source.row, source.row + source.shape[0]

    found, position = [], 0
    dim = parameter.dim or 0
    for start, stop in parameter.ranges[rank]:
        first, last = max(start, low[dim]), min(stop, high[dim])
        if first < last:
            stored = [slice(None)] * len(low)
            local: list[int | slice] = [slice(a, b) for a, b in zip(low, high, strict=True)]
            stored[dim] = slice(first - low[dim], last - low[dim])
            local[dim] = slice(position + first - start, position + last - start)
            if source.expert is not None:
                stored, local[0] = stored[1:], source.expert
            if source.transposed:
                stored[-1], stored[-2] = stored[-2], stored[-1]
            found.append(Copy(tuple(stored), tuple(local), source.transposed))
        position += stop - start
    return found

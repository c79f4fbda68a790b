"""How close a result has to be to the true one: nobody chooses a tolerance, torch sets it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

FACTOR = 2
SHUFFLES = 16


def assert_as_exact_as(got: torch.Tensor, torch_result: torch.Tensor | Iterable[torch.Tensor], want_fp64: torch.Tensor):
    """Max and RMS error of `got` against `want_fp64` are at most FACTOR times those of torch in the same dtype.

    Where torch is exact, ours has to be. A NaN is an error; so is another shape or dtype than torch's.

    Args:
        got: ours, any dtype, any device.
        torch_result: torch's own: the same shape, the same dtype. Several: the same sums in other orders, as by
            `shuffles`; torch's error is the largest of theirs. In float32 the largest error of a few hundred numbers is
            luck, which is another on each CPU; in half precision the last rounding, the same for all, is most of it.
        want_fp64: the same in float64, from the very inputs (rounded as they were given).
    """
    every = [torch_result] if isinstance(torch_result, torch.Tensor) else list(torch_result)
    assert want_fp64.dtype == torch.float64, f"{want_fp64.dtype} is no measure: float64"
    assert (got.shape, got.dtype) == (want_fp64.shape, every[0].dtype), (
        f"{list(got.shape)} {got.dtype}, where torch has {list(want_fp64.shape)} {every[0].dtype}"
    )
    if got.numel() == 0:
        return
    theirs = map(max, zip(*(errors(one, want_fp64) for one in every), strict=True))
    for name, our, their in zip(("max", "RMS"), errors(got, want_fp64), theirs):
        assert our <= FACTOR * their, f"{name} error {our:.3g} is more than {FACTOR} times torch's {their:.3g}"


def shuffles(size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Orders in which to sum `size` products: several in float32, else the given one."""
    generator = torch.Generator().manual_seed(size)
    more = SHUFFLES - 1 if dtype == torch.float32 else 0
    return [torch.arange(size), *(torch.randperm(size, generator=generator) for _ in range(more))]


def errors(got: torch.Tensor, want_fp64: torch.Tensor) -> tuple[float, float]:
    """Max and RMS error of a tensor that is not empty; NaN where it holds one."""
    error = (got.detach().to(want_fp64.device, torch.float64) - want_fp64).abs()
    return error.max().item(), error.square().mean().sqrt().item()

"""How close a result has to be to the true one: nobody chooses a tolerance, torch sets it."""

from __future__ import annotations

import math

import torch


def assert_as_exact_as(got: torch.Tensor, torch_result: torch.Tensor, want_fp64: torch.Tensor, factor: float = 2):
    """Max and RMS error of `got` against `want_fp64` are at most `factor` times those of torch in the same dtype.

    Where torch is exact, ours has to be. A NaN is an error; so is another shape or dtype than torch's.

    In float32 an error is a sum of many roundings, so about normally distributed, and the largest of few is luck, which
    differs from CPU to CPU: torch's counts as at least what n such errors of its RMS let expect, sqrt(2 ln 2n) of it. In
    half precision the last rounding, the same for both, is most of the error.

    Args:
        got: ours, any dtype, any device.
        torch_result: torch's own: the same shape, the same dtype.
        want_fp64: the same in float64, from the very inputs (rounded as they were given).
    """
    assert want_fp64.dtype == torch.float64, f"{want_fp64.dtype} is no measure: float64"
    assert (got.shape, got.dtype) == (want_fp64.shape, torch_result.dtype), (
        f"{list(got.shape)} {got.dtype}, where torch has {list(want_fp64.shape)} {torch_result.dtype}"
    )
    if got.numel() == 0:
        return
    ours, theirs = errors(got, want_fp64), errors(torch_result, want_fp64)
    if got.dtype == torch.float32:
        theirs = max(theirs[0], math.sqrt(2 * math.log(2 * got.numel())) * theirs[1]), theirs[1]
    for name, our, their in zip(("max", "RMS"), ours, theirs):
        assert our <= factor * their, f"{name} error {our:.3g} is more than {factor} times torch's {their:.3g}"


def errors(got: torch.Tensor, want_fp64: torch.Tensor) -> tuple[float, float]:
    """Max and RMS error of a tensor that is not empty; NaN where it holds one."""
    error = (got.detach().to(want_fp64.device, torch.float64) - want_fp64).abs()
    return error.max().item(), error.square().mean().sqrt().item()

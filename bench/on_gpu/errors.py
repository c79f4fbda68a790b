"""The measure of right: our error against a more exact result, over torch's own in the same dtype."""

from __future__ import annotations

import math

import torch

MOST_OVER_TORCH = 2.0


def against(want: torch.Tensor, ours: torch.Tensor, torchs: torch.Tensor) -> dict:
    """Max and RMS error of `ours` over those of `torchs`.

    Args:
        want: the same computed more exactly.

    Returns:
        max_ratio and rms_ratio, None where ours holds a NaN or infinity that `want` has not, or is wrong where torch is
        exact; max_error, rms_error; is_ok.
    """
    (our_max, our_rms), (their_max, their_rms) = (_errors(got, want) for got in (ours, torchs))
    ratios = [_ratio(our_max, their_max), _ratio(our_rms, their_rms)]
    is_ok = all(ratio is not None and ratio <= MOST_OVER_TORCH for ratio in ratios)
    errors = [value if math.isfinite(value) else None for value in (our_max, our_rms)]
    return dict(zip(("max_ratio", "rms_ratio", "max_error", "rms_error"), [*ratios, *errors])) | {"is_ok": is_ok}


def _errors(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    if want.numel() == 0:
        return 0.0, 0.0
    error = (got.to(torch.float64) - want).abs_()
    return error.max().item(), error.square_().mean().sqrt().item()


def _ratio(ours: float, theirs: float) -> float | None:
    if not math.isfinite(ours) or (theirs == 0 and ours > 0):
        return None
    return ours / theirs if theirs else 1.0


def free_bytes(device: str) -> float:
    """Memory that is free on the device; of the CPU, unlimited."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else math.inf

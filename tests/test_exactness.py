"""exactness.py: the measure that kernels are held to."""

import contextlib

import pytest
import torch
from exactness import assert_as_exact_as


def case(dtype=torch.float16):
    torch.manual_seed(0)
    want = torch.randn(33, 70, dtype=torch.float64)
    return want.to(dtype), want


def test_torchs_own_error_is_allowed_twice():
    """Catches a measure that rejects torch itself, or takes any result."""
    theirs, want = case()
    assert_as_exact_as(theirs, theirs, want)
    error = theirs.double() - want
    assert_as_exact_as((want + 1.5 * error).float(), (want + error).float(), want)
    with pytest.raises(AssertionError, match="max error .* more than 2 times"):
        assert_as_exact_as((want + 2.5 * error).float(), (want + error).float(), want)


def test_the_largest_of_few_errors_is_luck():
    """Catches a float32 measure that fails on another CPU, and one that lets a single wrong element pass."""
    want = torch.zeros(70, dtype=torch.float64)
    error = torch.linspace(-1, 1, 70)  # its largest is 1.7 times its RMS, of normally distributed ones it would be 3.1
    for largest, is_right in ((2.5, True), (3.5, True), (4.0, False)):
        ours = error.clone()
        ours[7] = largest
        with contextlib.nullcontext() if is_right else pytest.raises(AssertionError, match="max error"):
            assert_as_exact_as(ours, error, want)
    ours = error.half()
    ours[7] = 2.5
    with pytest.raises(AssertionError, match="max error"):
        assert_as_exact_as(ours, error.half(), want)


def test_many_small_errors_count():
    """Catches a bias that hides below the largest error."""
    theirs, want = case()
    biased = want + (theirs.double() - want).abs().max()
    with pytest.raises(AssertionError, match="RMS error"):
        assert_as_exact_as(biased.float(), theirs.float(), want)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_one_wrong_value_counts(wrong):
    """Catches NaN that compares false, and so passes: an element that was never written."""
    theirs, want = case()
    got = theirs.clone()
    got[32, 69] = wrong
    with pytest.raises(AssertionError, match="max error"):
        assert_as_exact_as(got, theirs, want)


def test_shape_and_dtype_are_torchs():
    """Catches broadcasting, a float32 result that looks exact, and a measure that is none."""
    theirs, want = case()
    for got in (theirs[:1], theirs.float()):
        with pytest.raises(AssertionError, match="where torch has"):
            assert_as_exact_as(got, theirs, want)
    with pytest.raises(AssertionError, match="float64"):
        assert_as_exact_as(theirs, theirs, want.float())
    assert_as_exact_as(theirs[:0], theirs[:0], want[:0])

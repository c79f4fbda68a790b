"""exactness.py: the measure that kernels are held to."""

import pytest
import torch
from exactness import assert_as_exact_as, shuffles


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


def test_of_several_orders_the_largest_error_counts():
    """Catches a measure that fails by the luck of one order of summation, and one that takes any result."""
    theirs, want = case()
    error = theirs.double() - want
    others = [(want + some * error).float() for some in (1.0, 1.5)]
    assert_as_exact_as((want + 2.5 * error).float(), others, want)
    with pytest.raises(AssertionError, match="max error .* more than 2 times"):
        assert_as_exact_as((want + 3.5 * error).float(), others, want)
    orders = shuffles(45, torch.float32)
    assert len({tuple(order.tolist()) for order in orders}) == len(orders) == 16
    assert all(torch.equal(order.sort().values, torch.arange(45)) for order in orders)
    assert [order.tolist() for order in shuffles(3, torch.float16)] == [[0, 1, 2]]


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

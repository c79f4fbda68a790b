"""mean_squares: the CPU form, and the kernel interpreted, against float64."""

import pytest
import torch
from exactness import assert_as_exact_as
from interpreted import interpreted

from tp_runtime.kernels.mean_squares import mean_squares

FORMS = {"cpu": mean_squares, "kernel": interpreted("mean_squares_kernel").run}
OP = torch.ops.tp_runtime.mean_squares
# Of q and k the columns from and to, and the width over all ranks: parts; all; none; more than a program's block.
CASES = (
    ((0, 60, 60, 80), (120, 40)),
    ((7, 31, 50, 51), (24, 1)),
    ((0, 16, 16, 16), (32, 16)),
    ((0, 5000, 5000, 6000), (5000, 2000)),
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bounds, widths", CASES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_exact(form, bounds, widths, dtype):
    """Catches a column too many or too few, a mean over this rank's columns alone, squares of 16 bits, a row missed."""
    x = (30 * torch.randn(3, 2, bounds[3] + 9, generator=torch.Generator().manual_seed(0))).to(dtype)
    x[..., -9:] = torch.nan
    rows = [x[..., start:stop] for start, stop in (bounds[:2], bounds[2:])]
    theirs = torch.stack([row.float().pow(2).sum(-1) / width for row, width in zip(rows, widths)], -1)
    want = torch.stack([row.double().square().sum(-1) / width for row, width in zip(rows, widths)], -1)
    orders = [theirs, *(_by_halves(rows, widths, at) for at in range(1, 9))]
    got = FORMS[form](x.transpose(0, 1), bounds, widths)
    assert_as_exact_as(got, [order.transpose(0, 1) for order in orders], want.transpose(0, 1))


def _by_halves(rows: list[torch.Tensor], widths: tuple[int, int], at: int) -> torch.Tensor:
    """The same summed in another order."""
    sums = [row[..., :at].float().square().sum(-1) + row[..., at:].float().square().sum(-1) for row in rows]
    return torch.stack([total / width for total, width in zip(sums, widths)], -1)


def test_nothing_to_do():
    """Catches an empty grid."""
    for form in FORMS.values():
        assert form(torch.ones(0, 1, 24), (0, 16, 16, 24), (16, 8)).shape == (0, 1, 2)


def test_op():
    """Catches a fake of another shape or dtype."""
    for x in (torch.randn(2, 3, 24), torch.randn(2, 3, 24).half().transpose(0, 1)):
        torch.library.opcheck(OP.default, (x, (0, 16, 16, 24), (32, 8)))
    compiled = torch.compile(mean_squares, backend="eager", fullgraph=True)
    x = torch.randn(2, 3, 24)
    assert torch.equal(compiled(x, (0, 16, 16, 24), (32, 8)), mean_squares(x, (0, 16, 16, 24), (32, 8)))


@pytest.mark.parametrize("bounds", [(0, 16, 16, 25), (-1, 16, 16, 24), (16, 0, 16, 24), (0, 24)], ids=str)
def test_bad_input(bounds):
    """Catches an illegal read on the GPU."""
    with pytest.raises(ValueError, match="are not of two ranges of 24 columns"):
        OP(torch.ones(1, 24), bounds, (16, 8))

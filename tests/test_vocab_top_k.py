"""vocab_top_k: plain torch's form, and the kernel interpreted, against a stable sort."""

import functools

import pytest
import torch
from interpreted import interpreted

from tp_runtime.kernels import vocab_top_k as compiled
from tp_runtime.kernels.vocab_top_k import vocab_top_k

kernel = interpreted("vocab_top_k_kernel")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several tiles a program and several programs already with a few hundred logits."""
    monkeypatch.setattr(kernel, "BLOCK", 64)
    monkeypatch.setattr(kernel, "_CANDIDATES", 128)


FORMS = {"torch": vocab_top_k, "kernel": kernel.run}


def by_sorting(logits: torch.Tensor, k: int, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, ids = logits.float().sort(dim=-1, descending=True, stable=True)
    return values[:, :k], ids[:, :k] + offset


def assert_same(got, want):
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("k", [1, 3, pytest.param(50, marks=pytest.mark.slow)])
def test_is_a_stable_sort(form, k, dtype):
    """Catches ties settled by chance, places without the shard's offset, and a tile or program that is left out."""
    for batch, v in [(2, 70), (1, 300)]:
        torch.manual_seed(v)
        continuous = torch.randn(batch, v).to(dtype)
        ties = torch.randint(-3, 3, (batch, v)).to(dtype)  # zeros of both signs among them
        ties = torch.where((ties == 0) & (torch.rand(batch, v) < 0.5), -0.0, ties)
        for logits in (continuous, ties, torch.full((batch, v), -torch.inf, dtype=dtype)):
            assert_same(FORMS[form](logits, k, 1000), by_sorting(logits, k, 1000))


@pytest.mark.parametrize("form", FORMS)
def test_all_of_a_short_shard(form):
    """Catches padding among the results where k is all there is."""
    for v in (1, 2, 45):
        logits = torch.randn(2, v) - 100
        assert_same(FORMS[form](logits, v, 0), by_sorting(logits, v, 0))


@pytest.mark.parametrize("form", FORMS)
def test_infinities_and_nan(form):
    """Catches a NaN that is lost among the numbers, or spreads to other sequences, whatever its sign bit."""
    for k in (1, 4):
        logits = torch.randn(4, 200)
        logits[0, 150] = torch.inf
        logits[1, 199], logits[1, 3] = torch.nan, torch.inf
        logits[2, 7] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # a NaN below -inf, as bits go
        values, ids = FORMS[form](logits, k, 0)
        assert values[0, 0] == torch.inf and ids[0, 0] == 150
        assert values[1:3].isnan().all()
        assert not values[[0, 3]].isnan().any()
        assert ((ids >= 0) & (ids < 200)).all()
        if k == 1:
            assert ids[1:3, 0].tolist() == [199, 7]


@pytest.mark.parametrize("form", FORMS)
def test_views(form):
    """Catches a row stride taken for the width: the last token's logits of each sequence."""
    logits = torch.randn(3, 5, 90)[:, -1, 10:80]
    assert_same(FORMS[form](logits, 3, 7), by_sorting(logits, 3, 7))
    assert [t.shape for t in FORMS[form](logits[:0], 3, 7)] == [(0, 3), (0, 3)]


def test_parts_make_the_whole():
    """Catches an order of candidates that makes the choice depend on the number of ranks."""
    logits = torch.randint(-2, 3, (4, 301)).float()
    parts = [kernel.run(part, 6, start) for part, start in zip(logits.split(101, -1), (0, 101, 202))]
    values, ids = (torch.cat(tensors, -1) for tensors in zip(*parts))
    order = values.argsort(dim=-1, descending=True, stable=True)[:, :6]
    assert_same((values.gather(1, order), ids.gather(1, order)), by_sorting(logits, 6, 0))


def test_counters_are_left_at_zero():
    """Catches a second call that finds the first one's arrivals."""
    logits = torch.randn(3, 300)
    first = kernel.run(logits, 2)
    assert_same(kernel.run(logits, 2), first)
    assert not kernel.target.arrival_counters(logits.device).any()


def test_op():
    """Catches a fake with other shapes or dtypes than the op's."""
    for arguments in [(torch.randn(2, 70), 1), (torch.randn(2, 70).bfloat16(), 5, 128), (torch.randn(0, 70), 3)]:
        torch.library.opcheck(torch.ops.tp_runtime.vocab_top_k.default, arguments)


def test_compiles_into_one_op():
    """Catches torch.compile tracing into the launcher, or breaking its graph."""

    @functools.partial(torch.compile, backend="eager", fullgraph=True)
    def compiled_top_k(logits):
        return vocab_top_k(logits, 3, 5)

    logits = torch.randn(2, 70)
    assert_same(compiled_top_k(logits), by_sorting(logits, 3, 5))


@pytest.mark.parametrize("shape, k", [((2, 8), 9), ((2, 8), 0), ((2, 0), 1), ((8,), 1), ((2, 3, 8), 1)], ids=str)
def test_bad_input(shape, k):
    """Catches a read past the shard: a rank may hold no vocabulary."""
    with pytest.raises(ValueError, match=f"k={k} of logits"):
        vocab_top_k(torch.randn(shape), k)


@pytest.mark.gpu
def test_gpu():
    """Catches what only the compiled kernel does: bfloat16, real sizes, many programs at once; and a race."""
    for batch, v in [(1, 128256), (64, 16032), (3, 151936)]:
        for k in (1, 8, 50):
            logits = torch.randn(batch, v, device="cuda", dtype=torch.bfloat16)
            want = by_sorting(logits, k, 3)
            for _ in range(20):
                assert_same(compiled.vocab_top_k(logits, k, 3), want)

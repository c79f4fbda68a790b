"""lost: what the host makes of notes. That kernels leave them: test_routing, test_grouped_gemm, test_rope, ..."""

import pytest
import torch

from tp_runtime.kernels import lost

DEVICE = torch.device("cpu")
TOLD = {
    "expert": "token 3 is given expert 9: there are experts 0 to 7. That was an earlier call on cpu; its row is NaN",
    "position": "position 9 is outside of a cache of 8 tokens: make it larger .max_cache_len.. That was token 3 of an "
    "earlier call on cpu; its key and value are lost",
}
WORDS = torch.tensor([4, 9, 8])


@pytest.fixture(autouse=True)
def forgotten():
    yield
    for kind in TOLD:
        lost.lost_note(DEVICE, kind).zero_()


@pytest.mark.parametrize("kind", TOLD)
def test_a_note_is_told_once(kind):
    """Catches half of a note taken for all of it, a number off by one, a note told again, one kind told as another."""
    words = lost.lost_note(DEVICE, kind)
    lost.raise_lost(DEVICE)
    for late in range(3):
        words.copy_(WORDS)
        words[late] = 0
        lost.raise_lost(DEVICE)
    words.copy_(WORDS)
    lost.raise_lost(torch.device("meta"))
    with pytest.raises(ValueError, match=TOLD[kind]):
        lost.raise_lost(DEVICE)
    assert not words.any()
    lost.raise_lost(DEVICE)


def test_kinds_do_not_hide_each_other():
    """Catches a note that stops, or mixes with, one of another kind."""
    for kind in TOLD:
        lost.lost_note(DEVICE, kind).copy_(WORDS)
    for said in ("expert 9", "position 9"):
        with pytest.raises(ValueError, match=said):
            lost.raise_lost(DEVICE)
    lost.raise_lost(DEVICE)

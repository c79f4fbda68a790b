"""The demo's promise: all 10 000 sums of 0 to 99, at every number of ranks, in float32 and bfloat16 (row D4).

bfloat16 takes a CPU without instructions for it half a minute a model. So all of them are `slow`; else every seventh in
float32, every 37th in bfloat16.
"""

import pytest
import torch

import tp_runtime
from tp_runtime.config import RuntimeConfig
from tp_runtime.preflight import resolve
from tp_runtime.sums import check_sum
from tp_runtime.text import load_tokenizer

PAIRS = [(a, b) for a in range(100) for b in range(100)]
IGNORED = -100
DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def texts():
    """[10000, S] token ids of `<bos>27+58=85<eos>`; and what is to be predicted at each position of an answer.

    If at each position of the answer the most probable token is the answer's, then greedy decoding gives the answer,
    step by step; so one forward pass over whole texts proves what 40 000 decode steps would.
    """
    tokenizer = load_tokenizer(resolve("demo:llama"))
    rows, targets = [], []
    for a, b in PAIRS:
        prompt = tokenizer(f"{a}+{b}=")["input_ids"]
        answer = [*tokenizer.convert_tokens_to_ids(list(str(a + b))), tokenizer.eos_token_id]
        rows.append(prompt + answer)
        targets.append([IGNORED] * (len(prompt) - 1) + answer)
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return ids, torch.tensor([row + [IGNORED] * (width - len(row)) for row in targets])


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    "dtype, step", [("float32", 37), ("bfloat16", 37), *(pytest.param(d, 1, marks=pytest.mark.slow) for d in DTYPES)]
)
@pytest.mark.parametrize("name", ["demo:llama", "demo:mixtral"])
def test_all_sums_are_right(texts, name, dtype, step, tp_size):
    """Catches a cut that is nearly right: one head, one row or one expert too few shows in some of 10 000 answers."""

    def wrong_sums(comm):
        model = tp_runtime.load(name, comm, RuntimeConfig(dtype=dtype))
        wrong = []
        with torch.inference_mode():
            pairs, all_texts = PAIRS[::step], [part[::step] for part in texts]
            for first in range(0, len(pairs), 500):
                ids, targets = (part[first : first + 500] for part in all_texts)
                is_wrong = (model(ids, use_cache=False).logits.argmax(-1) != targets) & (targets != IGNORED)
                wrong += [pairs[first + i] for i in is_wrong.any(dim=1).nonzero().flatten().tolist()]
        return wrong

    assert tp_runtime.run_local(wrong_sums, tp_size) == [[]] * tp_size


def test_check_sum():
    """Catches a verifier that says yes to a wrong sum, or no to a cut-off chain."""
    assert check_sum("27+58=", "85") == (True, "27+58=85")
    assert check_sum("27+58=", "86") == (False, "27+58=86")
    assert check_sum(">7+3=", "10;10+3=13;13+") == (True, "7+3=10; 10+3=13")
    assert check_sum(">7+3=", "10;10+3=14;14+") == (False, "7+3=10; 10+3=14")
    assert check_sum("hello", "world") is None

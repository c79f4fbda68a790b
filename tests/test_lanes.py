"""Two lanes: one runs at a time, in a fixed order, and neither is left behind when the other fails."""

import pytest
import torch
from tiny_models import TOLERANCE, answers, one_thread, prompt, reference  # noqa: F401

import tp_runtime
from tp_runtime import lanes as lanes_module
from tp_runtime.config import RuntimeConfig
from tp_runtime.lanes import Lanes

pytestmark = pytest.mark.usefixtures("one_thread")


def steps(lanes: Lanes, name: str, count: int, said: list[str], fail_at: int | None = None):
    """A function that says its name and number, then lets the other lane run, `count` times."""

    def run():
        for i in range(count):
            said.append(f"{name}{i}")
            if i == fail_at:
                raise KeyError(name)
            lanes.switch()
        return name

    return run


@pytest.mark.parametrize(
    ("counts", "order"),
    [
        ((3, 3), "A0 B0 A1 B1 A2 B2"),
        ((1, 3), "A0 B0 B1 B2"),
        ((3, 1), "A0 B0 A1 A2"),
        ((0, 2), "B0 B1"),
        ((2, 0), "A0 A1"),
    ],
)
def test_lanes_take_turns(counts, order):
    """Catches two lanes at once, a lane that waits for one that has ended, and a result that is lost."""
    lanes, said = Lanes(), []
    first, second = (steps(lanes, name, count, said) for name, count in zip("AB", counts))
    assert lanes.run(first, second) == ("A", "B")
    assert " ".join(said) == order


@pytest.mark.parametrize(("name", "at"), [("A", 0), ("A", 1), ("B", 0), ("B", 1)])
def test_a_lane_that_fails_ends_the_other(name, at):
    """Catches a lane that waits for a turn that never comes, and an error that is swallowed."""
    lanes, said = Lanes(), []
    fails = {name: at}
    first, second = (steps(lanes, lane, 5, said, fails.get(lane)) for lane in "AB")
    with pytest.raises(KeyError, match=name):
        lanes.run(first, second)
    assert not lanes._thread.is_alive() and len(said) <= 2 * at + 2


def test_a_lane_finds_what_torch_keeps_for_each_thread():
    """Catches a second lane that records gradients, or takes all cores from other ranks."""

    def here():
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.get_num_threads()

    with torch.inference_mode():
        first, second = Lanes().run(here, here)
    assert first == second == (True, False, 1)
    with torch.no_grad():
        first, second = Lanes().run(here, here)
    assert first == second == (False, False, 1)


NAMES = ["llama-12/4", "mistral-sliding", "qwen2-mixed", "mixtral-14/2", "llama-dynamic"]


def in_lanes(comm, name: str):
    model = reference(name).copy()
    tp_runtime.patch(model, comm, config=RuntimeConfig(overlap="lanes"))
    return model


@pytest.mark.parametrize("tp_size", [2, 3, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_in_lanes_says_the_same(name, tp_size):
    """Catches a half that does not see the other's keys, sees them too early, or is put back in the wrong place."""
    whole = reference(name)
    if tp_size > whole.model.config.num_attention_heads:
        tp_size = whole.model.config.num_attention_heads
    for logits, tokens in tp_runtime.run_local(lambda comm: answers(in_lanes(comm, name), whole.ids), tp_size):
        assert (logits - whole.logits).abs().max() <= TOLERANCE
        assert torch.equal(tokens, whole.tokens)


def turns_of(model, **kwargs) -> int:
    """How often the lanes took turns in a forward pass."""
    overlap, turns = model._tp_runtime.overlap, 0

    def count(module, args, output):
        nonlocal turns
        turns += overlap.lanes is not None

    hook = model.model.layers[0].register_forward_hook(count)
    with torch.no_grad():
        model(**kwargs)
    hook.remove()
    return turns


def test_what_is_cut_and_what_is_not():
    """Catches lanes that never run, and a cut where the halves would not be the whole."""

    def forwards(comm):
        from transformers import DynamicCache

        ids = prompt()
        mixed, model = in_lanes(comm, "qwen2-mixed"), in_lanes(comm, "llama-12/4")
        tp_runtime.unpatch(plain := in_lanes(comm, "llama-12/4"))
        assert "forward" not in vars(plain.model)
        positions = torch.arange(9).expand(2, -1)
        two = {
            "ids": turns_of(model, input_ids=ids),
            "embeddings": turns_of(model, inputs_embeds=model.model.embed_tokens(ids)),
            "mask and positions": turns_of(
                model, input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions
            ),
            "cache": turns_of(model, input_ids=ids, past_key_values=DynamicCache(config=model.config)),
        }
        none = {
            "one token": turns_of(model, input_ids=ids[:, :1]),
            "no cache": turns_of(model, input_ids=ids, use_cache=False),
            "hidden states": turns_of(model, input_ids=ids, output_hidden_states=True),
            "two kinds of layers": turns_of(mixed, input_ids=ids),
            "a mask of four dimensions": turns_of(model, input_ids=ids, attention_mask=torch.ones(2, 1, 9, 9) > 0),
        }
        return two, none

    for two, none in tp_runtime.run_local(forwards, 2):
        assert set(two.values()) == {2}, two
        assert set(none.values()) == {0}, none


def test_lanes_are_measured_once(monkeypatch):
    """Catches a measurement that leaves layers out, keeps the silent communicator, or is repeated at every prompt."""
    monkeypatch.setattr(lanes_module, "MIN_TOKENS", 2)
    whole = reference("llama-12/4")

    def forwards(comm):
        model = whole.copy()
        tp_runtime.patch(model, comm)
        overlap = model._tp_runtime.overlap
        with torch.no_grad():
            logits = [model(whole.ids).logits for _ in range(2)]
        runs = [len(seconds) for seconds in overlap.lanes_s.pop(5)]  # of 18 tokens
        assert not overlap.lanes_s and overlap.comm is comm and len(model.model.layers) == 2
        return logits, runs

    for logits, runs in tp_runtime.run_local(forwards, 2):
        of_compute, of_whole, of_lanes = runs
        assert 11 >= of_compute == of_whole == of_lanes >= 3
        assert all((one - whole.logits).abs().max() <= TOLERANCE for one in logits)


def test_left_padding_in_lanes():
    """Catches a mask that is cut at the wrong end."""
    whole = reference("llama-12/4")
    ids, mask = prompt(), torch.ones(2, 9, dtype=torch.long)
    ids[0, :6], mask[0, :6] = 0, 0  # more than a half is padding
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    want = whole.copy().generate(ids, **options)
    for tokens in tp_runtime.run_local(lambda comm: in_lanes(comm, "llama-12/4").generate(ids, **options), 3):
        assert torch.equal(tokens, want)

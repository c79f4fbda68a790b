"""KVCache against Hugging Face's DynamicCache: the same calls, the same bits."""

import copy

import pytest
import torch
from exactness import assert_as_exact_as
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, MistralConfig

from tp_runtime.cache import KVCache

LAYERS, KV_HEADS, SIZE = 2, 3, 4


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors as small as these take longer to share out among threads than to compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def states(batch: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, KV_HEADS, length, SIZE, generator=generator) for _ in range(2))


class Pair:
    """Both caches, given the same calls and compared after each."""

    def __init__(self, capacity: int):
        self.ours, self.theirs = KVCache(LAYERS, capacity), DynamicCache()
        self.seed = 0

    def update(self, batch: int, length: int) -> None:
        for layer in range(LAYERS):
            self.seed += 1
            new = states(batch, length, self.seed)
            got = self.ours.update(*(t.clone() for t in new), layer)
            for ours, theirs in zip(got, self.theirs.update(*new, layer)):
                assert torch.equal(ours, theirs)
        self.compare()

    def both(self, method: str, *args) -> None:
        for cache in (self.ours, self.theirs):
            getattr(cache, method)(*copy.deepcopy(args))
        self.compare()

    def compare(self) -> None:
        assert self.ours.get_seq_length() == self.theirs.get_seq_length()
        for ours, theirs in zip(self.ours.layers, self.theirs.layers):
            assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
            for name in ("keys", "values"):
                a, b = getattr(ours, name), getattr(theirs, name)
                assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


@pytest.mark.parametrize("capacity", [1, 5, 6, 7, 12, 100])
def test_prefill_and_decode(capacity):
    """Catches a token lost, overwritten or stale when the room is full exactly, doubles, or grows by more than that."""
    pair = Pair(capacity)
    pair.update(2, 5)
    for _ in range(20):
        pair.update(2, 1)
    pair.update(2, 70)  # more than twice the room
    pair.update(2, 1)


@pytest.mark.parametrize("capacity", [3, 100])
def test_everything_that_hugging_face_does_to_a_cache(capacity):
    """Catches a new token written into room that a beam search, a rejected draft or a repeated batch has left."""
    pair = Pair(capacity)
    pair.update(2, 4)
    pair.both("reorder_cache", torch.tensor([1, 0]))
    pair.update(2, 1)
    pair.both("crop", -2)
    pair.update(2, 1)
    pair.update(2, 3)
    pair.both("batch_repeat_interleave", 3)
    pair.update(6, 1)
    pair.both("batch_select_indices", torch.tensor([5, 0]))
    pair.update(2, 1)
    pair.both("reorder_cache", torch.tensor([1, 1]))
    pair.both("crop", -1)
    pair.update(2, 2)
    pair.both("crop", -pair.ours.get_seq_length())
    pair.update(2, 3)


def test_random_calls():
    """Catches what no sequence above thought of: 60 seeded ones."""
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)

        def below(n, generator=generator):
            return int(torch.randint(n, (1,), generator=generator))

        batch, pair = 1 + below(3), Pair(1 + below(9))
        pair.update(batch, 1 + below(6))
        for _ in range(12):
            match below(5):
                case 0 | 1:
                    pair.update(batch, 1 + below(4))
                case 2:
                    pair.both("reorder_cache", torch.randint(batch, (batch,), generator=generator))
                case 3:
                    pair.both("crop", -below(pair.ours.get_seq_length() + 1))
                    pair.update(batch, 1)
                case 4 if batch < 10:
                    pair.both("batch_repeat_interleave", 2)
                    batch *= 2


def test_reset_begins_anew():
    """Catches keys of the last prompt, or its batch size, in the next one."""
    cache = KVCache(LAYERS, 8)
    cache.update(*states(2, 4, 0), 0)
    cache.reset()
    if cache.get_seq_length() == 0:  # before 5.18, reset() keeps the length and zeroes what is held
        keys, values = states(3, 2, 1)
        assert torch.equal(cache.update(keys, values, 0)[0], keys)


def test_a_new_token_copies_nothing():
    """Catches the concatenation that this cache is there to avoid: until the room is full, it stays in place."""
    cache = KVCache(1, 32)
    places = set()
    for step in range(28):
        keys, values = cache.update(*states(1, 5 if step == 0 else 1, step), 0)
        places.add((keys.data_ptr(), values.data_ptr(), keys.untyped_storage().nbytes()))
    assert len(places) == 1
    ((_, _, num_bytes),) = places
    assert num_bytes == KV_HEADS * 32 * SIZE * 4
    assert cache.update(*states(1, 1, 99), 0)[0].untyped_storage().nbytes() == 2 * num_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_the_models(dtype):
    """Catches keys that are kept, and read back, in another dtype."""
    keys, values = (t.to(dtype) for t in states(1, 3, 0))
    held = KVCache(1, 2).update(keys, values, 0)
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(held, (keys, values)))


@pytest.fixture(scope="module", params=["llama", "mistral"])
def model(request):
    """A tiny model; Mistral's with a sliding window shorter than the text."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes) if request.param == "llama" else MistralConfig(**sizes, sliding_window=6)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("capacity", [4, 64])
def test_a_models_logits(model, capacity):
    """Catches a view whose strides or mask attention takes wrongly: prefill of a padded batch, then 12 steps."""
    ids = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    wide = copy.deepcopy(model).double()
    runs = [
        (model, KVCache(2, capacity)),
        (model, DynamicCache(config=model.config)),
        (wide, DynamicCache(config=model.config)),
    ]
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    steps = []
    with torch.no_grad():
        for _ in range(13):
            given = {"attention_mask": mask, "position_ids": position}
            steps.append([m(ids, past_key_values=cache, **given).logits[:, -1] for m, cache in runs])
            ids = steps[-1][1].argmax(-1, keepdim=True)
            mask = torch.cat((mask, torch.ones(2, 1, dtype=mask.dtype)), dim=1)
            position = position[:, -1:] + 1
    ours, theirs, exact = (torch.stack(logits) for logits in zip(*steps))
    assert_as_exact_as(ours, theirs, exact)  # sums of other lengths where a window is short


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_generate(model, options):
    """Catches Hugging Face's own generate() ending elsewhere with this cache: greedy and beam search."""
    ids = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(1))
    kwargs = {"max_new_tokens": 8, "do_sample": False, **options}
    expected = model.generate(ids, **kwargs)
    assert torch.equal(model.generate(ids, past_key_values=KVCache(2, 9), **kwargs), expected)

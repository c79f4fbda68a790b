"""rope_and_cache: the CPU form, and the kernel interpreted, against Hugging Face's rotary embeddings and caches."""

import functools
import itertools

import pytest
import torch
from exactness import assert_as_exact_as
from interpreted import interpreted
from program_order import reversed_programs
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as apply_to_pairs
from transformers.models.cohere.modeling_cohere import rotate_half as rotate_neighbours
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.olmo2.modeling_olmo2 import apply_rotary_pos_emb as apply_in_float32
from transformers.models.phi3.modeling_phi3 import Phi3Config, Phi3RotaryEmbedding
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partial

from tp_runtime.kernels import rope as compiled
from tp_runtime.kernels.rope import rope_and_cache

kernel, lost = interpreted("rope_kernel"), interpreted("lost")
EPS, CAPACITY, HEADS, KV_HEADS = 1e-6, 24, 6, 2
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
}


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """What a kernel forgets to write is NaN."""
    empty = torch.empty

    def poisoned(*size, **options):
        tensor = empty(*size, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def rotary(scaling: str, head_dim: int, positions: torch.Tensor):
    """Hugging Face's cos and sin for positions [B or 1, S], and how it applies them."""
    parameters = {"rope_theta": 10000.0, **SCALINGS.get(scaling, SCALINGS["default"])}
    sizes = {"hidden_size": HEADS * head_dim, "num_attention_heads": HEADS, "max_position_embeddings": 16}
    if scaling == "partial":
        config = Phi3Config(**sizes, pad_token_id=0, rope_parameters={**parameters, "partial_rotary_factor": 0.5})
        embedding, apply = Phi3RotaryEmbedding(config), apply_partial
    else:
        embedding = LlamaRotaryEmbedding(LlamaConfig(**sizes, head_dim=head_dim, rope_parameters=parameters))
        apply = apply_rotary_pos_emb
    cos, sin = embedding(torch.zeros(1), positions)
    return cos, sin, apply


def signed(sin: torch.Tensor) -> torch.Tensor:
    low, high = sin.chunk(2, -1)
    return torch.cat((-low, high), -1).unsqueeze(1)


def inputs(batch: int, length: int, head_dim: int, dtype: torch.dtype):
    torch.manual_seed(length)
    qkv = torch.randn(batch, length, (HEADS + 2 * KV_HEADS) * head_dim).to(dtype)
    keys, values = (torch.full((batch, KV_HEADS, CAPACITY, head_dim), 7.0).to(dtype) for _ in range(2))
    return qkv, keys, values


def split(qkv: torch.Tensor, head_dim: int):
    heads = qkv.view(*qkv.shape[:2], -1, head_dim).transpose(1, 2)
    return heads.split([HEADS, KV_HEADS, KV_HEADS], 1)


def normed(x: torch.Tensor, weight: torch.Tensor | None, unit_offset: bool = False) -> torch.Tensor:
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * (weight.to(x.dtype) + unit_offset)


def run_kernel(qkv, cos, sin, keys, values, positions, *norm):
    where = (None, positions) if isinstance(positions, int) else (positions, 0)
    return kernel.run(qkv, cos, sin, keys, values, *where, *norm).transpose(1, 2)


FORMS = {"cpu": rope_and_cache, "kernel": run_kernel}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scaling", [*SCALINGS, "partial"])
def test_rotates_as_hugging_face(form, scaling):
    """Catches interleaved pairs instead of halves, a sign, a head's rest rotated along, and v rotated."""
    for (batch, length), head_dim in itertools.product([(1, 1), (2, 5)], [16, 20]):
        qkv, keys, values = inputs(batch, length, head_dim, torch.float32)
        cos, sin, apply = rotary(scaling, head_dim, torch.arange(3, 3 + length)[None])
        q, k, v = split(qkv, head_dim)
        want_q, want_k = apply(q, k, cos, sin)
        got_q = FORMS[form](qkv, cos.unsqueeze(1), signed(sin), keys, values, 3)
        torch.testing.assert_close(got_q, want_q)
        torch.testing.assert_close(keys[:, :, 3 : 3 + length], want_k)
        assert torch.equal(values[:, :, 3 : 3 + length], v)
        for cache in (keys, values):
            assert (cache[:, :, :3] == 7).all() and (cache[:, :, 3 + length :] == 7).all()


@pytest.mark.halved
@pytest.mark.parametrize("unit_offset", [False, True], ids=["plain", "unit_offset"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("with_norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("form", FORMS)
def test_exact(form, with_norm, dtype, unit_offset):
    """Catches a norm after the rotation or over the padded head, the weights exchanged, and a rounding too many."""
    head_dim = 20
    qkv, keys, values = inputs(2, 16, head_dim, dtype)
    weights = [torch.randn(head_dim).to(dtype) if with_norm else None for _ in range(2)]
    cos, sin, apply = rotary("default", head_dim, torch.stack((torch.arange(3, 19), torch.arange(16))))
    cos, sin = cos.to(dtype), sin.to(dtype)

    def rotated(dtype):
        q, k, _ = split(qkv.to(dtype), head_dim)
        pair = [normed(x, weight, unit_offset) for x, weight in zip((q, k), weights)]
        return apply(*pair, cos.to(dtype), sin.to(dtype))

    got = FORMS[form](qkv, cos.unsqueeze(1), signed(sin), keys, values, 3, *weights, EPS, unit_offset)
    for ours, theirs, want in zip((got, keys[:, :, 3:19]), rotated(dtype), rotated(torch.float64)):
        assert_as_exact_as(ours, theirs, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("is_part", [False, True], ids=["all heads", "a rank's"])
@pytest.mark.parametrize("form", FORMS)
def test_norm_over_all_heads(form, is_part, dtype):
    """Catches OLMo's norm taken for one of each head, a neighbour's weights, k normed by q's mean, the mean of another
    token or of this rank's heads alone, and elements beyond a program's block of squares left out."""
    for batch, length, head_dim in ((2, 5, 20), (1, 1, 800)):
        qkv, keys, values = inputs(batch, length, head_dim, dtype)
        cos, sin, _ = rotary("default", head_dim, torch.arange(3, 3 + length)[None])
        q, k, _ = (heads.transpose(1, 2).flatten(2) for heads in split(qkv, head_dim))
        norms, of_others = [], []
        for row in (q, k):  # of all ranks: this one's elements, then others', which are larger
            others = 3 * torch.randn(batch, length, row.shape[2] // 2 * is_part).to(dtype)
            norm = Olmo2RMSNorm(row.shape[2] + others.shape[2], EPS).to(dtype)
            norm.weight.data.normal_()
            norms.append(norm)
            of_others.append(others)
        whole = [torch.cat(pair, -1) for pair in zip((q, k), of_others)]

        def heads(rows, size=head_dim):
            own = [row[..., : ours.shape[2]] for row, ours in zip(rows, (q, k))]  # noqa: B023
            return [row.unflatten(2, (-1, size)).transpose(1, 2) for row in own]

        theirs = apply_in_float32(*heads([norm(row) for norm, row in zip(norms, whole)]), cos, sin)
        exact = [normed(row.double(), norm.weight) for norm, row in zip(norms, whole)]
        want = apply_in_float32(*heads(exact), cos.double(), sin.double())
        means = torch.stack([row.double().square().mean(-1) for row in whole], -1).float() if is_part else None
        weights = [norm.weight.data[: row.shape[2]] for norm, row in zip(norms, (q, k))]
        options = (*weights, EPS, False, False, means)
        got = FORMS[form](qkv, cos.unsqueeze(1), signed(sin), keys, values, 3, *options)
        for ours, their, true in zip((got, keys[:, :, 3 : 3 + length]), theirs, want, strict=True):
            assert_as_exact_as(ours, their, true)


@pytest.mark.parametrize("form", FORMS)
def test_cos_in_float32(form):
    """Catches olmo2's cos and sin, which are not in the model's dtype, promoting q."""
    qkv, keys, values = inputs(1, 2, 16, torch.float16)
    cos, sin, apply = rotary("default", 16, torch.arange(2)[None])
    q, k, _ = split(qkv, 16)
    got = FORMS[form](qkv, cos.unsqueeze(1), signed(sin), keys, values, 0)
    want = apply(q.double(), k.double(), cos.double(), sin.double())
    theirs = (x.half() for x in apply(q, k, cos, sin))
    for ours, their, exact in zip((got, keys[:, :, :2]), theirs, want):
        assert_as_exact_as(ours, their, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_pairs(form, dtype):
    """Catches cohere's neighbours taken for halves, the wrong one of a pair negated, a product rounded before its sum,
    a neighbour without its norm; at a head size whose last block is not full."""
    for head_dim, with_norm in itertools.product((16, 20), (False, True)):
        qkv, keys, values = inputs(2, 5, head_dim, dtype)
        weights = [torch.randn(head_dim).to(dtype) if with_norm else None for _ in range(2)]
        angle = torch.rand(2, 5, head_dim // 2).repeat_interleave(2, -1) * 6
        cos, sin = angle.cos().to(dtype).float(), angle.sin().to(dtype).float()  # as Hugging Face's model gives them
        signed_sin = sin * torch.tensor([-1.0, 1.0]).repeat(head_dim // 2)
        options = (*weights, EPS, False, True)
        got = FORMS[form](qkv, cos.unsqueeze(1), signed_sin.unsqueeze(1), keys, values, 3, *options)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        want, theirs = (
            [normed(x, weight) for x, weight in zip(split(heads, head_dim), weights)] for heads in (qkv.double(), qkv)
        )
        for ours, their, x in zip((got, keys[:, :, 3:8]), apply_to_pairs(*theirs, cos, sin, 0), want, strict=True):
            assert_as_exact_as(ours, their, x * cos + rotate_neighbours(x) * sin)


@pytest.mark.parametrize("form", FORMS)
def test_layers_without_rotation(form):
    """Catches smollm3's NoPE layers rotated, or their norm left out."""
    weights = [torch.randn(16) for _ in range(2)]
    for pair in ([None, None], weights):
        qkv, keys, values = inputs(2, 2, 16, torch.float32)
        q, k, v = split(qkv, 16)
        torch.testing.assert_close(FORMS[form](qkv, None, None, keys, values, 1, *pair), normed(q, pair[0]))
        torch.testing.assert_close(keys[:, :, 1:3], normed(k, pair[1]))
        assert torch.equal(values[:, :, 1:3], v)


@pytest.mark.parametrize("form", FORMS)
def test_positions(form):
    """Catches sequences of different lengths written to one place, and a start in a tensor taken for every token's."""
    qkv, keys, values = inputs(2, 2, 16, torch.float32)
    _, k, v = split(qkv, 16)
    for dtype in (torch.int32, torch.int64):
        for positions, slots in (
            (torch.tensor(5, dtype=dtype), [[5, 6], [5, 6]]),
            (torch.tensor([5], dtype=dtype), [[5, 6], [5, 6]]),
            (torch.tensor([[9, 2], [3, 4]], dtype=dtype), [[9, 2], [3, 4]]),
        ):
            keys.fill_(7)
            FORMS[form](qkv, None, None, keys, values, positions)
            for b, s in itertools.product(range(2), range(2)):
                assert torch.equal(keys[b, :, slots[b][s]], k[b, :, s])
                assert torch.equal(values[b, :, slots[b][s]], v[b, :, s])
            assert (keys == 7).all(-1).sum() == keys[..., 0].numel() - 2 * 2 * KV_HEADS


def outside(position: int, token: int) -> str:
    """What is told of it, as a pattern."""
    of = f"position {position} is outside of a cache of {CAPACITY} tokens: make it larger .max_cache_len."
    return rf"{of}\. That was token {token} of an earlier call on cpu"


def test_kernel_leaves_positions_outside_alone():
    """Catches a write past the cache, and a position that only the device knows of which nobody is told."""
    qkv, _, _ = inputs(2, 1, 16, torch.float32)
    room = torch.full((2, 2, KV_HEADS, CAPACITY + 2, 16), 7.0)
    keys, values = room[0, :, :, 1:-1], room[1, :, :, 1:-1]
    for position in (-1, CAPACITY, CAPACITY + 1, -(2**40), 2**40):
        run_kernel(qkv, None, None, keys, values, torch.tensor([[position], [position]]))
        with pytest.raises(ValueError, match=outside(position, 0)):
            lost.raise_lost(qkv.device)
    assert (room == 7).all()


def test_the_first_token_outside_is_told_by_the_next_call():
    """Catches the last of several told, a token of a later call before that of an earlier one, tokens beyond the first
    chunk, places behind a start in a tensor, a note of a token that has its place, and one that no call raises."""
    for where, told in (
        (torch.tensor([[0, 30, 1], [-5, 40, 3]]), (30, 1)),
        (torch.tensor([[0, 1, 2], [23, 3, 24]], dtype=torch.int32), (24, 5)),
        (torch.tensor(CAPACITY - 1), (CAPACITY, 1)),
        (torch.tensor([[0] * 34 + [CAPACITY, 0, 99]]), (CAPACITY, 34)),
    ):
        batch, length = where.shape if where.dim() else (2, 3)
        qkv, keys, values = inputs(batch, length, 16, torch.float32)
        with reversed_programs():
            run_kernel(qkv, None, None, keys, values, where)
        some, inside = qkv[:, :1], torch.zeros(batch, 1, dtype=torch.int64)
        run_kernel(some, None, None, keys, values, inside + 99)  # the host has not read yet: the first stays
        again = interpreted("rope")._op
        with pytest.raises(ValueError, match=outside(*told)):
            again(some, None, None, keys, values, inside)
        run_kernel(some, None, None, keys, values, inside)
        again(some, None, None, keys, values, inside)


@pytest.mark.parametrize("form", FORMS)
def test_views(form):
    """Catches strides taken for granted: of a fused tensor's columns, and of caches that are views."""
    head_dim = 16
    wide = torch.randn(3, 2, 400)
    qkv = wide.transpose(0, 1)[..., 40 : 40 + (HEADS + 2 * KV_HEADS) * head_dim]
    room = torch.full((2, CAPACITY, KV_HEADS, 2 * head_dim), 7.0)
    keys, values = (room[..., i * head_dim : (i + 1) * head_dim].transpose(1, 2) for i in range(2))
    cos, sin, apply = rotary("default", head_dim, torch.arange(3)[None])
    cos, sin = cos.expand(2, -1, -1), sin.expand(2, -1, -1)
    q, k, v = split(qkv, head_dim)
    want_q, want_k = apply(q, k, cos, sin)
    torch.testing.assert_close(FORMS[form](qkv, cos.unsqueeze(1), signed(sin), keys, values, 4), want_q)
    torch.testing.assert_close(keys[:, :, 4:7], want_k)
    assert torch.equal(values[:, :, 4:7], v)


def test_static_cache_of_hugging_face():
    """Catches another layout than that of the caches that generate() makes."""
    qkv, keys, values = inputs(2, 3, 16, torch.float32)
    _, k, v = split(qkv, 16)
    sizes = {"hidden_size": 96, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": 16}
    config = LlamaConfig(num_hidden_layers=1, **sizes)
    theirs = StaticCache(config=config, max_cache_len=CAPACITY)
    want = theirs.update(k, v, 0)
    held = DynamicCache(config=config)
    held.update(k, v, 0)
    for cache in (keys, values):
        cache.zero_()
    for form in FORMS.values():
        form(qkv, None, None, keys, values, theirs.layers[0].cumulative_length - 3)
        assert torch.equal(keys, want[0]) and torch.equal(values, want[1])
        assert torch.equal(keys[:, :, :3], held.layers[0].keys)


def test_nothing_to_do():
    """Catches an empty grid."""
    qkv, keys, values = inputs(2, 3, 16, torch.float32)
    for empty in (qkv[:, :0], qkv[:0]):
        part = slice(0, len(empty))
        for form in FORMS.values():
            q = form(empty, None, None, keys[part], values[part], 0)
            assert q.shape == (len(empty), HEADS, empty.shape[1], 16)


def op_arguments():
    qkv, keys, values = inputs(2, 3, 16, torch.float32)
    cos, sin, _ = rotary("default", 16, torch.arange(3)[None])
    weights = [torch.randn(16) for _ in range(2)]
    for pair in ((None, None), (cos.unsqueeze(1), signed(sin))):
        yield (qkv, *pair, keys, values, None, 2)
        yield (qkv, *pair, keys, values, torch.tensor(5), 0, *weights, EPS, True)
        of_all = [torch.randn(heads * 16) for heads in (HEADS, KV_HEADS)]
        yield (qkv, *pair, keys, values, None, 2, *of_all, EPS, False, False, torch.rand(2, 3, 2))
    yield (qkv[:1, :1], None, None, keys[:1], values[:1], None, 2)
    yield (qkv, None, None, keys, values, torch.tensor([[0, 1, 2], [3, 4, 5]]))


def test_op():
    """Catches a cache that is written but not declared as mutated, q aliasing qkv, and a fake of another shape."""
    for arguments in op_arguments():
        torch.library.opcheck(torch.ops.tp_runtime.rope_and_cache.default, arguments)


def test_compiles_into_one_op():
    """Catches torch.compile tracing into the launcher, losing the writes, or breaking its graph."""

    @functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    def compiled_rope(qkv, cos, sin, keys, values, first):
        return rope_and_cache(qkv, cos, sin, keys, values, first)

    qkv, keys, values = inputs(2, 3, 16, torch.float32)
    cos, sin, _ = rotary("default", 16, torch.arange(3)[None])
    want_keys, want_values = keys.clone(), values.clone()
    for first in (2, 5, 9):
        want = rope_and_cache(qkv, cos.unsqueeze(1), signed(sin), want_keys, want_values, first)
        assert torch.equal(compiled_rope(qkv, cos.unsqueeze(1), signed(sin), keys, values, first), want)
        assert torch.equal(keys, want_keys) and torch.equal(values, want_values)


PAST = [-1, CAPACITY - 2, CAPACITY, torch.tensor(CAPACITY - 2), torch.tensor([[0, 1, -1]] * 2)]


@pytest.mark.parametrize("position", PAST, ids=str)
def test_positions_past_the_cache(position):
    """Catches a token written over another, or beside the cache, where the host can know it."""
    qkv, keys, values = inputs(2, 3, 16, torch.float32)
    with pytest.raises(ValueError, match=r"outside of a cache of 24 tokens: make it larger \(max_cache_len\)"):
        rope_and_cache(qkv, None, None, keys, values, position)
    assert (keys == 7).all()


OVER_ALL = {"q_weight": torch.ones(96), "k_weight": torch.ones(32)}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"keys": torch.ones(1, KV_HEADS, CAPACITY, 16)}, "are not the cache of 2 sequences"),
        ({"qkv": torch.ones(2, 3, 5)}, "is not query heads"),
        ({"qkv": torch.ones(160, 3, 2).transpose(0, 2)}, "contiguous in their last dimension"),
        ({"cos": torch.ones(2, 1, 2, 16)}, r"must both be \[2 or 1, 1, 3, R\]"),
        ({"signed_sin": None}, "signed_sin None"),
        ({"cos": torch.ones(1, 1, 3, 18), "signed_sin": torch.ones(1, 1, 3, 18)}, "rotates 18 elements"),
        ({"positions": torch.zeros(3, dtype=torch.int64)}, r"positions are \[3\]"),
        ({"q_weight": torch.ones(16)}, "both or neither"),
        ({"q_weight": torch.ones(96), "k_weight": torch.ones(16)}, r"over all heads \[96\] and \[32\]"),
        ({"mean_squares": torch.ones(2, 3, 2)}, "of norms over all heads; q_weight is None"),
        ({**OVER_ALL, "mean_squares": torch.ones(2, 2)}, r"mean_squares \[2, 2\] must be \[2, 3, 2\]"),
    ],
    ids=str,
)
def test_bad_input(change, message):
    """Catches an illegal read on the GPU, and a head size that only happens to divide."""
    qkv, keys, values = inputs(2, 3, 16, torch.float32)
    cos = torch.ones(1, 1, 3, 16)
    arguments = {"qkv": qkv, "cos": cos, "signed_sin": cos, "keys": keys, "values": values, "positions": None, **change}
    with pytest.raises(ValueError, match=message):
        torch.ops.tp_runtime.rope_and_cache(**arguments)


@pytest.mark.gpu
def test_gpu():
    """Catches what only the compiled kernel does: bfloat16, wide loads, dependent launches; and a race."""
    head_dim = 128
    for batch, length in [(1, 1), (16, 1), (2, 300)]:
        torch.manual_seed(length)
        qkv = torch.randn(batch, length, (HEADS + 2 * KV_HEADS) * head_dim, device="cuda", dtype=torch.bfloat16)
        keys, values = torch.empty(2, batch, KV_HEADS, 512, head_dim, device="cuda", dtype=torch.bfloat16)
        cos, sin, apply = rotary("llama3", head_dim, torch.arange(length)[None])
        cos, sin = cos.cuda().bfloat16(), sin.cuda().bfloat16()
        weights = [torch.randn(head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)]

        def rotated(dtype):
            q, k, _ = split(qkv.to(dtype), head_dim)  # noqa: B023
            return apply(normed(q, weights[0]), normed(k, weights[1]), cos.to(dtype), sin.to(dtype))  # noqa: B023

        arguments = (qkv, cos.unsqueeze(1), signed(sin), keys, values, torch.tensor(7, device="cuda"), *weights, EPS)
        q = compiled.rope_and_cache(*arguments)
        first = (q.clone(), keys[:, :, 7 : 7 + length].clone())
        for got, theirs, want in zip(first, rotated(torch.bfloat16), rotated(torch.float64)):
            assert_as_exact_as(got, theirs, want)
        for _ in range(20):
            q = compiled.rope_and_cache(*arguments)
            assert torch.equal(q, first[0]) and torch.equal(keys[:, :, 7 : 7 + length], first[1])

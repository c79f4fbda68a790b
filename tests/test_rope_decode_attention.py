"""rope_decode_attention: the kernel interpreted, against the two ops that it is, one after the other."""

import functools
import itertools

import pytest
import torch
from exactness import assert_as_exact_as
from interpreted import interpreted
from program_order import reversed_programs
from test_decode_attention import FEW, poisoned_outputs  # noqa: F401

from tp_runtime.kernels import rope_decode_attention as compiled
from tp_runtime.kernels.decode_attention import decode_attention
from tp_runtime.kernels.lost import raise_lost
from tp_runtime.kernels.rope import rope_and_cache
from tp_runtime.kernels.rope_decode_attention import rope_decode_attention

kernel, lost = interpreted("decode_attention_launch"), interpreted("lost")
HEADS, KV_HEADS, CAPACITY, EPS = 6, 2, 60, 1e-6


def run_kernel(
    qkv,
    cos,
    signed_sin,
    keys,
    values,
    positions,
    scale,
    q_weight=None,
    k_weight=None,
    unit_offset=False,
    pairs=False,
    mean_squares=None,
    **options,
):
    q = qkv.unflatten(2, (-1, keys.shape[3])).transpose(1, 2)[:, : -2 * keys.shape[1]]
    first, positions = (positions, None) if isinstance(positions, int) else (0, positions)
    new = kernel.New(cos, signed_sin, q_weight, k_weight, EPS, unit_offset, pairs, mean_squares)
    launch = {"new": new, "ahead": first + 1, "config": kernel.Config(*FEW), "num_sms": 16}
    return kernel.run(q, keys, values, scale, lengths=positions, **launch, **options)


FORMS = {"cpu": rope_decode_attention, "kernel": run_kernel}


def inputs(head_dim=16, dtype=torch.float32, rotary_dim=None):
    torch.manual_seed(head_dim)
    qkv = torch.randn(2, 1, (HEADS + 2 * KV_HEADS) * head_dim).to(dtype)
    angle = torch.rand(2, 1, 1, (rotary_dim or head_dim) // 2).repeat(1, 1, 1, 2) * 6
    low, high = angle.sin().chunk(2, -1)
    keys, values = torch.randn(2, 2, KV_HEADS, CAPACITY, head_dim).to(dtype)
    return qkv, angle.cos().to(dtype), torch.cat((-low, high), -1).to(dtype), keys, values


def two_ops(arguments, positions, norm, **options):
    """Attention and the cache's keys and values, 0 where no sequence holds any yet."""
    qkv, cos, signed_sin, keys, values = arguments
    lengths = torch.as_tensor(positions).reshape(-1).expand(2) + 1
    q = rope_and_cache(qkv, cos, signed_sin, keys, values, positions, *norm)
    held = [cache.nan_to_num(0) for cache in (keys, values)]
    seen = CAPACITY if options.get("mask") is None else options["mask"].shape[-1]
    return [decode_attention(q, *(cache[:, :, :seen] for cache in held), 0.2, lengths=lengths, **options), *held]


def assert_same(form, arguments, positions, norm=(), **options):
    """The two ops' results; what no sequence holds yet is NaN."""
    qkv, cos, signed_sin, keys, values = arguments
    for b, place in enumerate(torch.as_tensor(positions).reshape(-1).expand(2)):
        keys[b, :, place:] = values[b, :, place:] = torch.nan
    want = two_ops([tensor.clone() for tensor in arguments], positions, norm, **options)
    exact = two_ops([tensor.double() for tensor in arguments], positions, norm, **options)
    if form == "cpu":
        # torch multiplies what a mask hides with 0, and 0 * NaN is NaN.
        for cache in (keys, values):
            cache.nan_to_num_(0)
    named = dict(zip(("q_weight", "k_weight", "unit_offset", "pairs", "mean_squares"), norm[:2] + norm[3:]))
    got = [FORMS[form](qkv, cos, signed_sin, keys, values, positions, 0.2, **named, **options)]
    for ours, theirs, best in zip([*got, keys.nan_to_num(0), values.nan_to_num(0)], want, exact, strict=True):
        if ours.dtype == torch.float32:
            torch.testing.assert_close(ours, theirs)
        else:
            assert_as_exact_as(ours, theirs, best)


BOTH = pytest.mark.parametrize("form", FORMS)
POSITIONS = [0, 1, 16, 33, CAPACITY - 1, torch.tensor(20), torch.tensor([20]), torch.tensor([[3], [59]])]


@BOTH
@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_positions(form, positions):
    """Catches the new token left out, counted by every part, or read from a cache that another program writes."""
    assert_same(form, inputs(), positions)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_rotation_and_norm(form, dtype):
    """Catches the key rotated with the query's norm, a partial rotation, or none where there is one."""
    for (head_dim, rotary_dim), with_norm in itertools.product([(16, None), (80, 32)], [False, True]):
        weights = [torch.randn(head_dim).to(dtype) for _ in range(2)]
        assert_same(form, inputs(head_dim, dtype, rotary_dim), 40, (*weights, EPS, True) if with_norm else ())


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_norm_over_all_heads(form, dtype):
    """Catches the mean of another sequence, or of k for q; weights of a neighbour, also where the query heads of a key
    head do not stand side by side; a part that norms by what it alone has read."""
    of_all_ranks = torch.tensor([[[0.8, 1.5]], [[1.2, 0.6]]])
    for means, heads in ((of_all_ranks, None), (None, (1, 0, 1, 0, 0, 1))):
        arguments = inputs(80, dtype, 32)
        weights = [(1 + 0.2 * torch.randn(count * 80)).to(dtype) for count in (HEADS, KV_HEADS)]
        assert_same(form, arguments, 40, (*weights, EPS, False, False, means), kv_of_query=heads)


@BOTH
def test_pairs(form):
    """Catches the new token's key turned in halves where the query is turned in pairs."""
    for head_dim, weights in ((16, [None] * 2), (80, [torch.randn(80), torch.randn(80)])):
        assert_same(form, inputs(head_dim), 40, (*weights, EPS, False, True))


@BOTH
def test_layers_without_rotation(form):
    """Catches smollm3's NoPE layers rotated."""
    arguments = inputs()
    positions, scale = 40, 0.2
    (q, k, v) = arguments[0].view(2, -1, 1, 16).split([HEADS, KV_HEADS, KV_HEADS], 1)
    y = FORMS[form](arguments[0], None, None, *arguments[3:], positions, scale)
    for cache, new in zip(arguments[3:], (k, v)):
        assert torch.equal(cache[:, :, 40:41], new)
    torch.testing.assert_close(y, decode_attention(q, *(cache[:, :, :41] for cache in arguments[3:]), scale))


@BOTH
def test_options(form):
    """Catches what applies to the cached tokens but not to the new one, or the reverse."""
    sinks = torch.tensor([3.0, -1, 0, 5, 1, 2])
    for options in (
        {"window": 1},
        {"window": 20},
        {"softcap": 2.0},
        {"sinks": sinks},
        {"kv_of_query": (0, 0, 0, 0, 0, 1)},
        {"window": 9, "softcap": 2.0, "sinks": sinks, "kv_of_query": (1, 0, 1, 0, 0, 1)},
    ):
        for positions in (37, torch.tensor([[5], [41]])):
            assert_same(form, inputs(), positions, **options)


@BOTH
def test_masks(form):
    """Catches a new token that sees itself although a mask says no, and a bias that it does not get."""
    anything = torch.rand(2, 1, 1, 38) < 0.5
    for mask in (anything, anything & (torch.arange(38) < 37), torch.randn(1, HEADS, 1, 38)):
        assert_same(form, inputs(), 37, mask=mask)
    left_padded = torch.arange(CAPACITY) >= torch.tensor([[[[9]]], [[[0]]]])
    assert_same(form, inputs(), torch.tensor(37), mask=left_padded)


def test_position_outside_of_the_cache_is_told_and_not_written():
    """Catches a write beside the cache, or at what 32 bits make of a position, and a token that is lost in silence."""
    qkv, cos, signed_sin, _, _ = inputs()
    room = torch.full((2, 2, KV_HEADS, CAPACITY + 2, 16), 7.0)
    keys, values = room[0, :, :, 1:-1], room[1, :, :, 1:-1]
    for position in (-1, CAPACITY, 2**40, -(2**40)):
        where = torch.tensor([position] if position < 0 else [[position], [position]])
        run_kernel(qkv, cos, signed_sin, keys, values, where, 0.2, window=1)
        with pytest.raises(ValueError, match=f"position {position} is outside of a cache of {CAPACITY} .* token 0"):
            lost.raise_lost(qkv.device)
    assert (room == 7).all()


def test_the_first_token_outside_is_told_by_the_next_call():
    """Catches the last of several told, a sequence that has its place, and a note that no call raises."""
    arguments = inputs()
    with reversed_programs():
        run_kernel(*arguments, torch.tensor([[CAPACITY - 1], [CAPACITY + 5]]), 0.2, window=1)
    run_kernel(*arguments, torch.tensor(CAPACITY), 0.2, window=1)  # the host has not read yet: the first stays
    again = interpreted("rope_decode_attention")._op
    with pytest.raises(ValueError, match=f"position {CAPACITY + 5} is outside of a cache of {CAPACITY} .* token 1 of"):
        again(*arguments, torch.tensor(3), 0, 0.2)
    run_kernel(*arguments, torch.tensor(CAPACITY - 1), 0.2, window=1)
    again(*arguments, torch.tensor(3), 0, 0.2)


def op_arguments():
    arguments, weights = inputs(), [torch.randn(16) for _ in range(2)]
    yield (*arguments, None, 37, 0.2)
    options = ([0, 0, 0, 0, 1, 1], None, 9, 2.0, torch.randn(HEADS), *weights, EPS, True)
    yield (*arguments, torch.tensor(5), 0, 0.2, *options)
    yield (*arguments, None, 37, 0.2, None, torch.rand(2, 1, 1, 38) < 0.5)
    of_all = (*[None] * 5, torch.randn(HEADS * 16), torch.randn(KV_HEADS * 16), EPS, False, False)
    yield (*arguments, None, 37, 0.2, *of_all, torch.rand(2, 1, 2))


def test_op():
    """Catches a cache that is written but not declared as mutated, and a fake with another shape."""
    for arguments in op_arguments():
        torch.library.opcheck(torch.ops.tp_runtime.rope_decode_attention.default, arguments)


def test_compiles_into_one_op():
    """Catches torch.compile tracing into the launcher, losing the writes, or breaking its graph."""

    @functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    def compiled_attention(arguments, first):
        return rope_decode_attention(*arguments, first, 0.2)

    ours, theirs = inputs(), inputs()
    for first in (37, 38, 39):
        assert torch.equal(compiled_attention(ours, first), rope_decode_attention(*theirs, first, 0.2))
        assert torch.equal(ours[3], theirs[3])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"qkv": torch.ones(2, 2, 160)}, "holds 2 tokens a sequence"),
        ({"first": CAPACITY}, f"outside of a cache of {CAPACITY} tokens: make it larger"),
        ({"mask": torch.ones(1, 1, 1, 37, dtype=torch.bool)}, "does not reach the token at 37"),
        ({"kv_of_query": (0, 1, 2, 1, 1, 1)}, "must name one of 2"),
    ],
    ids=str,
)
def test_bad_input(change, message):
    """Catches an illegal read or write on the GPU."""
    names = ("qkv", "cos", "signed_sin", "keys", "values")
    arguments = {**dict(zip(names, inputs())), "positions": None, "first": 37, "scale": 0.2, **change}
    with pytest.raises(ValueError, match=message):
        torch.ops.tp_runtime.rope_decode_attention(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["split", "torch"])
def test_a_token_outside_on_a_gpu(name):
    """Catches a note that the device cannot write, or that a captured graph leaves out."""
    device = torch.device("cuda", torch.cuda.current_device())
    arguments = [tensor.to(device) for tensor in inputs(128, torch.float16)]
    place, held = torch.tensor([CAPACITY - 1], device=device), arguments[3:]

    def call():
        return compiled.run(*arguments, place, 0.2, kernel=name)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for compute in (call, graph.replay):
        before = [cache.clone() for cache in held]
        place.fill_(CAPACITY)
        compute()
        torch.cuda.synchronize()
        told = f"position {CAPACITY} is outside of a cache of {CAPACITY} .* token 0 of an earlier call on {device}"
        with pytest.raises(ValueError, match=told):
            rope_decode_attention(*arguments, place, 0.2)
        assert all(map(torch.equal, held, before))
        place.fill_(CAPACITY - 1)
        compute()
        torch.cuda.synchronize()
        raise_lost(device)


@pytest.mark.gpu
def test_gpu():
    """Catches a race: the cache written by one program while others read it; and a difference from the two ops."""
    heads, kv_heads, head_dim = 32, 8, 128
    for batch, first in [(1, 8000), (16, 1000), (1, 5)]:
        options = {"device": "cuda", "dtype": torch.bfloat16}
        qkv = torch.randn(batch, 1, (heads + 2 * kv_heads) * head_dim, **options)
        keys, values = torch.randn(2, batch, kv_heads, 8192, head_dim, **options)
        cos, signed_sin = torch.rand(2, 1, 1, 1, head_dim, **options)
        q = rope_and_cache(qkv, cos, signed_sin, keys, values, first)
        held = keys[:, :, : first + 1].clone(), values[:, :, : first + 1].clone()
        exact = decode_attention(*(x.double().cpu() for x in (q, *held)), 0.1).cuda()
        apart = (decode_attention(q, *held, 0.1).double() - exact).abs().max()
        for positions in (first, torch.tensor(first, device="cuda")):
            for _ in range(20):
                keys[:, :, first:] = values[:, :, first:] = torch.nan
                y = compiled.run(qkv, cos, signed_sin, keys, values, positions, 0.1)
                assert (y.double() - exact).abs().max() <= 2 * apart
                assert torch.equal(keys[:, :, : first + 1], held[0]) and torch.equal(values[:, :, : first + 1], held[1])

"""decode_attention: the CPU form, and the kernel interpreted, against attention written out row by row in float64."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from exactness import assert_as_exact_as, shuffles
from interpreted import interpreted

from tp_runtime.kernels import decode_attention as compiled
from tp_runtime.kernels.decode_attention import decode_attention

kernel = interpreted("decode_attention_launch")
FEW = kernel.Config(tile_kib=1, num_warps=4, num_stages=2, programs_per_sm=1)  # tiles of 16 keys


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """What a kernel forgets to write, workspaces included, is NaN."""
    empty = torch.empty

    def poisoned(*size, **options):
        tensor = empty(*size, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def run_kernel(*arguments, num_sms=16, **options):
    return kernel.run(*arguments, config=FEW, num_sms=num_sms, **options)


FORMS = {"cpu": decode_attention, "kernel": run_kernel}


def row_by_row(
    q, keys, values, scale, kv_of_query=None, lengths=None, mask=None, window=None, softcap=None, sinks=None
):
    """The same, one query at a time, in q's dtype; softmax in float32 at least, as in Hugging Face's models."""
    batch, num_heads, length, head_dim = q.shape
    group = max(1, num_heads // keys.shape[1])
    kv_of_query = kv_of_query or [head // group for head in range(num_heads)]
    y = torch.zeros(batch, length, num_heads, head_dim, dtype=q.dtype)
    for b, head, i in itertools.product(range(batch), range(num_heads), range(length)):
        end = keys.shape[2] if lengths is None else int(lengths[b])
        slot = end - length + i
        first = 0 if window is None else max(0, slot - window + 1)
        last = end if mask is not None else min(end, slot + 1)
        seen = list(range(first, last))
        bias = torch.zeros(len(seen), dtype=q.dtype)
        if mask is not None:
            row = mask.expand(batch, num_heads, length, -1)[b, head, i, first:last]
            bias = torch.where(row, 0.0, -torch.inf).to(q.dtype) if mask.dtype == torch.bool else row.to(q.dtype)
        if not seen or (bias == -torch.inf).all():
            continue
        scores = (keys[b, kv_of_query[head], seen] @ q[b, head, i]) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores + bias
        if sinks is not None:
            scores = torch.cat((scores, sinks[head : head + 1].to(q.dtype)))
        shares = torch.softmax(scores, 0, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)[: len(seen)]
        y[b, i, head] = shares @ values[b, kv_of_query[head], seen]
    return y.flatten(2)


def inputs(batch, heads, kv_heads, length, capacity, head_dim, dtype):
    torch.manual_seed(capacity)
    q = torch.randn(batch, heads, length, head_dim).to(dtype)
    return q, *torch.randn(2, batch, kv_heads, capacity, head_dim).to(dtype)


def assert_exact(form, q, keys, values, **options):
    scale = q.shape[-1] ** -0.5
    wide = {name: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for name, v in options.items()}
    want = row_by_row(q.double(), keys.double(), values.double(), scale, **wide)
    if form == "kernel":
        orders = shuffles(q.shape[-1], q.dtype)
        torchs = (decode_attention(q[..., order], keys[..., order], values, scale, **options) for order in orders)
        assert_as_exact_as(run_kernel(q, keys, values, scale, **options), torchs, want)
        return
    on_cpu = decode_attention(q, keys, values, scale, **options)
    if q.dtype == torch.float32:
        torch.testing.assert_close(on_cpu, want.float())
    else:
        assert_as_exact_as(on_cpu, row_by_row(q, keys, values, scale, **options), want)


BOTH = pytest.mark.parametrize("form", FORMS)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_sizes(form, head_dim, dtype):
    """Catches a padded head that adds to the scores, or its columns being stored."""
    assert_exact(form, *inputs(2, 4, 2, 1, 45, head_dim, dtype))


@BOTH
@pytest.mark.parametrize("capacity", [1, 15, 16, 17, 33, 100, 333])
def test_parts(form, capacity):
    """Catches a key at a seam that counts twice or not at all, and parts beyond the sequence."""
    for kv_heads in (1, 3):
        assert_exact(form, *inputs(2, 6, kv_heads, 1, capacity, 16, torch.float32))


@BOTH
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_sequences_of_different_lengths(form, dtype):
    """Catches a read beyond a sequence's own end, where an older one has left NaN, and parts cut from the capacity."""
    q, keys, values = inputs(5, 4, 2, 1, 200, 16, torch.float32)
    lengths = torch.tensor([200, 1, 17, 0, 130], dtype=dtype)
    if form == "kernel":
        for b, end in enumerate(lengths):
            keys[b, :, end:] = values[b, :, end:] = torch.nan
    options = {"lengths": lengths, "window": None}
    got = FORMS[form](q, keys, values, 0.25, **options)
    assert not got[3].any()
    clean = keys.nan_to_num(0), values.nan_to_num(0)
    torch.testing.assert_close(got, row_by_row(q, *clean, 0.25, **options))


@BOTH
def test_several_new_tokens(form):
    """Catches tokens that see what comes behind them, and rows of a head taken for another's."""
    for length, kv_heads, options in itertools.product((2, 3, 8), (1, 2), ({}, {"lengths": torch.tensor([40, 50])})):
        assert_exact(form, *inputs(2, 4, kv_heads, length, 50, 16, torch.float32), **options)


@BOTH
@pytest.mark.parametrize("window", [1, 5, 16, 40, 200])
def test_window(form, window):
    """Catches a window that is one too wide, or counted from the last of several tokens."""
    for length, lengths in itertools.product((1, 3), (None, torch.tensor([70, 9]))):
        assert_exact(form, *inputs(2, 4, 2, length, 100, 64, torch.float32), window=window, lengths=lengths)


@BOTH
def test_head_map(form):
    """Catches a cut whose query heads are spread unevenly, or in any order, over the key/value heads."""
    q, keys, values = inputs(2, 7, 3, 2, 40, 16, torch.float32)
    for kv_of_query in [(0, 0, 0, 0, 1, 2, 2), (2, 0, 1, 0, 1, 1, 1), (1,) * 7]:
        assert_exact(form, q, keys, values, kv_of_query=kv_of_query)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_softcap_and_sinks(form, dtype):
    """Catches a cap before the scale, a sink that counts once for each part, and a sink capped along."""
    q, keys, values = inputs(2, 4, 2, 2, 100, 32, dtype)
    sinks = torch.tensor([3.0, -1.0, 0.0, 30.0]).to(dtype)
    q = q * 5
    for options in ({"softcap": 4.0}, {"sinks": sinks}, {"softcap": 4.0, "sinks": sinks, "window": 30}):
        assert_exact(form, q, keys, values, **options)


@BOTH
def test_masks(form):
    """Catches a mask that is ignored where it is not causal, broadcast the wrong way, or read past its end."""
    q, keys, values = inputs(2, 4, 2, 3, 70, 16, torch.float32)
    left_padded = (torch.arange(70) >= torch.tensor([[50], [3]]))[:, None, None]
    anything = torch.rand(2, 1, 3, 70) < 0.3
    future = torch.ones(1, 1, 3, 70, dtype=torch.bool)
    for mask in (left_padded, anything, future, torch.rand(1, 4, 1, 70) < 0.3):
        assert_exact(form, q, keys, values, mask=mask)
        added = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        assert_exact(form, q, keys, values, mask=added)
    assert_exact(form, q, keys, values, mask=torch.randn(1, 4, 1, 70))  # ALiBi
    assert_exact(form, q, keys, values, mask=anything, window=20, softcap=3.0)


@BOTH
def test_rows_that_see_nothing(form):
    """Catches NaN from 0 / 0: padding tokens, and sequences that have not begun."""
    q, keys, values = inputs(2, 4, 2, 1, 70, 16, torch.float32)
    mask = torch.ones(2, 1, 1, 70, dtype=torch.bool)
    mask[1] = False
    y = FORMS[form](q, keys, values, 0.25, mask=mask)
    assert y[0].any() and not y[1].any()
    empty = FORMS[form](q, keys[:, :, :0], values[:, :, :0], 0.25)
    assert empty.shape == (2, 1, 64) and not empty.any()
    assert FORMS[form](q[:0], keys[:0], values[:0], 0.25).shape == (0, 1, 64)


@BOTH
def test_views(form):
    """Catches strides taken for granted: a cache's room, its transpose, and q as it lies in a fused tensor."""
    q = torch.randn(2, 1, 4, 48)[..., 8:24].transpose(1, 2)
    room = torch.randn(2, 2, 200, 2, 16)
    keys, values = room[0, :, 30:90].transpose(1, 2), room[1, :, :60].transpose(1, 2)
    assert_exact(form, q, keys, values)


def test_the_number_of_parts_changes_nothing_but_rounding():
    """Catches parts that are lost when there are more of them than tiles, or fewer than fill the GPU."""
    q, keys, values = inputs(1, 2, 1, 1, 300, 16, torch.float32)
    results = [run_kernel(q, keys, values, 0.25, num_sms=n) for n in (1, 2, 3, 5, 8, 100)]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
    assert torch.equal(run_kernel(q, keys, values, 0.25, num_sms=8), results[4])
    assert not interpreted("target").arrival_counters(q.device).any()  # a second call would find the first one's


def test_cpu_form_is_sdpa():
    """Catches another way through the CPU than torch's own where that can do it: it is the fastest."""
    q, keys, values = inputs(2, 4, 2, 1, 70, 16, torch.float32)
    want = F.scaled_dot_product_attention(q, keys, values, scale=0.25, enable_gqa=True)
    assert torch.equal(decode_attention(q, keys, values, 0.25), want.transpose(1, 2).flatten(2))


def test_shapes_that_the_kernel_does_not_know(caplog):
    """Catches a head size that nobody compiled for, refused or run in silence."""
    known = inputs(1, 4, 2, 1, 20, 64, torch.float32)
    assert compiled.is_known(known[0], known[1], None) and not caplog.records
    for _ in range(2):
        assert not compiled.is_known(torch.empty(1, 4, 1, 72), torch.empty(1, 2, 20, 72), None)
        assert not compiled.is_known(torch.empty(1, 4, 17, 64), torch.empty(1, 1, 20, 64), None)
    assert [record.getMessage() for record in caplog.records] == [
        "decode_attention: torch runs head size 72; the kernel takes multiples of 16 up to 256",
        "decode_attention: torch runs 4 query heads a key/value head with 17 new tokens; the kernel takes 64 rows",
    ]


def op_arguments():
    q, keys, values = inputs(2, 4, 2, 2, 20, 16, torch.float32)
    yield (q, keys, values, 0.25)
    yield (q, keys, values, 0.25, [0, 1, 1, 1], torch.tensor([7, 20]), None, 5, 3.0, torch.randn(4))
    yield (q, keys, values, 0.25, None, None, torch.rand(2, 1, 2, 20) < 0.5)
    yield (q[:, :, :1], keys, values, 0.25)


def test_op():
    """Catches a fake with another shape or strides than the op's."""
    for arguments in op_arguments():
        torch.library.opcheck(torch.ops.tp_runtime.decode_attention.default, arguments)


def test_compiles_into_one_op():
    """Catches torch.compile tracing into the launcher, or breaking its graph."""

    @functools.partial(torch.compile, backend="eager", fullgraph=True)
    def compiled_attention(q, keys, values):
        return decode_attention(q, keys, values, 0.25, (0, 0, 0, 1), window=9)

    arguments = inputs(2, 4, 2, 2, 20, 16, torch.float32)
    assert torch.equal(compiled_attention(*arguments), decode_attention(*arguments, 0.25, (0, 0, 0, 1), window=9))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kv_of_query": (0, 1, 2, 1)}, r"kv_of_query \(0, 1, 2, 1\) must name one of 2"),
        ({"kv_of_query": (0, 1, -1, 1)}, "must name one of 2"),
        ({"kv_of_query": (0, 1)}, "for each of 4"),
        ({"q": torch.ones(2, 5, 1, 16)}, "5 query heads do not divide by 2 key/value heads"),
        ({"q": torch.ones(2, 4, 21, 16)}, "hold 20 tokens, fewer than the 21 new ones"),
        ({"q": torch.ones(2, 4, 1, 32)}, "do not fit q"),
        ({"values": torch.ones(2, 2, 19, 16)}, "do not fit q"),
        ({"keys": torch.ones(2, 2, 20, 16).half()}, "one dtype"),
        ({"mask": torch.ones(2, 1, 1, 19)}, r"mask \[2, 1, 1, 19\] is not .* 20\]"),
        ({"mask": torch.ones(1, 20)}, r"mask \[1, 20\] is not"),
        ({"mask": torch.ones(3, 1, 1, 20)}, r"is not \[2 or 1, 4 or 1, 1 or 1, 20\]"),
        ({"lengths": torch.ones(3, dtype=torch.int32)}, r"lengths \[3\] must be \[2\]"),
        ({"sinks": torch.ones(2)}, r"sinks \[2\] must be \[4\]"),
    ],
    ids=str,
)
def test_bad_input(change, message):
    """Catches an illegal read on the GPU, and a mask that quietly does not apply."""
    q, keys, values = inputs(2, 4, 2, 1, 20, 16, torch.float32)
    arguments = {"q": q, "keys": keys, "values": values, "scale": 0.25, **change}
    with pytest.raises(ValueError, match=message):
        torch.ops.tp_runtime.decode_attention(**arguments)


@pytest.mark.gpu
def test_gpu():
    """Catches what only the compiled kernel does: bfloat16, the pipeline, many programs at once; and a race."""
    shapes = [(1, 32, 8, 8192, 128), (16, 8, 1, 1000, 128), (3, 8, 4, 777, 256)]
    for batch, heads, kv_heads, capacity, head_dim in shapes:
        shape = batch, kv_heads, capacity, head_dim
        q = torch.randn(batch, heads, 1, head_dim, device="cuda", dtype=torch.bfloat16)
        keys, values = torch.randn(2, *shape, device="cuda", dtype=torch.bfloat16)
        lengths = torch.randint(1, capacity + 1, (batch,), device="cuda")
        for options in ({}, {"lengths": lengths}, {"window": 300, "softcap": 30.0}):
            first = decode_attention(q, keys, values, head_dim**-0.5, **options)
            want = compiled.decode_attention_ref(q.double(), keys.double(), values.double(), head_dim**-0.5, **options)
            theirs = compiled.decode_attention_ref(q, keys, values, head_dim**-0.5, **options)
            assert_as_exact_as(first, theirs, want)
            for _ in range(20):
                assert torch.equal(decode_attention(q, keys, values, head_dim**-0.5, **options), first)

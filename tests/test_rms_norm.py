"""rms_norm: the CPU form, and the kernel interpreted, against Hugging Face's norms and float64."""

import functools
import itertools

import pytest
import torch
from exactness import assert_as_exact_as, shuffles
from interpreted import interpreted
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tp_runtime.kernels import rms_norm_kernel as compiled
from tp_runtime.kernels.rms_norm import rms_norm

kernel = interpreted("rms_norm_kernel")
EPS = 1e-5
SHAPES = [(1, 4096), (33, 70), (0, 64), (2, 3, 45), (5, 1), (40, 16)]


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """What a kernel forgets to write is NaN."""
    empty = torch.empty

    def poisoned(*size, **options):
        tensor = empty(*size, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def exact(
    x, weight, residual=None, unit_offset=False, residual_multiplier=1.0, post_weight=None, bias=None, centered=False,
    x_bias=None,
):  # fmt: skip
    """The equation in float64; h is rounded where the model's own residual stream is."""

    def norm(x, weight):
        if centered or bias is not None:
            return torch.layer_norm(x, weight.shape, weight.double(), None if bias is None else bias.double(), EPS)
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * (weight.double() + unit_offset)

    if residual is None:
        return norm(x.double(), weight)
    summed = x.double() if x_bias is None else x.double() + x_bias.double()
    added = summed * residual_multiplier if post_weight is None else norm(summed, post_weight)
    h = (residual + added.to(x.dtype)).double()
    return norm(h, weight), h


def inputs(shape, dtype):
    torch.manual_seed(sum(shape))
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype) * 2
    return x, residual, *(torch.randn(shape[-1]).to(dtype) for _ in range(2))


def torch_norm(
    x, weight, residual=None, unit_offset=False, residual_multiplier=1.0, post_weight=None, bias=None, centered=False,
    x_bias=None,
):  # fmt: skip
    """As Hugging Face's modules compute, one after the other."""

    def norm(x, weight):
        if centered or bias is not None:
            return torch.layer_norm(x, weight.shape, weight, bias, EPS)
        y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
        return (y * (1 + weight.float())).to(x.dtype) if unit_offset else weight * y.to(x.dtype)

    if residual is None:
        return norm(x, weight)
    x = x if x_bias is None else x + x_bias
    h = residual + (x * residual_multiplier if post_weight is None else norm(x, post_weight))
    return norm(h, weight), h


def in_all_orders(x, weight, **options):
    """Each of torch's outputs, several times: with the columns in other orders, and back in place."""
    outputs = []
    for order in shuffles(x.shape[-1], x.dtype):
        shuffled = {name: o[..., order] if isinstance(o, torch.Tensor) else o for name, o in options.items()}
        found = torch_norm(x[..., order], weight[order], **shuffled)
        back = order.argsort()
        outputs.append([y[..., back] for y in (found if isinstance(found, tuple) else (found,))])
    return zip(*outputs)


@pytest.mark.parametrize("unit_offset", [False, True], ids=["plain", "unit_offset"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape, dtype, unit_offset):
    """Catches a mean over the padded width, rows past the end, the wrong weight, and h that is not what is normed."""
    x, residual, weight, post_weight = inputs(shape, dtype)
    cases = [
        {},
        {"residual": residual},
        {"residual": residual, "residual_multiplier": 0.22},
        {"residual": residual, "post_weight": post_weight},
    ]
    x_bias = post_weight.flip(0) * 3
    cases += [{**options, "x_bias": x_bias} for options in cases[1:]]
    for options in cases:
        outputs = kernel.run(x, weight, EPS, unit_offset=unit_offset, **options)
        want = exact(x, weight, unit_offset=unit_offset, **options)
        theirs = in_all_orders(x, weight, unit_offset=unit_offset, **options)
        for got, wanted, beside in zip(outputs, want if options else (want,), theirs, strict=True):
            assert_as_exact_as(got, beside, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 4096), (33, 70), (40, 16)], ids=str)
def test_layer_norm(shape, dtype):
    """Catches a mean over the padded width, one that is not subtracted, a variance about 0, a bias left out."""
    x, residual, weight, bias = inputs(shape, dtype)
    residual = residual + 3
    for options in ({"bias": bias}, {"centered": True}):
        (y,) = kernel.run(residual, weight, EPS, **options)
        (theirs,) = in_all_orders(residual, weight, **options)
        assert_as_exact_as(y, theirs, exact(residual, weight, **options))
        for added in ({"residual": residual}, {"residual": residual, "x_bias": bias.flip(0)}):
            outputs = kernel.run(x, weight, EPS, **added, **options)
            want, theirs = exact(x, weight, **added, **options), in_all_orders(x, weight, **added, **options)
            for got, wanted, beside in zip(outputs, want, theirs, strict=True):
                assert_as_exact_as(got, beside, wanted)


def test_kernel_returns_h_alone_without_weight():
    """Catches a norm after the post-norm of olmo2, whose next layer reads the residual stream itself."""
    x, residual, _, post_weight = inputs((3, 70), torch.float32)
    (h,) = kernel.run(x, None, EPS, residual, post_weight=post_weight)
    torch.testing.assert_close(h, residual + torch_norm(x, post_weight))


def test_kernel_reads_rows_where_they_are():
    """Catches a row stride taken for the width: q's columns of a fused qkv tensor."""
    wide = torch.randn(2, 5, 96)
    weight = torch.randn(64)
    (y,) = kernel.run(wide[..., 8:72], weight, EPS)
    torch.testing.assert_close(y, torch_norm(wide[..., 8:72], weight))
    (y,) = kernel.run(wide.transpose(0, 1)[..., :64], weight, EPS)  # rows that no single stride reaches
    torch.testing.assert_close(y, torch_norm(wide.transpose(0, 1)[..., :64], weight))


def test_wide_rows_go_to_torch(caplog):
    """Catches a row that does not fit into registers, and one log line for each."""
    norm = interpreted("rms_norm")  # asked by nobody before
    assert [norm.fits(n) for n in (4096, 32768, 32769, 32769)] == [True, True, False, False]
    assert [record.getMessage() for record in caplog.records] == [
        "rms_norm: torch norms rows of 32769 elements; the kernel takes up to 32768"
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cpu_form_is_hugging_faces(dtype):
    """Catches eps outside of the root, and Gemma's 1 + w rounded to bfloat16."""
    x, residual, weight, post_weight = inputs((2, 3, 64), dtype)
    for norm, unit_offset in ((LlamaRMSNorm(64, EPS), False), (Gemma2RMSNorm(64, EPS), True)):
        norm.weight.data = weight
        theirs = norm(x).detach()
        assert_as_exact_as(rms_norm(x, weight, EPS, None, unit_offset), theirs, exact(x, weight, None, unit_offset))
        y, h = rms_norm(x, weight, EPS, residual, unit_offset)
        assert torch.equal(h, residual + x)
        assert_as_exact_as(y, norm(h).detach(), exact(h, weight, None, unit_offset))
        y, h = rms_norm(x, weight, EPS, residual, unit_offset, post_weight=post_weight)
        assert torch.equal(h, residual + rms_norm(x, post_weight, EPS, None, unit_offset))
        y, h = rms_norm(x, None, EPS, residual, unit_offset)
        assert y is h
    y, h = rms_norm(x, weight, EPS, residual, residual_multiplier=0.5)
    assert torch.equal(h, residual + x * 0.5)
    y, h = rms_norm(x, weight, EPS, residual, x_bias=post_weight, residual_multiplier=0.5)
    assert torch.equal(h, residual + (x + post_weight) * 0.5)
    norm = CohereLayerNorm(64, EPS)
    norm.weight.data = weight
    theirs = norm(x).detach()
    assert_as_exact_as(rms_norm(x, weight, EPS, centered=True), theirs, exact(x, weight, centered=True))
    y, h = rms_norm(x, weight, EPS, residual, bias=post_weight)
    assert torch.equal(y, torch.layer_norm(residual + x, (64,), weight, post_weight, EPS))


def op_arguments():
    x, residual, weight, post_weight = inputs((3, 45), torch.float32)
    yield (x, weight, EPS)
    for offset, post in itertools.product((False, True), (None, post_weight)):
        yield (x, weight, EPS, residual, offset, 1.0, post)
    yield (x, None, EPS, residual)
    yield (x, weight, EPS, residual, False, 1.0, None, post_weight)
    yield (x, weight, EPS, residual, False, 1.0, None, None, True)
    yield (x, weight, EPS, residual, False, 0.5, None, None, False, post_weight)
    yield (torch.randn(4, 2, 45).transpose(0, 1), weight, EPS)


def test_op():
    """Catches a fake with other shapes than the op's, and outputs that alias inputs."""
    for arguments in op_arguments():
        torch.library.opcheck(torch.ops.tp_runtime.rms_norm.default, arguments)


def test_compiles_into_one_op():
    """Catches torch.compile tracing into the launcher, or breaking its graph."""

    @functools.partial(torch.compile, backend="eager", fullgraph=True)
    def compiled_norm(x, weight, residual):
        return rms_norm(x, weight, EPS, residual)

    x, residual, weight, _ = inputs((3, 45), torch.float32)
    for got, want in zip(compiled_norm(x, weight, residual), rms_norm(x, weight, EPS, residual), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": None}, "without a residual"),
        ({"post_weight": torch.ones(64)}, "without a residual"),
        ({"weight": torch.ones(63)}, r"weight is \[63\].*contiguous \[64\]"),
        ({"weight": torch.ones(128)[::2]}, "contiguous"),
        ({"residual": torch.ones(2, 1, 64)}, r"residual is \[2, 1, 64\]"),
        ({"residual": torch.ones(2, 64).half()}, "float16"),
        ({"bias": torch.ones(63)}, r"bias is \[63\].*contiguous \[64\]"),
        ({"x_bias": torch.ones(64)}, "no x_bias"),
        ({"x_bias": torch.ones(63), "residual": torch.ones(2, 64)}, r"x_bias is \[63\].*contiguous \[64\]"),
        ({"bias": torch.ones(64), "unit_offset": True}, "a layer norm, centered or with a bias"),
        ({"centered": True, "unit_offset": True}, "a layer norm, centered or with a bias"),
    ],
    ids=str,
)
def test_bad_input(change, message):
    """Catches a broadcast that nobody asked for, or an illegal read on the GPU."""
    arguments = {"x": torch.ones(2, 64), "weight": torch.ones(64), "eps": EPS, **change}
    with pytest.raises(ValueError, match=message):
        torch.ops.tp_runtime.rms_norm(**arguments)


@pytest.mark.gpu
def test_gpu():
    """Catches what only the compiled kernel does: bfloat16, wide loads, dependent launches; and a race."""
    for shape in [(1, 4096), (64, 8192), (33, 2880), (1000, 128), (3, 32768)]:
        x, residual, weight, post_weight = (t.cuda() for t in inputs(shape, torch.bfloat16))
        forms = ({}, {"residual": residual}, {"residual": residual, "post_weight": post_weight},
                 {"residual": residual, "x_bias": post_weight})  # fmt: skip
        for options in (*forms, {"residual": residual, "bias": post_weight}, {"residual": residual, "centered": True}):
            outputs = compiled.run(x, weight, EPS, **options)
            want, theirs = exact(x, weight, **options), torch_norm(x, weight, **options)
            if not options:
                want, theirs = (want,), (theirs,)
            for got, wanted, beside in zip(outputs, want, theirs, strict=True):
                assert_as_exact_as(got, beside, wanted)
            for _ in range(20):
                assert all(map(torch.equal, compiled.run(x, weight, EPS, **options), outputs))

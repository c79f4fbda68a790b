"""kernels/gated_gemm.py: the kernels of gemm with two accumulators. See test_gemm.py for what both have in common."""

import pytest
import torch
import torch.nn.functional as F
from exactness import assert_as_exact_as, shuffles
from gemm_tiles import TILES, Decode, Prefill
from interpreted import interpreted

from bench.compiled import CHIPS, recording
from tp_runtime.kernels import gated_gemm as compiled_gated_gemm
from tp_runtime.kernels.gated_gemm import gated_gemm, gated_gemm_ref
from tp_runtime.kernels.gemm import ACTIVATIONS

interpreted_gated_gemm = interpreted("gated_gemm")
configs = interpreted("gemm_configs")
launching = interpreted("gemm_launch")


def operands(m, n, k, dtype=torch.float16, device="cpu"):
    """x, the packed weight, its bias; sums of about 1, for which an activation is neither 0 nor the identity."""
    torch.manual_seed(m + n + k)
    x, w, bias = (torch.randn(*shape).to(device, dtype) for shape in ((m, k), (2 * n, k), (2 * n,)))
    return x, w / k**0.5, bias


def exact(x, w, bias=None, activation="silu"):
    return gated_gemm_ref(x.double(), w.double(), None, None if bias is None else bias.double(), activation)


def plain(x, w, bias=None, activation="silu"):
    """As a FFN is written in torch."""
    gate, up = F.linear(x, w, bias).chunk(2, -1)
    return ACTIVATIONS[activation](gate) * up


# Of the activations in float32, whose sums torch makes in many orders, one.
EXACT = [
    *((activation, torch.float16) for activation in ACTIVATIONS),
    ("silu", torch.float32),
    *(pytest.param(a, torch.float32, marks=pytest.mark.slow) for a in ACTIVATIONS if a != "silu"),
]


@pytest.mark.halved
@pytest.mark.parametrize("activation, dtype", EXACT)
@pytest.mark.parametrize("tile", TILES)
def test_every_kernel_is_as_exact_as_torch(tile, activation, dtype):
    """Catches gate taken for up, another activation, a wrong mask or split, and stores outside of `out`."""
    kernel, config, m, n, k = TILES[tile]
    x, w, bias = operands(m, n, k, dtype)
    wide = torch.full((m, 3 * n), float("nan"), dtype=dtype)
    out = wide[:, n : 2 * n]
    how = {"kernel": kernel, "config": config, "num_sms": 2}
    y = interpreted_gated_gemm.run(x, w, None, bias, activation, out, **how)
    assert y is out
    orders = shuffles(k, dtype)
    torchs = (plain(x[:, order], w[:, order], bias, activation) for order in orders)
    assert_as_exact_as(y, torchs, exact(x, w, bias, activation))
    assert wide[:, :n].isnan().all() and wide[:, 2 * n :].isnan().all()

    gate, up = w[:n].clone(), w[n:].clone()
    y = interpreted_gated_gemm.run(x, gate, up, None, activation, **how)
    assert y.equal(interpreted_gated_gemm.run(x, w, None, None, activation, **how))
    torchs = (plain(x[:, order], w[:, order], None, activation) for order in orders)
    assert_as_exact_as(y, torchs, exact(x, w, None, activation))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's: 1 / inf is what is meant
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_sums(activation):
    """Catches an activation that overflows where it is 0 or the identity."""
    gate = torch.tensor([-6e4, -200.0, -90.0, -30.0, -4.0, -0.0, 0.0, 4.0, 30.0, 90.0, 200.0, 6e4]).reshape(1, 12)
    w = torch.cat((torch.eye(12), torch.full((12, 12), 1 / 128.0)))
    x = gate.half()
    y = interpreted_gated_gemm.run(x, w.half(), None, None, activation, kernel="decode", config=Decode(16, 16, 0, 4, 2))
    assert_as_exact_as(y, plain(x, w.half(), None, activation), exact(x, w.half(), None, activation))


@pytest.mark.parametrize("shape", [(0, 6, 8), (4, 0, 8), (4, 6, 0)], ids=str)
def test_nothing_to_compute(shape):
    """Catches a launch of no program, or without a step over K that would leave y unwritten."""
    x, w, bias = operands(*shape, dtype=torch.float32)
    w = torch.zeros(w.shape)  # K = 0 divided by 0
    for run in (gated_gemm, compiled_gated_gemm._gated_gemm_cuda):
        assert run(x, w, None, bias).equal(plain(x, w, bias))


BAD = {
    "activation": ({"activation": "relu"}, "activation 'relu' is none of silu, gelu, gelu_tanh"),
    "odd": ({"w_gate": torch.ones(5, 8)}, r"w_gate \[5, 8\], not \[..., K\] and \[2 \* I, K\]"),
    "K": ({"w_gate": torch.ones(6, 9)}, r"x is not \[4, 9\]: x \[4, 8\], w_gate \[6, 9\]"),
    "up of another width": ({"w_up": torch.ones(5, 8)}, r"w_up is not \[6, 8\]"),
    "bias of gate alone": ({"bias": torch.ones(3)}, r"bias is not \[6\]"),
    "out of both": ({"out": torch.ones(4, 6)}, r"out is not \[4, 3\]"),
    "dtype": ({"w_up": torch.ones(6, 8).half()}, r"w_up is torch.float16 on cpu, but x torch.float32"),
    "num_sms": ({"num_sms": -1}, r"num_sms=-1"),
}


@pytest.mark.parametrize("case", BAD)
def test_operands_that_do_not_fit(case):
    """Catches a kernel that reads past its operands, or a result that was broadcast."""
    bad, message = BAD[case]
    arguments = {"x": torch.ones(4, 8), "w_gate": torch.ones(6, 8), **bad}
    with pytest.raises(ValueError, match=message):
        compiled_gated_gemm._gated_gemm_cuda(**arguments)
    with pytest.raises(ValueError, match=message):
        compiled_gated_gemm.run(**arguments, kernel="torch")
    if case != "num_sms":  # what only a GPU has
        with pytest.raises((ValueError, RuntimeError)):
            gated_gemm(**arguments)


def test_the_choice_is_what_was_measured(monkeypatch):
    """Catches a call that ignores the table, and one that launches what cannot read its operands."""
    x, w, bias = operands(6, 72, 48)
    asked, launched, launch = [], [], launching.launch
    monkeypatch.setattr(launching, "launch", lambda *a: launched.append(kernel) or launch(*a))
    for kernel, config in (("decode", Decode(32, 32, 2, 4, 2)), ("prefill", Prefill(16, 16, 16, 8, 4, 2))):
        row = {"kernel": kernel, "config": config}
        monkeypatch.setattr(
            configs, "lookup", lambda op, x, n, k, m, configs, row=row: asked.append((op, n, k, m)) or row
        )
        for a, b in ((x, w), (x[:, :45], w[:, :45].contiguous())):
            assert_as_exact_as(
                interpreted_gated_gemm._gated_gemm_cuda(a, b, None, bias), plain(a, b, bias), exact(a, b, bias)
            )
    assert asked == 2 * [("gated_gemm", 72, 48, 6), ("gated_gemm", 72, 45, 6)]
    assert launched == ["decode", "decode", "prefill"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_on_the_cpu_it_is_torch(activation):
    """Catches a result that is not written where it was asked for, and separate weights taken in the wrong order."""
    x, w, bias = operands(6, 70, 45, torch.bfloat16)
    wide = torch.full((6, 140), float("nan"), dtype=x.dtype)
    want = plain(x, w, bias, activation)
    assert gated_gemm(x, w, None, bias, activation).equal(want)
    assert_as_exact_as(gated_gemm(x, w[:70], w[70:], bias, activation), want, exact(x, w, bias, activation))
    assert gated_gemm(x, w, None, bias, activation, wide[:, 70:]).equal(want)
    assert wide[:, :70].isnan().all() and not wide[:, 70:].isnan().any()


def test_op_is_registered_right():
    """Catches a schema, fake or CPU kernel that torch.compile would trip over."""
    x, w, bias = operands(6, 70, 45, torch.float32)
    for args in ((x, w), (x, w[:70], w[70:], bias, "gelu", 3), (x.view(2, 3, 45).transpose(0, 1), w, None, bias)):
        torch.library.opcheck(torch.ops.tp_runtime.gated_gemm.default, args)


def test_compiles_to_one_graph():
    """Catches a graph break, and `out` that a compiled graph does not write."""
    x, w, bias = operands(6, 70, 45, torch.float32)
    out = torch.full((6, 70), float("nan"))

    def layer(x, out):
        return gated_gemm(x, w, None, bias) + gated_gemm(x, w[:70], w[70:], bias, "gelu", out)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_as_exact_as(
        compiled(x, out), plain(x, w, bias) + plain(x, w, bias, "gelu"), exact(x, w, bias) + exact(x, w, bias, "gelu")
    )
    assert_as_exact_as(out, plain(x, w, bias, "gelu"), exact(x, w, bias, "gelu"))


@pytest.mark.parametrize("arch", CHIPS)
def test_candidates_fit_the_shape_and_the_chip(arch):
    """Catches a tuner that measures what cannot win, or has nothing to measure."""
    with recording(arch):
        found = {m: list(compiled_gated_gemm.candidates(m, 3584, 4096, torch.bfloat16)) for m in (1, 16, 64, 512)}
    names = {m: {kernel for kernel, _ in several} for m, several in found.items()}
    prefill = {"prefill"} if arch >= 90 else set()
    assert names == {1: {"vector", "decode"}, 16: {"decode"}, 64: {"decode"} | prefill, 512: prefill}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 3584, 4096), (16, 3584, 4096), (33, 70, 45), (777, 1792, 4096)], ids=str)
def test_every_candidate_on_a_gpu(shape, dtype):
    """Catches what only the device shows: races, wrong code, launches that cannot be captured."""
    m, n, k = shape
    x, w, bias = operands(m, n, k, dtype, "cuda")
    for index, (kernel, config) in enumerate(compiled_gated_gemm.candidates(m, n, k, dtype)):
        if kernel == "prefill" and n % 8:
            continue
        activation = list(ACTIVATIONS)[index % 3]
        wide = torch.full((m, 2 * n), float("nan"), dtype=dtype, device="cuda")
        arguments = {"bias": bias, "activation": activation, "out": wide[:, n:], "kernel": kernel, "config": config}
        first = compiled_gated_gemm.run(x, w, **arguments).clone()
        assert_as_exact_as(first, plain(x, w, bias, activation), exact(x, w, bias, activation))
        for _ in range(50):
            wide.fill_(float("nan"))
            assert compiled_gated_gemm.run(x, w, **arguments).equal(first), config
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            compiled_gated_gemm.run(x, w, **arguments)
        wide.fill_(float("nan"))
        graph.replay()
        assert wide[:, n:].equal(first), config
        assert wide[:, :n].isnan().all(), config

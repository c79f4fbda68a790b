"""The experts of a MoE layer: kernels as interpreted, torch's grouped GEMM and the reference, all against float64."""

import logging

import pytest
import torch
from exactness import assert_as_exact_as, shuffles
from interpreted import interpreted
from program_order import reversed_programs

from tp_runtime.kernels import grouped_gemm, tuned
from tp_runtime.kernels.grouped_gemm_configs import DECODE_T

kernels = interpreted("grouped_gemm_launch")
ours = interpreted("grouped_gemm")
lost = interpreted("lost")
Decode, Prefill = kernels.Decode, kernels.Prefill

# Small tiles, so that each size below is several of them and a part of one.
CONFIGS = {
    "decode": Decode(block_n=16, block_k=32, programs_per_sm=0, num_warps=4, num_stages=2),
    "decode-split": Decode(block_n=16, block_k=16, programs_per_sm=8, num_warps=4, num_stages=2),
    "prefill": Prefill(16, 16, 32, group_m=2, swap=False, tma=False, num_warps=4, num_stages=2),
    "prefill-swap": Prefill(32, 16, 16, group_m=8, swap=True, tma=False, num_warps=4, num_stages=2),
    "prefill-tma": Prefill(16, 32, 32, group_m=2, swap=False, tma=True, num_warps=4, num_stages=2),
    "prefill-tma-swap": Prefill(32, 16, 32, group_m=1, swap=True, tma=True, num_warps=4, num_stages=2),
}
# is_transposed, dtype
LAYOUTS = [pytest.param(False, torch.float32, marks=pytest.mark.slow), (False, torch.float16), (True, torch.float16)]
# Of many tokens, tiles such that a test takes a second.
LARGE = Prefill(64, 64, 64, group_m=2, swap=False, tma=False, num_warps=4, num_stages=2)


def operands(num_tokens, num_experts, top_k, hidden, width, dtype=torch.float32, skew=0.0, is_transposed=False):
    """x, top_k_index, top_k_weights, gate_up_proj, down_proj; `skew` draws tokens to the first expert."""
    torch.manual_seed(0)
    logits = torch.randn(num_tokens, num_experts)
    logits[:, 0] += skew
    weights, index = logits.softmax(-1).topk(top_k)
    x = torch.randn(num_tokens, hidden)
    gate_up = torch.randn(num_experts, 2 * width, hidden) / hidden**0.5
    down = torch.randn(num_experts, hidden, width) / max(width, 1) ** 0.5
    if is_transposed:
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    return x.to(dtype), index, weights, gate_up.to(dtype), down.to(dtype)


def fp64(given, **options):
    return grouped_gemm.experts_ref(*(t.double() if t.is_floating_point() else t for t in given), **options)


def run(config, given, num_sms=3, **options):
    kernel = "decode" if isinstance(config, Decode) else "prefill"
    return ours.run(*given, num_sms=num_sms, kernel=kernel, config=config, **options)


def assert_exact(got, given, **options):
    x, index, weights, gate_up, down = given
    orders = shuffles(x.shape[1], x.dtype)[: None if got.numel() < 4096 else 1]  # of many the largest is no luck
    features = 1 if options.get("is_transposed") else 2
    shuffled = ((x[:, order], index, weights, gate_up.index_select(features, order), down) for order in orders)
    assert_as_exact_as(got, [grouped_gemm.experts_ref(*one, **options) for one in shuffled], fp64(given, **options))


@pytest.mark.halved
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("is_transposed, dtype", LAYOUTS)
@pytest.mark.parametrize("sizes", [(1, 4, 2, 64, 48), (7, 16, 3, 48, 40), (33, 2, 1, 72, 24)], ids=str)
def test_kernels(name, is_transposed, dtype, sizes):
    """Catches a tile that reads or writes beyond its expert, its rows, N or K, in any of the layouts."""
    given = operands(*sizes, dtype, is_transposed=is_transposed)
    assert_exact(run(CONFIGS[name], given, is_transposed=is_transposed), given, is_transposed=is_transposed)


@pytest.mark.parametrize("name", [name for name in CONFIGS if "tma" not in name])
@pytest.mark.parametrize("is_transposed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_odd_widths(name, is_transposed):
    """Catches a kernel that relies on widths of whole 16 bytes: 389 experts' columns, cut, and a hidden size of 45."""
    for hidden, width in ((45, 39), (1, 1)):
        given = operands(7, 4, 2, hidden, width, torch.float16, is_transposed=is_transposed)
        assert_exact(run(CONFIGS[name], given, is_transposed=is_transposed), given, is_transposed=is_transposed)


@pytest.mark.parametrize(
    "num_tokens, num_experts, top_k", [pytest.param(300, 64, 4, marks=pytest.mark.slow), (300, 2, 2), (64, 64, 8)]
)
@pytest.mark.parametrize("skew", [0.0, 9.0])
def test_many_tokens(num_tokens, num_experts, top_k, skew):
    """Catches tiles that are counted wrongly where an expert has many of them, or none."""
    given = operands(num_tokens, num_experts, top_k, 40, 24, torch.float16, skew)
    assert_exact(run(LARGE, given), given)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations(activation):
    """Catches one activation that runs as another."""
    given = operands(33, 4, 2, 48, 40)
    for name in ("decode", "prefill"):
        assert_exact(run(CONFIGS[name], given, activation=activation), given, activation=activation)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_weight_on_the_input(top_k, is_transposed):
    """Catches Llama 4's routing weight applied to the output, behind the activation."""
    given = operands(9, 4, top_k, 32, 24, is_transposed=is_transposed)
    options = {"is_transposed": is_transposed, "weigh_input": True}
    assert not torch.allclose(fp64(given, **options), fp64(given, is_transposed=is_transposed))
    for name in ("decode", "prefill", "prefill-swap"):
        if top_k == 1 or name != "decode":
            assert_exact(run(CONFIGS[name], given, **options), given, **options)


def test_an_expert_chosen_twice():
    """Catches a kernel for few tokens that gives a token one column and forgets one of its two weights."""
    x, index, weights, gate_up, down = operands(4, 4, 3, 32, 24)
    index[1], index[2, 2] = 3, index[2, 0]
    given = x, index, weights, gate_up, down
    for name in ("decode", "prefill"):
        assert_exact(run(CONFIGS[name], given), given)


@pytest.mark.parametrize("name", CONFIGS)
def test_same_bits_in_any_order_of_programs(name):
    """Catches a sum in the order of arrival, and a program that needs what a later one writes."""
    given = operands(6, 8, 2, 64, 24, torch.float16)
    first = run(CONFIGS[name], given)
    with reversed_programs():
        assert torch.equal(run(CONFIGS[name], given), first)
    if "prefill" in name:
        assert torch.equal(run(CONFIGS[name], given, num_sms=1), first)
    assert torch.equal(run(CONFIGS[name], given), first)  # counters were left at 0


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_all_of_y(name, monkeypatch):
    """Catches rows or columns of y, of h or of the parts that are read but never written."""
    given = operands(7, 8, 2, 48, 40)
    want = run(CONFIGS[name], given)
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poisoned(tensor):
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 10**6)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poisoned(new_empty(*a, **k)))
    assert torch.equal(run(CONFIGS[name], given), want)


@pytest.mark.parametrize("name", [*CONFIGS, "torch"])
@pytest.mark.parametrize("expert", [-1, 4, 10**9])
def test_expert_that_is_not_there(name, expert):
    """Catches an address beyond the weights, and a NaN in another token's row."""
    x, index, weights, gate_up, down = operands(7, 4, 2, 32, 24)
    index[3, 1] = expert
    if name == "torch":
        got = grouped_gemm.run(x, index, weights, gate_up, down, kernel="torch")
    else:
        got = run(CONFIGS[name], (x, index, weights, gate_up, down))
        with pytest.raises(ValueError, match=f"token 3 is given expert {expert}: .* That was an earlier call on cpu"):
            lost.raise_lost(x.device)
    others = [0, 1, 2, 4, 5, 6]
    assert got[3].isnan().all()
    assert_exact(got[others], (x[others], index[others], weights[others], gate_up, down))
    with pytest.raises(ValueError, match=f"token 3 is given expert {expert}: there are experts 0 to 3"):
        grouped_gemm.experts(x, index, weights, gate_up, down)


@pytest.mark.parametrize("name", [*CONFIGS, "torch"])
def test_nan_weight(name):
    """Catches a NaN that reaches another token's row, or that is summed away unseen."""
    x, index, weights, gate_up, down = given = operands(7, 4, 2, 32, 24)
    weights[5, 0] = torch.nan
    got = grouped_gemm.run(*given, kernel="torch") if name == "torch" else run(CONFIGS[name], given)
    assert got.isnan().all(1).tolist() == [False] * 5 + [True, False]
    with pytest.raises(ValueError, match="token 5 is given the routing weight nan"):
        grouped_gemm.experts(*given)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("weigh_input", [False, True])
@pytest.mark.parametrize("skew", [0.0, 9.0])
def test_torchs_grouped_gemm(is_transposed, weigh_input, skew):
    """Catches what runs on CUDA before anything is tuned being another function than the reference."""
    options = {"is_transposed": is_transposed, "weigh_input": weigh_input}
    given = operands(40, 8, 2, 64, 48, torch.bfloat16, skew, is_transposed)
    assert_exact(grouped_gemm.run(*given, kernel="torch", **options), given, **options)


@pytest.mark.parametrize("num_tokens, width", [(0, 24), (5, 0), (0, 0)])
def test_nothing_to_do(num_tokens, width):
    """Catches an empty grid, and a rank that holds no part of the experts."""
    given = operands(num_tokens, 4, 2, 32, width)
    for run_experts in (grouped_gemm.experts, ours._experts_cuda, torch.ops.tp_runtime.experts):
        y = run_experts(*given)
        assert y.shape == (num_tokens, 32) and not y.any()


def test_parts_of_the_width_sum_to_the_whole():
    """Catches gate and up cut as one matrix: ranks hold rows of both."""
    x, index, weights, gate_up, down = given = operands(90, 4, 2, 32, 48)
    gate, up = gate_up.chunk(2, dim=1)
    parts = []
    for start, stop in ((0, 17), (17, 17), (17, 48)):
        part = torch.cat((gate[:, start:stop], up[:, start:stop]), dim=1)
        parts.append(grouped_gemm.experts(x, index, weights, part, down[:, :, start:stop]))
    assert_exact(sum(parts), given)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": (5, 31)}, r"x \[5, 31\].* do not fit down_proj \[4, 32, 24\].*\[5, 32\], \[5, 2\], \[4, 48, 32\]"),
        ({"gate_up": (4, 24, 32)}, r"gate_up_proj \[4, 24, 32\]"),
        ({"weights": (5, 1)}, r"top_k_weights \[5, 1\]"),
        ({"index": (5, 6), "weights": (5, 6)}, "top_k=6 of 4 experts"),
        ({"activation": "relu"}, "activation 'relu' is none of silu, gelu, gelu_tanh"),
        ({"dtype": torch.float16}, "x is torch.float16, but gate_up_proj torch.float32"),
    ],
)
def test_bad_operands_are_refused(change, message):
    """Catches an error from deep inside that names neither operand."""
    x, index, weights, gate_up, down = operands(5, 4, 2, 32, 24)
    given = {"x": x, "index": index, "weights": weights, "gate_up": gate_up, "down": down}
    for name, tensor in given.items():
        if name in change:
            given[name] = tensor.new_zeros(change[name])
    given["x"] = given["x"].to(change.get("dtype", torch.float32))
    for op in (grouped_gemm.experts, grouped_gemm._experts_cuda, torch.ops.tp_runtime.experts):
        with pytest.raises(ValueError, match=message):
            op(*given.values(), change.get("activation", "silu"))


def test_kernels_refuse_what_they_do_not_take():
    """Catches a kernel that is launched on a shape for which it computes nonsense."""
    with pytest.raises(ValueError, match=f"does not take {DECODE_T + 1} tokens, but at most {DECODE_T}"):
        run(CONFIGS["decode"], operands(DECODE_T + 1, 4, 2, 32, 24))
    with pytest.raises(ValueError, match="does not take .* multiples of 16 bytes"):
        run(CONFIGS["prefill-tma"], operands(5, 4, 2, 32, 23))
    x, index, weights, gate_up, down = operands(5, 4, 2, 32, 24)
    with pytest.raises(ValueError, match="does not take a row of x for each choice"):
        run(CONFIGS["decode"], (x, index, weights, gate_up, down), weigh_input=True)
    with pytest.raises(ValueError, match="not contiguous in their last dimension"):
        run(CONFIGS["prefill"], (x, index, weights, gate_up, down.mT.contiguous().mT))


class _Measured:
    """A device on which rows were measured; `experts` as CUDA runs it, on CPU tensors and interpreted."""

    def __init__(self, monkeypatch, row, is_capturing=True):
        self.kernels, self.looked_up = [], []
        monkeypatch.setattr(ours, "lookup", lambda *key: self.looked_up.append(key) or row)
        monkeypatch.setattr(ours, "_capability", lambda device: (9, 0))
        monkeypatch.setattr(ours, "_is_capturing", lambda: is_capturing)
        launch, by_torch = kernels.launch, ours.experts_torch
        monkeypatch.setattr(kernels, "launch", lambda *a: self.kernels.append(type(a[7]).__name__) or launch(*a))
        monkeypatch.setattr(ours, "experts_torch", lambda *a: self.kernels.append("torch") or by_torch(*a))
        ours._say_untuned.cache_clear()


@pytest.mark.parametrize(
    "row, num_tokens, width, dtype, weigh_input, runs",
    [
        (None, 4, 24, torch.bfloat16, False, "torch"),
        ({"kernel": tuned.TORCH}, 70, 24, torch.bfloat16, False, "torch"),
        (None, 4, 24, torch.float16, False, "Decode"),  # torch would wait for the device
        (None, 70, 24, torch.float16, False, "Prefill"),
        (None, 4, 23, torch.float16, False, "Decode"),
        (None, 4, 24, torch.float32, False, "Decode"),
        (None, 70, 24, torch.float32, False, "Prefill"),
        (None, 4, 24, torch.float16, True, "Prefill"),
        ({"kernel": "decode", "config": CONFIGS["decode-split"]}, 4, 24, torch.float16, False, "Decode"),
        ({"kernel": "decode", "config": CONFIGS["decode-split"]}, 4, 24, torch.bfloat16, True, "torch"),
        ({"kernel": "prefill", "config": CONFIGS["prefill-tma"]}, 4, 24, torch.float16, False, "Prefill"),
        ({"kernel": "prefill", "config": CONFIGS["prefill-tma"]}, 4, 23, torch.float16, False, "Decode"),
    ],
)
def test_choice(row, num_tokens, width, dtype, weigh_input, runs, monkeypatch, caplog):
    """Catches a kernel that is chosen where it cannot run, and torch where it would break a CUDA graph."""
    measured = _Measured(monkeypatch, row)
    given = operands(num_tokens, 4, 2, 32, width, dtype)
    with caplog.at_level(logging.WARNING, "tp_runtime"):
        for _ in range(2):
            y = ours._experts_cuda(*given, weigh_input=weigh_input, num_sms=3)
    assert measured.kernels == [runs] * 2
    assert measured.looked_up[0][0] == "experts_4_2" and measured.looked_up[0][2:5] == (width, 32, num_tokens)
    is_untuned = runs != "torch" and (row is None or width % 8)
    assert caplog.text.count("torch runs one expert after the other") == int(bool(is_untuned))
    assert_exact(y, given, weigh_input=weigh_input)


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_a_lost_token_is_told_by_the_next_call(name, monkeypatch):
    """Catches a wrong index that on CUDA shows as nothing but NaN, the wrong one of two told, and one told twice."""
    config = CONFIGS[name]
    _Measured(monkeypatch, {"kernel": name, "config": config})
    good = x, index, weights, gate_up, down = operands(9, 4, 2, 16, 16, torch.float16)
    want = run(config, good)
    wrong = index.clone()
    wrong[7, 1], wrong[6, 0], wrong[6, 1] = 5, 99, -1
    y = ours._experts_cuda(x, wrong, weights, gate_up, down)
    assert y.isnan().any(1).nonzero().flatten().tolist() == [6, 7]
    later = wrong.clone()
    later[:7] = index[:7]
    run(config, (x, later, weights, gate_up, down))  # the host has not read yet: the first stays
    told = "token 6 is given expert 99: there are experts 0 to 3. That was an earlier call on cpu; its row is NaN"
    with pytest.raises(ValueError, match=told):
        ours._experts_cuda(*good)
    assert torch.equal(ours._experts_cuda(*good), want)


def test_what_nobody_has_measured_is_torchs(monkeypatch):
    """Catches a kernel that runs by default, without having been compared with torch on that device."""
    measured = _Measured(monkeypatch, None, is_capturing=False)
    given = operands(4, 4, 2, 32, 24, torch.float16)
    assert torch.equal(ours._experts_cuda(*given), grouped_gemm.experts(*given)) and measured.kernels == []


@pytest.mark.parametrize("m, n, k", [(1, 1792, 4096), (64, 96, 2048), (4096, 768, 2048), (512, 389, 2048)])
def test_candidates_take_their_shape(m, n, k):
    """Catches a configuration that is measured, or chosen by the table, where it cannot run."""
    index = torch.empty(m, 2, dtype=torch.int64, device="meta")
    x, gate_up, down = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in ((m, k), (4, 2 * n, k), (4, k, n)))
    found = list(ours.candidates(m, n, k, torch.bfloat16))
    assert found and all(config in ours.CANDIDATES[kernel] for kernel, config in found)
    assert not any(kernels.takes(config, x, index, gate_up, down, False) for _, config in found)
    assert len({config for _, config in found}) == len(found)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["decode", "prefill", "torch"])
def test_a_lost_token_on_a_gpu(kernel):
    """Catches a note that the device cannot write, or that a captured graph leaves out."""
    device = torch.device("cuda", torch.cuda.current_device())
    given = [t.to(device) for t in operands(33, 8, 2, 256, 128, torch.bfloat16)]
    x, index, weights, gate_up, down = given
    if kernel == "torch" and not grouped_gemm.has_grouped_mm(x, gate_up, down):
        pytest.skip("torch's grouped GEMM is one kernel on sm_90 and sm_100 alone")
    config = dict(grouped_gemm.UNTUNED[False]).get(kernel)
    good, wrong = index.clone(), index.clone()
    wrong[21, 1], wrong[30, 0] = 99, -7

    def call():
        return grouped_gemm.run(x, index, weights, gate_up, down, kernel=kernel, config=config)

    want = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()

    def replayed():
        graph.replay()
        return captured

    for compute in (call, replayed):
        index.copy_(wrong)
        y = compute()
        torch.cuda.synchronize()
        assert y.isnan().any(1).nonzero().flatten().tolist() == [21, 30]
        with pytest.raises(ValueError, match=f"token 21 is given expert 99: there are .* 0 to 7. .* call on {device}"):
            grouped_gemm.experts(*given)
        index.copy_(good)
        y = compute()
        torch.cuda.synchronize()
        grouped_gemm.raise_lost(device)
        assert torch.equal(y, want)


def test_op():
    """Catches a schema, fake or dispatch that torch.compile or export would trip over."""
    given = operands(5, 4, 2, 32, 24)
    for args in ((*given,), (*operands(3, 4, 1, 32, 24, is_transposed=True), "gelu", True, True)):
        torch.library.opcheck(torch.ops.tp_runtime.experts.default, args)
    compiled = torch.compile(grouped_gemm.experts, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*given), grouped_gemm.experts(*given))

"""Tests of the sections of bench/on_gpu/ for experts, block ops and all-reduces, on the CPU: they find planted faults.

The kernels are stand-ins, or kernels/ interpreted, in float16. CUDA graphs and streams are left out here.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
from interpreted import interpreted

from bench import bench_attention, bench_experts, bench_layer
from bench.compiled import recording
from bench.gpu_section import Options
from bench.on_gpu import all_reduce, block_ops, calls, experts, speed, tuning
from bench.on_gpu.calls import Call, Form, check_exact, check_steady
from tp_runtime.kernels import all_reduce as all_reduce_kernels
from tp_runtime.kernels import grouped_gemm, tuned
from tp_runtime.kernels import rope_decode_attention as torch_attention

# -inf - -inf, in rows of a tile that are no token
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def doubled_and_place(x: torch.Tensor) -> list[torch.Tensor]:
    """An op with a float and an integer result."""
    return [x + x, x.argmax(-1)]


def exact_row(ours, may_refuse: bool = False) -> dict:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).half()
    return check_exact("case", [Form("form", {"ours": ours}, doubled_and_place, (x,))], "cpu", may_refuse)


def unwritten(x):
    y = torch.empty_like(x)
    y[:, 1:] = 2 * x[:, 1:]
    return [y, x.argmax(-1)]


def test_right_op_is_right():
    """Catches a check that finds fault with torch itself, or that leaves memory poisoned behind it."""
    row = exact_row(doubled_and_place)
    assert row["is_ok"] and row["right"] == 1 and row["max_ratio"] == 1
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    "ours, said",
    [
        (lambda x: [2.01 * x, x.argmax(-1)], "result 0: max"),
        (unwritten, "result 0: max and RMS error are inf"),
        (lambda x: [x + x, x.argmax(-1) + 1], "result 1 differs from torch's in 3 integers"),
        (lambda x: [(x + x).float(), x.argmax(-1)], "result 0 is [3, 8] torch.float32"),
        (lambda x: [x + x], "ValueError"),
    ],
    ids=["inexact", "not written", "another place", "another dtype", "a result less"],
)
def test_wrong_results_are_found(ours, said):
    """Catches a check that lets a wrong element, or one that was never written, through."""
    row = exact_row(ours)
    assert not row["is_ok"] and row["wrong"][0].startswith("ours form") and said in row["wrong"][0]


def test_refusal_is_right_where_it_is_expected():
    """Catches a model's shape that a kernel refuses and nobody is told."""

    def refuse(x):
        raise ValueError("rows must be multiples of 16 bytes")

    assert exact_row(refuse, may_refuse=True)["refused"] == 1
    assert not exact_row(refuse)["is_ok"]


def steady_row(fault) -> dict:
    """fault(y, number of the run) -> y"""
    numbers = itertools.count()

    def make() -> Call:
        x = torch.empty(4)
        return Call(lambda seed: block_ops.normal(seed, "cpu", x), lambda: fault(x + 1, next(numbers)))

    return check_steady("case", {"ours": make}, "cpu")


def test_bits_that_change_are_found():
    """Catches a race that shows once in many calls: in replays, in repeats, between two streams."""
    assert steady_row(lambda y, number: y)["is_ok"]
    replays = 2 * calls.REPLAYS
    assert "a replay differs" in steady_row(lambda y, number: y + (number == replays - 1))["wrong"][0]
    late = replays + 1 + calls.REPEATS  # the first result of all, then some eager ones, then replays
    for number in (replays + 3, late + 3):
        row = steady_row(lambda y, n, number=number: y + (n == number))
        assert f"1 of {2 * calls.REPEATS} repeats differ" in row["wrong"][0]
    assert "two streams" in steady_row(lambda y, n: y + (n > late + calls.REPEATS + 5))["wrong"][0]


def test_graph_that_keeps_its_old_inputs_is_found(monkeypatch):
    """Catches a length that was read on the host, and so is part of the graph."""

    def frozen(work, device):
        work()
        return lambda: None

    monkeypatch.setattr(calls, "replayed", frozen)
    assert "a replay differs" in steady_row(lambda y, number: y)["wrong"][0]


def test_norms_and_top_k_interpreted():
    """Catches a section that calls the kernels in a way that they do not have."""
    norms = block_ops.norm_forms(3, 70, "float16", "cpu", interpreted("rms_norm_kernel").run)
    row = check_exact("norm", norms, "cpu")
    assert row["is_ok"] and row["right"] == 12, row
    squares = block_ops.mean_squares_forms(3, 70, "float16", "cpu", interpreted("mean_squares_kernel").run)
    row = check_exact("mean squares", squares, "cpu")
    assert row["is_ok"] and row["right"] == 2, row
    top_k = block_ops.top_k_forms(2, 300, "float16", "cpu", interpreted("vocab_top_k_kernel").run)
    row = check_exact("top-k", top_k[:2], "cpu")
    assert row["is_ok"] and row["right"] == 2, row


def test_attention_interpreted():
    """Catches a form whose operands the kernel takes for others, and a read behind a sequence's end."""
    attention = interpreted("decode_attention_launch")
    forms = block_ops.attention_forms(2, 9, 3, 70, 80, "float16", "cpu", attention.run)
    first = next(iter(forms[0].ours))
    forms = [Form(f.name, {first: f.ours[first]}, f.torchs, f.args) for f in forms]
    row = check_exact("attention", forms, "cpu")
    assert row["is_ok"] and row["right"] == len(forms) == 8, row

    def reads_on(q, keys, values, scale, lengths=None, config=None, **rest):
        return attention.run(q, keys, values, scale, lengths=None if lengths is None else lengths + 1, **rest)

    forms = block_ops.attention_forms(2, 9, 3, 70, 80, "float16", "cpu", reads_on)
    row = check_exact("attention", [Form(f.name, {first: f.ours[first]}, f.torchs, f.args) for f in forms[:2]], "cpu")
    assert [text.split(":")[0].split(" ")[-1] for text in row["wrong"]] == ["lengths"]


def ropes(shift: int = 0) -> dict:
    """The interpreted kernels as the ops call them; `shift`: written so many places too far."""
    rope, kernel = interpreted("rope_kernel"), interpreted("decode_attention_launch")

    def rope_and_cache(qkv, cos, signed_sin, keys, values, where, *norm):
        places = (None, where + shift) if isinstance(where, int) else (where + shift, 0)
        return rope.run(qkv, cos, signed_sin, keys, values, *places, *norm).transpose(1, 2)

    def rope_decode_attention(qkv, cos, signed_sin, keys, values, where, scale, *options):
        rest, norm = (options[:5] or (None,) * 5), (options[5:] or (None, None, 1e-6, False))
        q = qkv.unflatten(2, (-1, keys.shape[3])).transpose(1, 2)[:, : -2 * keys.shape[1]]
        positions, first = (None, where) if isinstance(where, int) else (where, 0)
        heads, mask, window, softcap, sinks = rest
        new = kernel.New(cos, signed_sin, *norm)
        return kernel.run(
            q, keys, values, scale, heads, positions, mask, window, softcap, sinks, new=new, ahead=first + 1
        )

    return {"rope_and_cache": rope_and_cache, "rope_decode_attention": rope_decode_attention}


def test_rope_and_cache_interpreted():
    """Catches a token written to a neighbour's place: the whole cache is compared."""
    size = (2, 4, 2, 33, 16, "float16", "cpu")
    row = check_exact("rope", block_ops.rope_forms(*size, ropes()), "cpu")
    assert row["is_ok"] and row["right"] == 11, row
    row = check_exact("rope", block_ops.rope_forms(*size, ropes(shift=1))[:2], "cpu")
    assert len(row["wrong"]) == 2


def test_lengths_change_from_draw_to_draw(monkeypatch):
    """Catches a replay that finds the lengths with which it was captured: it could be right without reading them."""
    monkeypatch.setitem(block_ops.KERNELS, "rope_decode_attention", torch_attention.rope_decode_attention)
    call = block_ops.attention_calls(2, 4, 2, 70, 32, "cpu", "float32")["rope_decode_attention"]()
    results = []
    for seed in (1, 2, 1):
        call.draw(seed)
        attended, *caches = call.run()
        results.append([attended.clone(), *(cache.clone() for cache in caches)])
    assert all(map(torch.equal, results[0], results[2])) and not torch.equal(results[0][0], results[1][0])


@pytest.fixture
def interpreted_experts(monkeypatch):
    """Two small candidates, and the interpreter to run them."""
    kernels = interpreted("grouped_gemm_configs")
    small = [
        ("decode", kernels.Decode(block_n=16, block_k=32, programs_per_sm=0, num_warps=4, num_stages=2)),
        ("prefill", kernels.Prefill(16, 16, 32, group_m=2, swap=False, tma=False, num_warps=4, num_stages=2)),
    ]
    monkeypatch.setattr(grouped_gemm, "candidates", lambda m, n, k, dtype: small)
    monkeypatch.setattr(grouped_gemm, "run", interpreted("grouped_gemm").run)
    torch.manual_seed(0)


def small_case(**form) -> experts.Case:
    return experts.Case("test", 5, 3, 40, 24, **{"tokens": 9, "dtype": "float16", **form})


def test_experts_interpreted(interpreted_experts):
    """Catches operands of a layout or routing that the kernels take for another; a refusal that is none."""
    forms = {"is_transposed": True}, {"weigh_input": True}, {"routing": "skewed"}, {"routing": "same"}
    rows = list(experts.exact(Options(), "cpu", [small_case(**form) for form in forms]))
    assert all(row["is_ok"] and row["refused"] == 0 for row in rows), rows
    assert [row["right"] for row in rows] == [2, 1, 2, 2]


def test_wrong_experts_are_found(interpreted_experts, monkeypatch):
    """Catches a check that is blind to one token whose experts were exchanged."""
    right = grouped_gemm.run

    def exchanged(x, index, weights, *rest, **named):
        index = index.clone()
        index[4, 0], index[4, 1] = index[4, 1].clone(), index[4, 0].clone()
        return right(x, index, weights, *rest, **named)

    monkeypatch.setattr(grouped_gemm, "run", exchanged)
    (row,) = experts.exact(Options(), "cpu", [small_case()])
    assert len(row["wrong"]) == 2


def test_routing_kernels_interpreted():
    """Catches a router or a sort that is checked by another call than the layers make."""
    routing = interpreted("routing_kernels")
    note = interpreted("lost").lost_note
    given = {"routers": ((8, 2),), "tokens": (1, 33), "dtypes": ("float16",), "lost_note": note}
    rows = list(experts.exact_routing("cpu", routing.run_route, routing.run_sort, **given))
    assert [(row["is_ok"], row["right"]) for row in rows] == [(True, 8), (True, 6)], rows

    def unsorted(index, num_experts):
        found = routing.run_sort(index, num_experts)
        return found._replace(slots=found.slots.flip(0))

    def unnoted(index, num_experts):
        found = routing.run_sort(index, num_experts)
        note(index.device, "expert").zero_()
        return found

    for wrong in (unsorted, unnoted):
        _, row = experts.exact_routing("cpu", routing.run_route, wrong, **given)
        assert not row["is_ok"]


def test_experts_steady(monkeypatch):
    """Catches calls whose routing does not change from draw to draw."""
    seen = set()

    def run(x, index, weights, *rest, **named):
        seen.add(tuple(index.flatten().tolist()))
        return grouped_gemm.experts_ref(x, index, weights, *rest)

    monkeypatch.setattr(grouped_gemm, "candidates", lambda m, n, k, dtype: [("decode", calls.Call(None, None))])
    monkeypatch.setattr(experts, "label", lambda kernel, config: kernel)
    monkeypatch.setattr(grouped_gemm, "run", run)
    (row,) = experts.steady(Options(), "cpu", [small_case(dtype="float32")])
    assert row["is_ok"] and len(seen) >= calls.REPLAYS


def test_routings_are_what_they_are_called():
    """Catches a skewed routing that is even, or a token that takes an expert twice."""
    counts = {}
    for kind in experts.ROUTINGS:
        index, weights = experts.routed(small_case(tokens=500, routing=kind), "cpu", seed=0)
        assert all(len(set(row)) == 3 for row in index.tolist())
        torch.testing.assert_close(weights.sum(1), torch.ones(500))
        counts[kind] = torch.bincount(index.flatten(), minlength=5).tolist()
    assert min(counts["even"]) > 250 and counts["same"] == [0, 0, 500, 500, 500]
    assert counts["skewed"][0] > 450 and counts["skewed"][4] < 200


def test_experts_cases_cover_what_is_asked():
    """Catches a clean-up that leaves out a layout, a dtype, one token or many, or widths off 16 bytes."""
    cases = [*experts.model_cases(), *experts.odd_cases()]
    assert {c.tokens for c in cases} >= {1, 4096} and {c.dtype for c in cases} == {"bfloat16", "float16"}
    assert {c.is_transposed for c in cases} == {c.weigh_input for c in cases} == {True, False}
    assert any(c.width % 8 for c in cases) and {c.routing for c in cases} == {"even", "skewed", "same"}
    assert {c.activation for c in cases} == {"silu", "gelu", "gelu_tanh"}
    assert len({c.what for c in cases}) == len(cases)
    assert {c.is_transposed for c in experts.steady_cases()} == {True, False}


@pytest.mark.slow
def test_each_rank_alone_interpreted():
    """Catches a group whose tables or signals are not what the kernels expect; and a sum in another order."""
    kernels = interpreted("all_reduce")
    row = all_reduce.check_alone(3, "float16", "cpu", kernels, ((1, 70), (5, 33)))
    assert row["is_ok"] and row["right"] == len(all_reduce.KINDS) * 2 * 3 == 7 * 2 * 3, row

    def reduce(x, peers, two_shot, out):
        return kernels.all_reduce(x, peers, two_shot, out=out).mul_(1.001)

    damaged = SimpleNamespace(**{**vars(kernels), "all_reduce": reduce})
    row = all_reduce.check_alone(2, "float16", "cpu", damaged, ((1, 70),))
    assert len(row["wrong"]) == 2 * 2 + 1  # two kinds, two ranks; and the rank that norms by itself


def sums(size: int, fault=lambda total, rank, call: total) -> SimpleNamespace:
    """Kernels that sum when the last rank has come; fault(sum, rank, number of the call) -> what that rank gets."""
    arrived, numbers = [], itertools.count()

    def all_reduce(x, peers, two_shot, out):
        arrived.append((x, out))
        if len(arrived) == size:
            total, call = all_reduce_kernels.all_reduce_ref([x for x, _ in arrived]), next(numbers)
            for rank, (_, out) in enumerate(arrived):
                out.copy_(fault(total, rank, call))
            arrived.clear()

    def all_reduce_rms_norm(x, peers, then):
        z, h = torch.empty_like(x), torch.empty_like(x)
        arrived.append((x, z, h))
        if len(arrived) == size:
            parts, call = [x for x, *_ in arrived], next(numbers)
            of_all = all_reduce_kernels.all_reduce_rms_norm_ref(parts, then)
            for rank, (_, z, h) in enumerate(arrived):
                z.copy_(of_all[0]), h.copy_(fault(of_all[1], rank, call))
            arrived.clear()
        return z, h

    given = {"all_reduce": all_reduce, "all_reduce_rms_norm": all_reduce_rms_norm}
    return SimpleNamespace(PROGRAMS=2, Peers=all_reduce_kernels.Peers, **given)


@pytest.mark.parametrize("call", [2, 5])
def test_a_rank_that_gets_other_bits_once_is_found(call, monkeypatch):
    """Catches a comparison of one rank only, of the last call only, or one that allows a rounding."""
    monkeypatch.setattr(all_reduce, "SHAPES_TOGETHER", ((1, 70), (5, 33)))
    monkeypatch.setattr(all_reduce, "KINDS", all_reduce.KINDS[:4])
    assert all_reduce.check_together(3, "float16", "cpu", sums(3), num_calls=8)["is_ok"]

    def fault(total, rank, number):
        return total.nextafter(total + 1) if (rank, number) == (2, call) else total

    row = all_reduce.check_together(3, "float32", "cpu", sums(3, fault), num_calls=8)
    assert f"call {call}" in row["wrong"][0] and "rank 2" in row["wrong"][0]


def test_all_reduce_speed_says_that_it_is_emulated(monkeypatch):
    """Catches figures of one GPU that pass for those of several."""
    kernels = sums(1)
    monkeypatch.setattr(all_reduce.all_reduce, "all_reduce", kernels.all_reduce)
    monkeypatch.setattr(all_reduce.all_reduce, "all_reduce_rms_norm", kernels.all_reduce_rms_norm)
    monkeypatch.setattr(all_reduce, "REPEATS", 2)
    monkeypatch.setattr(all_reduce, "SPEED_BYTES", (16 << 10,))
    rows = list(all_reduce.speed(Options(), "cpu", sizes=(2,)))
    assert [row["op"] for row in rows] == ["one-shot", "two-shot", "rms_norm"]
    for row in rows:
        assert "no NVLink" in row["what"] and row["alone_us"]["median"] > 0 and row["together_us"] is None


def test_speed_rows_on_the_cpu():
    """Catches a generator that calls a benchmark in a way that it does not have."""
    options = Options()
    (row,) = speed.experts(options, "cpu", [bench_experts.Case(bench_experts.TINY, 3, "float32")], repeats=1)
    assert row["ours_us"]["median"] > 0 and row["runs"] == "reference"
    (row,) = speed.attention(options, "cpu", [bench_attention.Case("llama-3-70b tp8", 1, 64, "float32")], repeats=1)
    assert row["ours_us"]["median"] > 0 and row["bytes"] > 0
    (row,) = speed.layer(options, "cpu", [bench_layer.Case(bench_layer.TINY, 1, 16, "float32")], repeats=1)
    assert row["ours_us"]["median"] > 0 and set(row["parts_us"]) >= {"qkv", "attention", "norm ahead"}
    assert row["rms_ratio"] <= 2 and row["layers"] >= 8 and row["ours_kernels"] is None
    (row,) = speed.norm(options, "cpu", [(2, 64, "float32")], repeats=1)
    assert row["torch_us"]["median"] > 0


def test_one_case_that_fails_does_not_hide_the_others(monkeypatch):
    """Catches a table of which everything behind the first wrong row is missing."""
    monkeypatch.setattr(bench_experts, "experts", lambda x, *others: 2 * x)
    cases = [bench_experts.Case(bench_experts.TINY, tokens, "float32") for tokens in (1, 3)]
    rows = list(speed.experts(Options(), "cpu", cases, repeats=1))
    assert [row["is_ok"] for row in rows] == [False, False] and "AssertionError" in rows[0]["wrong"][0]


def test_experts_that_are_timed_are_tuned_before():
    """Catches a row of the report that compares torch with torch because nobody chose a kernel for its shape."""
    with recording(90):
        chosen = {task.key for task in tuning.experts_tasks()}
    cases = speed.experts_cases()
    for case in cases:
        tokens, width, hidden = case.size
        assert tuned.Key(case.op.name, case.dtype, width, hidden, tuned.bucket(tokens)) in chosen, case.what
    assert {case.shape.tp_size for case in cases} == {1, 2, 4, 8} and {case.tokens for case in cases} >= {1, 4096, 8192}

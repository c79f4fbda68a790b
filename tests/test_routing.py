"""Routing: which experts a token goes to, as each family's own router has it, and the tokens of each expert."""

import importlib

import pytest
import torch
import transformers
from exactness import assert_as_exact_as
from interpreted import interpreted
from program_order import reversed_programs

from tp_runtime.kernels import routing

SCORINGS = [("softmax", False), ("softmax", True), ("softmax_top_k", False), ("sigmoid", False)]
run = interpreted("routing_kernels")

# -inf - -inf, in rows of a tile that are no token
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")


def logits(num_tokens: int, num_experts: int, dtype=torch.float32, seed=0) -> torch.Tensor:
    """Of each token a permutation of distinct numbers, exact in any dtype: no two are equal."""
    torch.manual_seed(seed)
    return torch.rand(num_tokens, num_experts).argsort(-1).to(dtype) / 8 - 2


@pytest.mark.parametrize("num_experts, top_k", [(2, 1), (8, 2), (60, 4), (64, 8)])
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel_routes_as_torch(num_tokens, num_experts, top_k, dtype):
    """Catches a column beyond E or a row beyond T that takes part, and weights out of order."""
    x = logits(num_tokens, num_experts, dtype)
    for scoring, renormalise in SCORINGS:
        index, weights = run.run_route(x, top_k, scoring, renormalise, None)
        want_index, torchs = routing.route_ref(x, top_k, scoring, renormalise, None)
        assert torch.equal(index, want_index) and index.dtype == torch.int64
        torch.testing.assert_close(weights, torchs)


@pytest.mark.halved
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scoring, renormalise", SCORINGS)
def test_weights_are_as_exact_as_torchs(scoring, renormalise, dtype):
    """Catches a softmax without its maximum, or in the dtype of the logits."""
    x = 4 * torch.randn(300, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights, torchs = (route(x, 8, scoring, renormalise, None)[1] for route in (run.run_route, routing.route_ref))
    assert_as_exact_as(weights, torchs, _fp64(x, 8, scoring, renormalise))


def _fp64(x, top_k, scoring, renormalise):
    top = x.double().topk(top_k).values
    if scoring == "sigmoid":
        return top.sigmoid()
    if renormalise or scoring == "softmax_top_k":
        return top.softmax(-1)
    return x.double().softmax(-1).topk(top_k).values


def test_kernel_reads_strided_logits_and_writes_the_wanted_dtype():
    """Catches a kernel that takes the logits, a slice of a wider GEMM, for contiguous; Mixtral's float32 weights."""
    wide = logits(5, 32, torch.float16)
    for x in (wide[:, 3:19], wide.mT.contiguous().mT):
        index, weights = run.run_route(x, 2, "softmax", True, torch.float32)
        want_index, want = routing.route_ref(x, 2, "softmax", True, torch.float32)
        assert torch.equal(index, want_index) and weights.dtype == torch.float32
        torch.testing.assert_close(weights, want)


def test_equal_and_infinite_logits_give_distinct_experts():
    """Catches an expert that is taken twice, or one beyond E, where the k-th largest is not unique."""
    x = torch.zeros(3, 6)
    x[1, :] = -torch.inf
    x[1, 4] = 0
    x[2, 1:] = -torch.inf
    index, weights = run.run_route(x, 3, "softmax", True, None)
    assert index.tolist() == [[0, 1, 2], [4, 0, 1], [0, 1, 2]]
    torch.testing.assert_close(weights, torch.tensor([[1 / 3] * 3, [1, 0, 0], [1, 0, 0]]))


@pytest.mark.parametrize("scoring, renormalise", SCORINGS)
def test_nan_stays_in_its_row(scoring, renormalise):
    """Catches a NaN that becomes an address, is sorted away unseen, or reaches another token."""
    x = logits(6, 8)
    x[2, 5] = torch.nan
    index, weights = run.run_route(x, 2, scoring, renormalise, None)
    assert weights.isnan().all(1).tolist() == [False, False, True, False, False, False]
    assert not weights[[0, 1, 3, 4, 5]].isnan().any()
    assert ((index >= 0) & (index < 8)).all() and (index[:, 0] != index[:, 1]).all()


# family -> router class, route's arguments, config
FAMILIES = {
    "mixtral": ("MixtralTopKRouter", ("softmax", True, torch.float32), {"num_local_experts": 8}),
    "qwen2_moe": ("Qwen2MoeTopKRouter", ("softmax", False, None), {"num_experts": 8, "norm_topk_prob": False}),
    "qwen3_moe": ("Qwen3MoeTopKRouter", ("softmax", True, None), {"num_experts": 8, "norm_topk_prob": True}),
    "olmoe": ("OlmoeTopKRouter", ("softmax", False, None), {"num_experts": 8, "norm_topk_prob": False}),
    "granitemoe": ("GraniteMoeTopKRouter", ("softmax_top_k", False, None), {"num_local_experts": 8}),
    "llama4": ("Llama4Router", ("sigmoid", False, None), {"num_local_experts": 8}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_families_routers(family, dtype):
    """Catches a family whose router, in the installed transformers, is not the one of the table in `routing`."""
    router_class, how, config = FAMILIES[family]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    model_type = {"llama4": "llama4_text"}.get(family, family)
    config = transformers.AutoConfig.for_model(model_type, hidden_size=16, num_experts_per_tok=3, **config)
    router = getattr(module, router_class)(config).to(dtype)
    torch.manual_seed(0)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(9, 16, dtype=dtype)
    with torch.no_grad():
        got = routing.route(torch.nn.functional.linear(x, router.weight), 3, *how)
        answered = router(x)
        if family == "llama4":  # scores of all experts, 0 where not chosen
            weights, index = answered[0].topk(3)
        else:  # the logits come first or, of granitemoe in transformers 5.17, last
            index, weights = sorted((t for t in answered if t.shape[1] == 3), key=torch.is_floating_point)
    assert torch.equal(got[0].sort().values, index.sort().values) and got[1].dtype == weights.dtype
    assert torch.equal(got[1], weights)


@pytest.mark.parametrize("is_skewed", [False, True])
@pytest.mark.parametrize("num_tokens, top_k, num_experts", [(1, 2, 8), (7, 8, 64), (300, 2, 8), (33, 4, 60)])
def test_kernel_sorts_as_torch(num_tokens, top_k, num_experts, is_skewed):
    """Catches an order that is not by slot within an expert, a lost slot, and an empty expert's offset."""
    torch.manual_seed(0)
    index = torch.randint(num_experts, (num_tokens, top_k))
    if is_skewed:
        index = torch.where(torch.rand(index.shape) < 0.9, num_experts - 1, index)
    for block, chunk in ((16, 32), (128, 256)):
        _assert_same(run.run_sort(index, num_experts, block, chunk), routing.sort_by_expert_ref(index, num_experts))


def _assert_same(got: routing.Sorted, want: routing.Sorted) -> None:
    assert torch.equal(got.offsets, want.offsets) and torch.equal(got.slots, want.slots)
    assert got.slots.dtype == got.offsets.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_experts_that_do_not_exist_have_no_slots(dtype):
    """Catches an index out of range that is counted, or stored beyond the end."""
    index = torch.tensor([[0, 3], [-1, 2], [4, 3], [2**31 - 1, -(2**31)]], dtype=dtype)
    got = run.run_sort(index, 4, 16, 16)
    _assert_same(got, routing.sort_by_expert_ref(index, 4))
    with pytest.raises(ValueError, match="token 1 is given expert -1"):
        interpreted("lost").raise_lost(index.device)
    assert got.offsets.tolist() == [0, 1, 1, 2, 4] and got.slots.tolist() == [0, 3, 1, 5, 2, 4, 6, 7]


def test_the_first_lost_token_is_noted():
    """Catches the last of several told, a slot beyond the end told as one, and half of a note taken for all of it."""
    device = torch.device("cpu")
    host = interpreted("lost")
    host.raise_lost(device)
    index = torch.randint(4, (100, 3), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    run.run_sort(index, 4, 16, 64)
    host.raise_lost(device)
    index[70, 0] = index[71, 2] = 2**31 - 1
    with reversed_programs():
        run.run_sort(index, 4, 16, 64)
    words = host.lost_note(device, "expert")
    assert words.tolist() == [71, 2**31 - 1, 4]
    for late in range(3):
        word, words[late] = words[late].item(), 0
        host.raise_lost(device)
        words[late] = word
    with pytest.raises(ValueError, match="token 70 is given expert 2147483647: there are experts 0 to 3. That was an"):
        host.raise_lost(device)
    assert not words.any()
    run.run_sort(torch.tensor([[-5]]), 1)
    with pytest.raises(ValueError, match="token 0 is given expert -5: there are experts 0 to 0. That was an earlier"):
        host.raise_lost(device)


def test_sort_does_not_depend_on_the_order_of_programs():
    """Catches a program that needs what another one leaves behind."""
    index = torch.randint(8, (200, 2), generator=torch.Generator().manual_seed(0))
    with reversed_programs():
        _assert_same(run.run_sort(index, 8, 16, 64), routing.sort_by_expert_ref(index, 8))


@pytest.mark.parametrize(
    "given, message",
    [
        ((torch.zeros(3, 4), 5), r"top_k=5 of router logits \[3, 4\]: choose 1 to 4"),
        ((torch.zeros(3, 4), 0), "top_k=0"),
        ((torch.zeros(4), 1), r"\[4\].*logits \[T, E\]"),
        ((torch.zeros(3, 4), 1, "tanh"), "scoring='tanh' is not one of softmax, softmax_top_k, sigmoid"),
    ],
)
def test_bad_arguments_are_refused(given, message):
    """Catches torch's message about topk, which names neither value."""
    for op in (routing.route, torch.ops.tp_runtime.route):
        with pytest.raises(ValueError, match=message):
            op(*given)


def test_check_names_token_and_value():
    """Catches an error that says that something is wrong somewhere."""
    index, weights = torch.tensor([[0, 1], [2, 4]]), torch.ones(2, 2)
    with pytest.raises(ValueError, match="token 1 is given expert 4: there are experts 0 to 3"):
        routing.check_routing(index, weights, 4)
    weights[0, 1] = torch.nan
    with pytest.raises(ValueError, match="token 0 is given the routing weight nan"):
        routing.check_routing(index, weights, 5)
    routing.check_routing(index, torch.ones(2, 2), 5)


def test_op():
    """Catches a schema, fake or dispatch that torch.compile or export would trip over."""
    given = [(logits(5, 8), 2), (logits(0, 8), 2, "sigmoid"), (logits(5, 8), 3, "softmax", True, torch.float16)]
    for args in given:
        torch.library.opcheck(torch.ops.tp_runtime.route.default, args)
    compiled = torch.compile(lambda x: routing.route(x, 2), backend="eager", fullgraph=True)
    for got, want in zip(compiled(logits(5, 8)), routing.route(logits(5, 8), 2)):
        assert torch.equal(got, want)

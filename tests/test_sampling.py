"""The sampler against Hugging Face's logits processors on the whole vocabulary, for every way to cut the vocabulary."""

import math

import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tp_runtime.kernels.lost import lost_note
from tp_runtime.local import run_local
from tp_runtime.sampling import Sampler, draw_in_step

CUTS = [[21], [11, 10], [8, 8, 5], [8, 8, 5, 0], [5, 4, 4, 4, 4], [0, 20, 0, 1, 0]]  # some ranks have no vocabulary
OPTIONS = [
    {"temperature": 1.0},
    {"temperature": 0.3, "top_k": 5},
    {"temperature": 1.7, "top_p": 0.6},
    {"temperature": 0.8, "top_k": 7, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 100},
    {"temperature": 0.9, "top_k": 6, "repetition_penalty": 1.3},
]


def on_shards(lengths: list[int], fn) -> list:
    """fn(comm, cut) on a thread a rank; `cut(logits)` is the rank's part of whole logits."""

    def rank(comm):
        return fn(comm, lambda logits: logits.split(lengths, dim=-1)[comm.rank])

    return run_local(rank, len(lengths))


def tokens_of(lengths: list[int], steps: list[torch.Tensor], seen=None, **options) -> list[list[int]]:
    """The tokens that every rank chose, one list a step; they must be the same on all ranks."""

    def run(comm, cut):
        sampler = Sampler(comm, lengths, **options)
        return [sampler.next_tokens(cut(logits), seen) for logits in steps]

    first, *others = on_shards(lengths, run)
    assert all(other == first for other in others)
    return first


def random_logits(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def warped(logits: torch.Tensor, options: dict, seen=None) -> torch.Tensor:
    """Hugging Face's scores, in float64, in the order of its generate()."""
    scores = logits.double()
    if options.get("repetition_penalty", 1.0) != 1:
        scores = RepetitionPenaltyLogitsProcessor(options["repetition_penalty"])(seen, scores)
    scores = TemperatureLogitsWarper(options["temperature"])(None, scores)
    if options.get("top_k"):
        scores = TopKLogitsWarper(options["top_k"])(None, scores)
    return TopPLogitsWarper(options["top_p"])(None, scores) if "top_p" in options else scores


# -- greedy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", CUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_first_of_the_largest(lengths, dtype):
    """Catches a tie settled by rank or by chance: bf16 logits tie often, and then the text would depend on tp_size."""
    steps = [random_logits(40, 21, seed=s, dtype=dtype).round() for s in range(3)]
    chosen = tokens_of(lengths, steps)
    for logits, tokens in zip(steps, chosen):
        first = [row.index(max(row)) for row in logits.tolist()]
        assert tokens == first
    assert sum(row.tolist().count(row.max()) > 1 for row in steps[0]) > 5, "no ties: the test shows nothing"


# -- draws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_same_seed_same_tokens_at_every_size(options):
    """Catches a draw that depends on how the vocabulary is cut, ties at the edge of top-k above all."""
    steps = [random_logits(6, 21, seed=s, dtype=torch.bfloat16).round() for s in range(12)]
    seen = torch.randint(-1, 21, (6, 4), generator=torch.Generator().manual_seed(1))
    whole = tokens_of([21], steps, seen, seed=5, **options)
    for lengths in CUTS:
        assert tokens_of(lengths, steps, seen, seed=5, **options) == whole
    if options.get("top_k") != 1:
        assert tokens_of([21], steps, seen, seed=6, **options) != whole


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", [[21], [8, 8, 5, 0]], ids=str)
def test_probabilities_are_those_of_hugging_face(options, lengths):
    """Catches an edge of top-k or top-p off by one, temperature after top-p, a penalty lost on a shard."""
    logits = random_logits(300, 21, seed=3)
    seen = torch.randint(0, 21, (300, 4), generator=torch.Generator().manual_seed(1))
    expected = torch.softmax(warped(logits, options, seen), dim=-1)

    def run(comm, cut):
        sampler = Sampler(comm, lengths, **options)
        shard = cut(logits) if sampler.repetition_penalty == 1 else sampler._penalise(cut(logits), seen)
        values, ids = sampler._candidates(shard, sampler.top_k or 21)
        weights = sampler._probabilities(values)
        return torch.zeros(300, 21, dtype=torch.float64).scatter(1, ids, weights / weights.sum(-1, keepdim=True))

    for probabilities in on_shards(lengths, run):
        assert torch.equal(probabilities > 0, expected > 0)
        # float32 against float64 in the penalty's division alone; elsewhere rounding of float64
        tolerance = 1e-6 if "repetition_penalty" in options else 1e-12
        assert (probabilities - expected).abs().max() <= tolerance


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_frequencies(options):
    """Catches a draw that does not follow the probabilities: 20 000 draws, each token within 5 standard deviations."""
    n = 20_000
    logits = random_logits(1, 21, seed=4)
    expected = torch.softmax(warped(logits, options), dim=-1)[0]
    (tokens,) = tokens_of([8, 8, 5, 0], [logits.expand(n, -1)], seed=0, **options)
    counts = torch.bincount(torch.tensor(tokens), minlength=21)
    bound = 5 * (n * expected * (1 - expected)).sqrt()
    assert ((counts - n * expected).abs() <= bound).all()
    assert (counts[expected == 0] == 0).all()


def test_top_p_ends_with_the_token_that_reaches_it():
    """Catches one token too many where the sum is top_p exactly: a half of four equal tokens are two, the first two."""
    logits = torch.zeros(2000, 4)
    assert (TopPLogitsWarper(0.5)(None, logits.clone()) == 0).sum(-1).tolist() == [2] * 2000
    (tokens,) = tokens_of([2, 2], [logits], seed=0, temperature=1.0, top_p=0.5)
    assert set(tokens) == {0, 1}


def test_top_k_keeps_k_of_equal_logits():
    """Catches a candidate set that topk chose at random among equals: of equal logits the lowest ids stay."""
    logits = torch.full((1, 21), 1.0)
    logits[0, [3, 17]] = 2.0
    (tokens,) = tokens_of([8, 8, 5, 0], [logits.expand(3000, -1)], seed=0, temperature=1.0, top_k=5)
    assert set(tokens) == {3, 17, 0, 1, 2}


def test_draws_without_a_seed_differ_from_run_to_run():
    """Catches a default seed; within one run all ranks still agree (in `tokens_of`)."""
    logits = [torch.zeros(100, 21)]
    assert tokens_of([11, 10], logits, temperature=1.0) != tokens_of([11, 10], logits, temperature=1.0)


def test_rank_zero_draws():
    """Catches ranks that were given different seeds, or that compute differently, and draw apart."""

    def run(comm, cut):
        return Sampler(comm, [11, 10], temperature=1.0, seed=comm.rank).next_tokens(cut(torch.zeros(50, 21)))

    first, second = on_shards([11, 10], run)
    assert first == second == tokens_of([21], [torch.zeros(50, 21)], temperature=1.0, seed=0)[0]


# -- repetition penalty -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", CUTS, ids=str)
@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty(lengths, penalty):
    """Catches a token penalised on the wrong rank, twice if it was seen twice, or the token of a negative index."""
    logits = random_logits(30, 21)
    seen = torch.randint(0, 21, (30, 9), generator=torch.Generator().manual_seed(2))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits.clone())
    padded = torch.cat((torch.full((30, 3), -1), seen), dim=1)

    def run(comm, cut):
        return Sampler(comm, lengths, repetition_penalty=penalty)._penalise(cut(logits), padded)

    assert torch.equal(torch.cat(on_shards(lengths, run), dim=-1), expected)
    assert tokens_of(lengths, [logits], padded, repetition_penalty=penalty) == [expected.argmax(-1).tolist()]


# -- what is no distribution ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value, shown", [(math.nan, "NaN"), (-math.nan, "NaN"), (math.inf, "inf")])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 3}, {"temperature": 1.0}], ids=str)
@pytest.mark.parametrize("place", [0, 20])
def test_logits_that_are_not_finite_are_an_error_on_every_rank(value, shown, options, place):
    """Catches text made of broken weights, and ranks left waiting for the one that found it."""
    logits = random_logits(3, 21)
    logits[1, place] = value

    def run(comm, cut):
        sampler = Sampler(comm, [8, 8, 5, 0], seed=0, **options)
        with pytest.raises(FloatingPointError, match=f"^{shown} in the logits of sequence 1: .* check the checkpoint"):
            sampler.next_tokens(cut(logits))
        return "raised"

    assert on_shards([8, 8, 5, 0], run) == ["raised"] * 4


def test_a_lost_token_is_named_before_the_nan_that_it_made():
    """Catches an expert that does not exist reported as weights that are not finite, or a step too late; positions."""
    told = {"expert": "token 3 is given expert 99: there are experts 0 to 7", "position": "position 99 is outside of a"}
    for kind, value in (("expert", math.nan), ("expert", 0.0), ("position", 0.0)):
        lost_note(torch.device("cpu"), kind).copy_(torch.tensor([4, 99, 8]))
        with pytest.raises(ValueError, match=told[kind]):
            tokens_of([21], [torch.full((1, 21), value)])
    tokens_of([21], [torch.zeros(1, 21)])


def test_more_nans_than_candidates():
    """Catches NaNs that crowd each other out of the k largest."""
    with pytest.raises(FloatingPointError, match="NaN in the logits of sequence 0"):
        tokens_of([11, 10], [torch.full((1, 21), math.nan)], temperature=1.0, top_k=2)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 6}, {"temperature": 1.0}], ids=str)
def test_forbidden_tokens(options):
    """Catches a token of logit -inf that is drawn, or a shard of nothing else that is taken for an error."""
    logits = torch.full((200, 21), -math.inf)
    logits[:, [9, 13]] = torch.tensor([0.5, 0.4])
    (tokens,) = tokens_of([8, 8, 5, 0], [logits], seed=0, **options)
    assert set(tokens) == ({9, 13} if options else {9})
    with pytest.raises(FloatingPointError, match="^-inf in the logits of sequence 0"):
        tokens_of([8, 8, 5, 0], [torch.full((1, 21), -math.inf)], seed=0, **options)


# -- what travels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, numbers", [({}, 2), ({"temperature": 1.0, "top_k": 5}, 10)])
def test_only_candidates_travel(options, numbers):
    """Catches a gather of the whole vocabulary where each rank's best are enough."""

    def run(comm, cut):
        gathered, all_gather = [], comm.all_gather

        def recording(x, lengths):
            gathered.append((x.shape[-1], lengths))
            return all_gather(x, lengths)

        comm.all_gather = recording
        Sampler(comm, [500, 500, 3], seed=0, **options).next_tokens(cut(random_logits(2, 1003)))
        return gathered

    for rank, gathered in enumerate(on_shards([500, 500, 3], run)):
        lengths = [numbers, numbers, min(numbers, 6)]
        assert gathered == [(lengths[rank], lengths)]


# -- draws of Hugging Face's own generate() ---------------------------------------------------------------------------


def draws(*args) -> list[torch.Tensor]:
    """Every kind of draw that generate() makes."""
    weights = torch.arange(1.0, 9.0).expand(3, 8)
    return [
        torch.multinomial(weights, 2),
        weights.multinomial(num_samples=1),
        torch.rand(4),
        torch.rand_like(weights),
        torch.randint(0, 1000, (5,)),
        torch.randint(1000, size=(5,)),
        torch.bernoulli(weights / 9),
    ]


def test_draws_in_step_are_rank_zeros():
    """Catches threads that race for torch's one generator: each draw is the one that a program of one rank makes."""
    torch.manual_seed(3)
    alone = draws()

    def run(comm, cut):
        with draw_in_step(comm):
            return [draw for _ in range(3) for draw in draws()]

    for _ in range(3):
        torch.manual_seed(3)
        ranks = on_shards([1] * 5, run)
        for rank in ranks:
            assert all(torch.equal(a, b) for a, b in zip(rank, ranks[0]))
            assert all(torch.equal(a, b) for a, b in zip(rank, alone))


def test_draws_from_a_generator_of_ones_own():
    """Catches a generator that was passed and is not used on ranks above 0: there it would fall behind."""

    def run(comm, cut):
        generator = torch.Generator().manual_seed(comm.rank)
        with draw_in_step(comm):
            inside = torch.rand(3, generator=generator)
        return inside, torch.rand(3, generator=generator)

    ranks = on_shards([1] * 3, run)
    for rank, (inside, after) in enumerate(ranks):
        generator = torch.Generator().manual_seed(rank)
        own = torch.rand(3, generator=generator)
        assert torch.equal(inside, ranks[0][0]) and (rank > 0 or torch.equal(inside, own))
        assert torch.equal(after, torch.rand(3, generator=generator))

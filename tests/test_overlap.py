"""Every schedule gives the sequential result; the choice between them is measured, once, and the same on every rank."""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import run_gloo
from interpreted import interpreted
from tiny_models import TOLERANCE, answers, one_thread, prompt, reference  # noqa: F401

import tp_runtime
from tp_runtime import overlap as overlap_module
from tp_runtime import peer_memory
from tp_runtime import race as race_module
from tp_runtime.comm import communicator
from tp_runtime.communicator import NullCommunicator
from tp_runtime.config import RuntimeConfig
from tp_runtime.overlap import (
    ONE_SHOT,
    SEQUENTIAL,
    Measured,
    Overlap,
    Schedule,
    Size,
    all_reduce,
    hidden_share,
    row_parallel,
    run,
)
from tp_runtime.race import race

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = [(1, 64, 32), (33, 70, 45), (7, 3, 8), (0, 64, 32), (5, 64, 0)]  # M, N, K of one rank
LARGE = (301, 513, 64)  # above what shared memory takes at once
SCHEDULES = [*map(Schedule, (1, 2, 3, 4)), ONE_SHOT]
GROUPS = (2, 3, 4, 8)
MODELS = ("llama-12/4", "mixtral-14/2")
MODES = ("off", "columns", "lanes", "one-shot")


def operands(rank: int, m: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Of -1, 0 and 1, so that every sum is exact: torch's GEMM adds in another order for other N."""
    generator = torch.Generator().manual_seed(rank)
    return tuple(torch.randint(-1, 2, (rows, k), generator=generator).to(dtype) for rows in (m, n))


def differences(comm, shapes=(*SHAPES, LARGE)) -> list[tuple]:
    """Shapes and schedules whose result is not the sum of all ranks' products."""
    torch.set_num_threads(1)
    wrong = []
    for shape, dtype in itertools.product(shapes, (torch.float32, torch.bfloat16)):
        x, w = operands(comm.rank, *shape, dtype)
        products = [a.float() @ b.float().T for a, b in (operands(r, *shape, dtype) for r in range(comm.size))]
        want = sum(products).to(dtype)
        for schedule in SCHEDULES:
            got = run(x, w, comm, schedule)
            if got.shape != want.shape or not torch.equal(got, want):
                wrong.append((shape, dtype, str(schedule)))
    return wrong


def unlike(comm, modes=MODES) -> list[tuple]:
    """Models and modes whose logits, or at few ranks greedy text, are not the unsharded model's; one-shot's logits have
    to have the bits of the sequential ones."""
    wrong = []
    for name in MODELS:
        whole, of_mode = reference(name), {}
        for mode in modes:
            model = whole.copy()
            tp_runtime.patch(model, comm, config=RuntimeConfig(overlap=mode))
            with torch.no_grad():
                logits = of_mode[mode] = model(prompt()).logits
            if (logits - whole.logits).abs().max() > TOLERANCE:
                wrong.append((name, mode))
            if comm.size <= 3:
                tokens = model.generate(prompt(), max_new_tokens=4, do_sample=False)
                wrong += [] if torch.equal(tokens, whole.tokens) else [(name, mode, "text")]
        if not torch.equal(of_mode["off"], of_mode["one-shot"]):
            wrong.append((name, "other bits"))
    return wrong


@pytest.mark.parametrize("tp_size", [1, *GROUPS])
def test_schedules_give_the_same_bits_in_threads(tp_size):
    """Catches a block that is lost, doubled or in the wrong place."""
    assert tp_runtime.run_local(differences, tp_size, SHAPES) == [[]] * tp_size


@pytest.mark.parametrize("tp_size", [1, *GROUPS])
def test_models_say_the_same_in_threads(tp_size, monkeypatch):
    """Catches a layer that a schedule leaves out, dense or with experts."""
    monkeypatch.setattr(overlap_module, "MIN_CUT_BYTES", 0)
    assert tp_runtime.run_local(unlike, tp_size) == [[]] * tp_size


def in_groups(comm) -> dict:
    """Of each size a group: blocks small and large (gloo's own, asynchronous; one-shot, in pieces), and models."""
    overlap_module.MIN_CUT_BYTES = 0
    wrong = {}
    for size in GROUPS:
        group = dist.new_group(list(range(size)))
        if comm.rank < size:
            ours = communicator(group)
            wrong[size] = differences(ours) + unlike(ours)
    return wrong


def test_schedules_and_models_in_processes():
    """Catches a block or a piece that is read before its sum has come."""
    for rank, wrong in enumerate(run_gloo(in_groups, max(GROUPS))):
        assert wrong == {size: [] for size in GROUPS if rank < size}


def choosing(comm) -> dict:
    """A model that measures, and a sum as large as many tokens' experts have; what the choices came to."""
    overlap_module.MIN_CUT_BYTES = 0
    model = reference("llama-12/4").copy()
    tp_runtime.patch(model, comm)
    overlap = model._tp_runtime.overlap
    got = {"said": answers(model, prompt())}
    got["sum"] = all_reduce(torch.full((301, 257), 1.0 + comm.rank), overlap).unique().tolist()
    return {**got, "measured": dict(overlap.measured), "chosen": overlap.report()["chosen"]}


# Of norms and of blocks, one of each kind.
FOLLOWED = ("gemma2-9/3", "starcoder2-9/3", "cohere-9/3", "mixtral-14/2")


def by_kernels(comm) -> dict[str, tuple]:
    """Models whose sums are those of the kernels between GPUs, interpreted: logits, then with a hook on rank 0; and
    what was launched, sums with a norm and sums alone."""
    kernels, launched = interpreted("all_reduce"), []
    kernels.PROGRAMS, kernels.BLOCK = 2, 64

    def recorded(name):
        def call(*args, **options):
            launched.append(name)
            return getattr(kernels, name)(*args, **options)

        return call

    peer_memory.peers_over = kernels.peers_over
    peer_memory.all_reduce, peer_memory.all_reduce_rms_norm = map(recorded, ("all_reduce", "all_reduce_rms_norm"))
    comm._peers, comm._kernels = None, peer_memory.PeerKernels(comm.peer_buffers(1 << 20), comm.rank)
    comm.one_shot_above, comm.fuses_norm = 0, True
    comm.barrier()
    found = {}
    for name in FOLLOWED:
        model = reference(name).copy()
        tp_runtime.patch(model, comm, config=RuntimeConfig(overlap="one-shot"))
        with torch.no_grad():
            logits = [model(prompt(1, 3)).logits]
            if comm.rank == 0:
                for module in (model.model.layers[1].self_attn, model.model.embed_tokens):
                    module.register_forward_hook(lambda *_: None)
            logits.append(model(prompt(1, 3)).logits)
        found[name] = *logits, [launched.count(kind) for kind in ("all_reduce_rms_norm", "all_reduce")]
        launched.clear()
    return found


def of_three(comm) -> tuple[dict, dict]:
    return choosing(comm), by_kernels(comm)


@functools.cache
def three() -> tuple[tuple[dict, ...], tuple[dict, ...]]:
    """Every rank's `choosing`, and every rank's `by_kernels`."""
    return tuple(zip(*run_gloo(of_three, 3)))


def test_sums_and_norms_are_one_launch_between_gpus():
    """Catches a sum that is not reduced, or twice, and one that has a launch of its own though nobody looks at it;
    ranks of which one looks at it and that then wait for other programs of each other."""
    for rank, found in enumerate(three()[1]):
        for name, (*logits, launched) in found.items():
            with torch.no_grad():
                want = reference(name).copy()(prompt(1, 3)).logits
            assert all((got - want).abs().max() <= TOLERANCE for got in logits), name
            # Of two passes. A parallel layer adds its parts before they are summed, hooks or none.
            in_layers, watched = (2, 1) if name.startswith("cohere") else (4, 2)
            watched *= rank == 0
            assert launched == [2 * (1 + in_layers) - watched, watched], name


def test_processes_choose_alike():
    """Catches ranks that choose different schedules and hang, and a sum of experts that is not chosen for."""
    whole, ranks = reference("llama-12/4"), three()[0]
    for rank in ranks:
        logits, tokens = rank["said"]
        assert (logits - whole.logits).abs().max() <= TOLERANCE and torch.equal(tokens, whole.tokens)
        assert rank["sum"] == [6.0]
        assert rank["measured"] == ranks[0]["measured"] and rank["chosen"] == ranks[0]["chosen"]
    of_sum = next(m for size, m in ranks[0]["measured"].items() if not size.in_features)
    assert list(of_sum.schedule_s) == [SEQUENTIAL, ONE_SHOT]
    assert len(ranks[0]["chosen"]) == len(ranks[0]["measured"]) > 1


class Clock(Overlap):
    """Says that runs took the given times, and how often it was asked."""

    def __init__(self, *seconds: float, one_shot_above: int | None = None):
        comm = NullCommunicator(0, 2)
        comm.one_shot_above = one_shot_above
        comm.clock = self
        super().__init__(comm)
        self.seconds, self.asked = seconds, 0


@pytest.fixture
def clocks(monkeypatch):
    """A race is what the communicator's clock says."""

    def as_told(comm, *runs, repeats):
        comm.clock.asked += 1
        assert len(runs) == len(comm.clock.seconds)
        return [[s] * 11 for s in comm.clock.seconds]

    monkeypatch.setattr(overlap_module, "race", as_told)


def test_the_fastest_schedule_is_taken_and_measured_once(clocks):
    """Catches a choice of the slowest, a measurement at every call, and one that decides for other sizes."""
    large, small = torch.empty(4096, 8), torch.empty(8, 8)
    w = torch.empty(512, 8)
    blocks_win, sequential_wins = Clock(1, 5, 3, 4), Clock(1, 3, 4, 5)
    for _ in range(2):
        assert blocks_win.schedule(large, w, 16) == Schedule(2)
        assert sequential_wins.schedule(large, w, 16) is SEQUENTIAL
    assert blocks_win.asked == sequential_wins.asked == 1
    assert blocks_win.schedule(torch.empty(4000, 8), w, 16) == Schedule(2) and blocks_win.asked == 1  # rounded up alike
    assert blocks_win.schedule(small, w, 16) is SEQUENTIAL and blocks_win.asked == 1  # too small to cut
    assert blocks_win.schedule(large, torch.empty(1024, 8), 16) == Schedule(2) and blocks_win.asked == 2
    # Another layer, of which this rank has as much, or nothing: ranks are cut unevenly, and all must measure.
    assert blocks_win.schedule(large, w, 17) == Schedule(2) and blocks_win.asked == 3
    assert blocks_win.schedule(large[:, :0], w[:, :0], 18) == Schedule(2) and blocks_win.asked == 4


def test_a_schedule_that_loses_three_rounds_is_not_taken():
    """Catches a choice by luck: a median that is better and rounds that are worse; and one lost to a single pause."""
    two, four = Schedule(2), Schedule(4)
    times = {SEQUENTIAL: [5.0] * 11, two: [1.0] * 8 + [6, 5, 6], four: [9, 9, *[4.0] * 9]}
    assert Measured([0], times).fastest() == four
    assert Measured([0], {**times, four: [9, 9, 9]}).fastest() == SEQUENTIAL


def test_one_shot_is_a_choice_where_it_is_another_way(clocks):
    """Catches a measurement of two ways that are one, and messages of a decode step that are never asked about."""
    y, w, x = torch.empty(8, 512), torch.empty(512, 8), torch.empty(8, 8)
    assert Clock(one_shot_above=y.nbytes).schedule(x, w, 16) is SEQUENTIAL
    assert Clock(1, 3, 2, one_shot_above=0).schedule(x, w, 16) is ONE_SHOT
    assert Clock(1, 2, 3, one_shot_above=0).schedule(x, w, 16) is SEQUENTIAL
    of_experts = Clock(0, 3, 2, one_shot_above=0)
    assert [of_experts.sum_schedule(y) for _ in range(2)] == [ONE_SHOT] * 2 and of_experts.asked == 1
    assert of_experts.sum_schedule(torch.empty(64, 512)) is ONE_SHOT and of_experts.asked == 2
    large = Clock(1, 9, 8, 7, 6, one_shot_above=0)
    assert large.schedule(torch.empty(4096, 8), w, 16) is ONE_SHOT
    assert (large.smallest_choice(), Clock().smallest_choice()) == (1, overlap_module.MIN_CUT_BYTES)


def test_hidden_share_by_hand():
    """Catches a share of the whole time instead of the communication's, and a division by none of it."""
    assert hidden_share([1], [5], [3]) == 0.5 and hidden_share([1], [5], [5]) == hidden_share([5], [5], [5]) == 0
    assert hidden_share([1], [5], [7]) == -0.5  # a forced schedule may cost more than it hides


def test_report_by_hand():
    """Catches seconds told as microseconds, and a share that is not the chosen schedule's."""
    overlap = Overlap(NullCommunicator())
    assert overlap.report() == {"mode": "auto", "chosen": []}
    size = Size(9, 70, 45, torch.bfloat16)
    overlap.measured[size] = Measured([1.0] * 9, {SEQUENTIAL: [5.0] * 9, ONE_SHOT: [2.0] * 9})
    overlap.lanes_s[11] = [[3.0] * 9, [5.0] * 9, [4.0] * 9]
    gemm, layers = overlap.report()["chosen"]
    assert gemm == {
        "what": "gemm N 70 K 45, bfloat16, M 257 to 512", "schedule": "one-shot", "hidden_share": 0.75,
        "us": 2e6, "sequential_us": 5e6, "compute_us": 1e6,
    }  # fmt: skip
    assert (layers["what"], layers["schedule"], layers["hidden_share"]) == ("layers, 1024 to 2047 tokens", "lanes", 0.5)


def test_a_forced_schedule_is_not_measured(clocks):
    """Catches a mode that is ignored."""
    x, w = torch.empty(4096, 8), torch.empty(512, 8)
    for mode, want in {"off": SEQUENTIAL, "lanes": SEQUENTIAL, "columns": Schedule(4), "one-shot": ONE_SHOT}.items():
        clock = Clock()
        clock.mode = mode
        assert clock.schedule(x, w, 16) == want and clock.asked == 0


def test_the_slowest_ranks_clock_decides(monkeypatch):
    """Catches ranks that each believe their own clock, a rival that runs on when it has won or lost, a cold round."""

    monkeypatch.setattr(race_module, "_seconds", lambda run, repeats, device: float(run()))

    def measure(comm):
        calls = []

        def taking(*seconds):
            """Seconds of each round: the first to warm up, the last those of all that follow."""
            left = list(seconds)
            return lambda: calls.append(seconds) or (left.pop(0) if len(left) > 1 else left[0])

        compute, sequential = taking(1 + comm.rank), taking(9, 5 - comm.rank)
        wins, loses = taking(99, 6, 4, 6, 4), taking(0, 6, 4, 5, 6)
        return race(comm, compute, sequential, wins, loses), len(calls)

    wins, loses = [6.0, 4.0, 6.0, *[4.0] * 8], [6.0, 4.0, 5.0, 6.0]
    for found, num_calls in tp_runtime.run_local(measure, 3):
        assert found == [[3.0] * 11, [5.0] * 11, wins, loses]
        assert num_calls == 12 * 3 + 1 + len(loses)


def test_gemms_beside_a_collective_leave_it_its_multiprocessors(monkeypatch):
    """Catches an all-reduce that waits for the whole GEMM it should hide behind, and a GEMM alone that leaves some."""
    from tp_runtime.kernels import target

    left, comm = [], NullCommunicator(0, 2, "cuda")
    comm.collective_sms = 16
    monkeypatch.setattr(overlap_module, "gemm", lambda x, w: left.append(target._sms_left) or x @ w.T)
    x, w = torch.ones(2, 8), torch.ones(4, 8)
    for schedule in (SEQUENTIAL, Schedule(2), SEQUENTIAL):
        run(x, w, comm, schedule)
    assert left == [0, 16, 16, 0]


def test_bias_is_added_once():
    """Catches a bias that every rank adds to its part."""

    def biased(comm, bias):
        return row_parallel(torch.ones(2, 4), torch.ones(6, 4), bias, Overlap(comm), 12)

    for y in tp_runtime.run_local(biased, 3, torch.arange(6.0)):
        assert torch.equal(y, (12 + torch.arange(6.0)).expand(2, -1))

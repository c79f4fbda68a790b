"""Every schedule gives the sequential result; the choice between them is measured, once, and the same on every rank."""

import pytest
import torch
from gloo_ranks import run_gloo
from tiny_models import TOLERANCE, answers, one_thread, prompt, reference  # noqa: F401

import tp_runtime
from tp_runtime import overlap as overlap_module
from tp_runtime.comm import NullCommunicator
from tp_runtime.config import RuntimeConfig
from tp_runtime.overlap import SEQUENTIAL, Measured, Overlap, Schedule, row_parallel, run

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = [(1, 64, 32), (33, 70, 45), (7, 3, 8), (0, 64, 32), (5, 64, 0)]  # M, N, K of one rank


def operands(rank: int, m: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Of -1, 0 and 1, so that every sum is exact: torch's GEMM adds in another order for other N."""
    generator = torch.Generator().manual_seed(rank)
    return tuple(torch.randint(-1, 2, (rows, k), generator=generator).to(dtype) for rows in (m, n))


def differences(comm) -> list[tuple]:
    """Shapes and schedules whose result is not the sum of all ranks' products."""
    torch.set_num_threads(1)
    wrong = []
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            x, w = operands(comm.rank, *shape, dtype)
            products = [a.double() @ b.double().T for a, b in (operands(r, *shape, dtype) for r in range(comm.size))]
            want = sum(products).to(dtype)
            for blocks in (1, 2, 3, 4):
                got = run(x, w, comm, Schedule(blocks))
                if got.shape != want.shape or not torch.equal(got, want):
                    wrong.append((shape, dtype, blocks))
    return wrong


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 8])
def test_column_blocks_give_the_same_bits_in_threads(tp_size):
    """Catches a block that is lost, doubled or in the wrong place."""
    assert tp_runtime.run_local(differences, tp_size) == [[]] * tp_size


def in_processes(comm) -> dict:
    """Blocks small and large (gloo's own, asynchronous), a model under each mode, and what the choice came to."""
    overlap_module.MIN_CUT_BYTES = 0
    got = {"differences": differences(comm)}
    x, w = operands(comm.rank, 300, 513, 64, torch.float32)  # above what shared memory takes
    want = run(x, w, comm, SEQUENTIAL)
    got["large"] = [torch.equal(run(x, w, comm, Schedule(blocks)), want) for blocks in (2, 3)]
    for mode in ("columns", "lanes", "auto"):
        model = reference("llama-12/4").copy()
        tp_runtime.patch(model, comm, config=RuntimeConfig(overlap=mode))
        got[mode] = answers(model, prompt())
        got["measured", mode] = dict(model._tp_runtime.overlap.measured)
    return got


def test_processes_give_the_sequential_result():
    """Catches a block that is read before its sum has come, and ranks that choose different schedules and hang."""
    whole = reference("llama-12/4")
    ranks = run_gloo(in_processes, 3)
    for rank in ranks:
        assert rank["differences"] == []
        assert rank["large"] == [True, True]
        for mode in ("columns", "lanes", "auto"):
            logits, tokens = rank[mode]
            assert (logits - whole.logits).abs().max() <= TOLERANCE and torch.equal(tokens, whole.tokens)
        assert rank["measured", "auto"] == ranks[0]["measured", "auto"] != {}
        assert rank["measured", "columns"] == rank["measured", "lanes"] == {}


class Clock(Overlap):
    """Says that runs took the given times, and how often it was asked."""

    def __init__(self, *seconds: float):
        super().__init__(NullCommunicator(0, 2))
        self.seconds, self.asked = seconds, 0

    def slowest_s(self, runs):
        self.asked += 1
        assert len(runs) == len(self.seconds)
        return [[s] * 3 for s in self.seconds]


def test_the_fastest_schedule_is_taken_and_measured_once():
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


def test_a_schedule_that_loses_a_round_is_not_taken():
    """Catches a choice by luck: a median that is better and a round that is worse."""
    two, four = Schedule(2), Schedule(4)
    times = {SEQUENTIAL: [5, 5, 5], two: [1, 1, 6], four: [4, 4, 4]}
    assert Measured([0], times).fastest() == four
    assert Measured([0], {**times, four: [4, 5, 4]}).fastest() == SEQUENTIAL


def test_a_forced_schedule_is_not_measured():
    """Catches a mode that is ignored."""
    x, w = torch.empty(4096, 8), torch.empty(512, 8)
    for mode, want in {"off": SEQUENTIAL, "lanes": SEQUENTIAL, "columns": Schedule(4)}.items():
        clock = Clock()
        clock.mode = mode
        assert clock.schedule(x, w, 16) == want and clock.asked == 0


def test_the_slowest_ranks_clock_decides():
    """Catches ranks that each believe their own clock."""

    def measure(comm):
        overlap = Overlap(comm)
        overlap._seconds = lambda run: float(run())
        return overlap.slowest_s([lambda: 1 + comm.rank, lambda: 5 - comm.rank])

    assert tp_runtime.run_local(measure, 3) == [[[3.0] * 5, [5.0] * 5]] * 3


def test_bias_is_added_once():
    """Catches a bias that every rank adds to its part."""

    def biased(comm, bias):
        return row_parallel(torch.ones(2, 4), torch.ones(6, 4), bias, Overlap(comm), 12)

    for y in tp_runtime.run_local(biased, 3, torch.arange(6.0)):
        assert torch.equal(y, (12 + torch.arange(6.0)).expand(2, -1))

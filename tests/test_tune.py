"""Tests of bench.tune and what it stands on: names of shapes, the timer, the choice of a kernel, the tables it writes.

No GPU is needed: ops of this file run on the CPU, and a timer of this file says how long a GPU would take.
"""

import itertools
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

import tp_runtime
from bench import kernel_ops, kernel_shapes, timing, tune
from bench.choice import SCREEN_REPEATS, Task, measure
from bench.kernel_ops import OPS, AttentionOp, ExpertsOp, Op, TopKOp
from bench.kernel_shapes import MODELS, PUBLISHED_CUBLAS_US, SKINNY, KernelShape, model_shapes
from bench.kernel_shapes import shape as named_shape
from tests.interpreted import interpreted
from tests.tiny_models import tiny
from tp_runtime import layers
from tp_runtime.comm import NullCommunicator
from tp_runtime.estimate import find_device
from tp_runtime.experts import ParallelExperts
from tp_runtime.kernels import decode_attention_launch, rope_decode_attention, tuned
from tp_runtime.models.adapter import FAMILIES
from tp_runtime.plan import make_plan

H200 = find_device("NVIDIA H200")


@pytest.fixture(autouse=True)
def nothing_of_this_machine(tmp_path, monkeypatch):
    """Tables are read from and written to an empty folder; one thread."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tuned.forget()
    yield
    tuned.forget()
    torch.set_num_threads(num_threads)


# -- shapes -----------------------------------------------------------------------------------------------------------


def test_the_twelve_published_shapes_by_name():
    """Catches a name that stands for another matrix than the one whose cuBLAS time is shown beside it."""
    found = [(s.n, s.k) for s in map(named_shape, SKINNY)]
    assert found == list(PUBLISHED_CUBLAS_US)
    gate_up = named_shape("llama-3-70b gate_up tp8")
    assert (gate_up.n, gate_up.k, gate_up.count) == (7168, 8192, 80)
    assert PUBLISHED_CUBLAS_US[7168, 8192] == {1: 32.0, 16: 33.3, 64: 31.4}


@pytest.mark.parametrize("model", MODELS)
def test_shapes_hold_every_weight_of_a_model_once(model):
    """Catches a role without its weights, weights of two roles, and the wrong number of layers."""
    plan = make_plan(MODELS[model], 1)
    shapes = model_shapes(model, 1)
    assert [named_shape(s.name).n for s in shapes] == [s.n for s in shapes]
    held = sum(s.num_weights for s in shapes)
    norms_and_router = ("norm.weight", "mlp.gate.weight")
    matrices = [p for p in plan.parameters if not p.name.endswith(norms_and_router)]
    is_tied = any(p.name == "lm_head.weight" for p in matrices)
    assert held == sum(
        p.count * torch.Size(p.shape).numel() for p in matrices if not (is_tied and p.style == "embedding_rowwise")
    )


def test_uneven_cuts_are_named_by_their_first_rank():
    """Catches ranks that would be tuned for the shape of rank 0, and two shapes of one name."""
    found = {s.name: (s.n, s.k) for s in model_shapes("llama-3-8b", 5) if s.role in ("qkv", "down")}
    assert found == {
        "llama-3-8b qkv tp5": (1408, 4096), "llama-3-8b qkv tp5 rank 1": (1664, 4096),
        "llama-3-8b qkv tp5 rank 2": (1280, 4096),
        "llama-3-8b down tp5": (4096, 2872), "llama-3-8b down tp5 rank 2": (4096, 2864),
    }  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_those_that_the_layers_multiply_with(family):
    """Catches roles that drift from what is patched in, and a family's names that are none: shapes never measured."""
    for rank in (0, 2):
        model = tiny(family, (9, 3))
        plan = make_plan(model.config, 3)
        tp_runtime.patch(model, NullCommunicator(rank, 3), plan)
        held = set()
        for module in model.modules():
            if isinstance(module, layers.ColumnParallelLinear | layers.RowParallelLinear | layers.ParallelLMHead):
                held.add(tuple(module.weight.shape))
            if isinstance(module, ParallelExperts):
                order = -1 if module.is_transposed else 1
                held |= {tuple(p.shape[1:])[::order] for p in module.parameters()}
        assert len(held) >= 4 and held <= {(s.n, s.k) for s in kernel_shapes.kernel_shapes(family, plan)}


@pytest.mark.parametrize("name", ["", "llama-3-8b", "llama-3-8b o tp", "gpt-5 o tp1", "llama-3-8b O tp1"])
def test_unknown_shape_says_what_there_is(name):
    """Catches a KeyError in place of the names to choose from."""
    with pytest.raises(ValueError, match="no kernel shape is called .* there are .*llama-3-8b"):
        kernel_shapes.shape(name)


# -- the timer --------------------------------------------------------------------------------------------------------


def test_contenders_take_turns_and_copies_too(monkeypatch):
    """Catches a contender that is measured alone, that always follows the same other, or that rereads one copy."""
    calls, now = [], itertools.count(step=8000)
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: next(now))
    contenders = {name: lambda i, name=name: calls.append((name, i)) for name in "ab"}
    times = timing.time_us(contenders, num_copies=2, repeats=3, device="cpu")
    assert times == {"a": [4.0] * 3, "b": [4.0] * 3}  # 8 us, two calls
    assert "".join(name + str(i) for name, i in calls) == "a0b0" + "a0a1b0b1" + "b0b1a0a1" + "a0a1b0b1"


def test_copies_exceed_l2_twice(monkeypatch):
    """Catches weights that stay in the cache: a small matrix needs more than eight copies."""
    properties = SimpleNamespace(L2_cache_size=60 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    counts = [timing.num_copies(mib << 20, "cuda") for mib in (112, 16, 15, 4)]
    assert counts == [8, 8, 8, 30]
    assert timing.num_copies(1, "cuda") == timing.MAX_COPIES and timing.num_copies(4 << 20, "cpu") == 8


def test_copies_differ_and_are_no_zeros():
    """Catches weights that a GPU multiplies faster than real ones."""
    ws = timing.copies(16, 64, like=torch.empty(0, dtype=torch.float16))
    assert (ws.shape, ws.dtype) == ((8, 16, 64), torch.float16)
    assert 0.1 < ws.std() * 8 < 10 and not torch.equal(ws[0], ws[1])


# -- the choice -------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    block: int
    us: float = 1.0


def exact(x, w):
    return F.linear(x, w)


KERNELS = {
    "exact": exact,
    "wrong": lambda x, w: F.linear(x, w) * 1.01,
    "wrong where few": lambda x, w: F.linear(x, w) * (1 if len(x) == 4 else 2),
    "holes": lambda x, w: F.linear(x, w).fill_(float("nan")),
    "racy": lambda x, w: F.linear(x, w) + 1e-3 * torch.rand(w.shape[0], dtype=w.dtype),
    "wide": lambda x, w: F.linear(x, w).float(),
    "broken": lambda x, w: 1 / 0,
}


@dataclass(frozen=True)
class FakeOp(Op):
    """`gemm` with kernels of this file: those named, each taking as long as its configuration says."""

    offered: tuple = ()

    def candidates(self, m, n, k, dtype):
        return self.offered

    def torchs(self, x, w):
        return exact(x, w)

    def ours(self, x, w, kernel: str, config: Any):
        return KERNELS[kernel](x, w)


def task(*offered, m: int = 4) -> Task:
    op = FakeOp("gemm", ("o",), offered=offered)
    return Task(op, KernelShape("tiny", "o", 1, 40, 64), m, torch.float16)


class Clock:
    """A timer: torch takes 10 us, each candidate what its label says; keeps who was measured, and how often."""

    def __init__(self, noise: float = 0.0):
        self.runs, self.noise = [], noise

    def __call__(self, contenders, num_copies, repeats, device):
        self.runs.append((list(contenders), repeats))
        assert num_copies == 8 and all(call(num_copies - 1) is not None for call in contenders.values())
        us = {name: 10.0 if name == "torch" else float(name.split("us=")[1].rstrip(")")) for name in contenders}
        return {name: [t + self.noise * (i % 2) for i in range(repeats)] for name, t in us.items()}


def test_the_fastest_of_the_right_ones_is_chosen():
    """Catches a wrong kernel that wins because it is fast, and a row that does not say what was measured."""
    clock = Clock()
    offered = [("exact", Tile(64, 9.0)), ("exact", Tile(32, 7.0)), ("wrong", Tile(16, 1.0)), ("exact", Tile(128, 8.0))]
    row = measure(task(*offered), "cpu", clock)
    assert row == {
        "op": "gemm", "dtype": "float16", "n": 40, "k": 64, "m": 4, "kernel": "exact", "block": 32, "us": 7.0,
        "torch_us": 10.0, "triton": tuned.triton_minor(), "torch": torch.__version__,
    }  # fmt: skip


def test_only_the_fastest_few_are_measured_again():
    """Catches half an hour of a GPU spent on candidates that have lost."""
    clock = Clock()
    measure(task(*(("exact", Tile(i, us=20.0 - i)) for i in range(8))), "cpu", clock)
    (first, few), (second, many) = clock.runs
    assert (len(first), few, many) == (9, SCREEN_REPEATS, timing.REPEATS)
    assert [name.split(",")[0] for name in second] == ["exact(block=5", "exact(block=6", "exact(block=7", "torch"]


def test_torch_is_chosen_where_it_is_faster():
    """Catches a kernel that runs though it loses; its time stays in the row."""
    row = measure(task(("exact", Tile(64, 10.5))), "cpu", Clock())
    assert (row["kernel"], row["us"], row["torch_us"]) == ("torch", 10.5, 10.0) and "block" not in row


def test_a_tie_is_torchs():
    """Catches a choice by chance: a kernel that is faster in half of the repeats is not faster."""

    def wavering(contenders, num_copies, repeats, device):
        ours = [9.0 if i % 2 else 10.5 for i in range(repeats)]
        return {name: [10.0] * repeats if name == "torch" else ours for name in contenders}

    assert measure(task(("exact", Tile(64))), "cpu", wavering)["kernel"] == "torch"


@pytest.mark.parametrize(
    "kernel, why",
    [
        ("wrong", r"max and RMS error are \S+ and \S+ times torch's"), ("wrong where few", r"torch's \(M=3\)"),
        ("holes", "hold a NaN"), ("racy", "two runs differ"), ("wide", "float32 in place of"),
        ("broken", "ZeroDivisionError: division by zero"),
    ],
)  # fmt: skip
def test_wrong_candidate_is_left_out_and_told(kernel, why, caplog):
    """Catches a kernel that gets into a table though it is wrong, and one failure that ends the whole run."""
    row = measure(task((kernel, Tile(64)), ("exact", Tile(32, us=5.0))), "cpu", Clock())
    assert (row["kernel"], row["block"]) == ("exact", 32)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"gemm tiny o tp1, M=4: {kernel}(block=64, us=1.0) is left out: ")
    assert re.search(why, record.getMessage())


def test_nothing_right_leaves_torch():
    """Catches a division by a time that does not exist."""
    row = measure(task(("wrong", Tile(64))), "cpu", Clock())
    assert (row["kernel"], row["us"], row["torch_us"]) == ("torch", None, 10.0)


class Interpreted(Op):
    """An op with the kernels that ship, in Triton's interpreter: one configuration of each."""

    @property
    def kernels(self):
        return interpreted(self.name)

    def candidates(self, m, n, k, dtype):
        found = super().candidates(m, n, k, dtype)
        return list({kernel: (kernel, config) for kernel, config in found}.values())


@pytest.mark.parametrize("m", [1, 64])
@pytest.mark.parametrize("name", OPS)
def test_kernels_that_ship_get_through_the_choice(name, m, monkeypatch):
    """Catches kernels and choice that do not fit together; and an `ours` that quietly runs torch."""
    op = Interpreted(**vars(OPS[name]))
    ran = []
    run = op.kernels.run
    monkeypatch.setattr(op.kernels, "run", lambda *args, **chosen: ran.append(chosen["kernel"]) or run(*args, **chosen))
    shape = KernelShape("tiny", op.roles[0], 1, op.stacked * 48, 40)
    times = {"torch": 10.0, "vector": 5.0, "decode": 6.0, "prefill": 7.0}

    def timer(contenders, num_copies, repeats, device):
        return {name: [times[name.split("(")[0]]] * repeats for name in contenders}

    row = measure(Task(op, shape, m, torch.float16), "cpu", timer)
    assert set(ran) == ({"vector", "decode"} if m == 1 else {"decode", "prefill"})
    assert row["kernel"] == {1: "vector", 64: "decode"}[m] and (row["n"], row["k"]) == (48, 40)
    assert tuned.config_of(row, op.kernels.CANDIDATES) in [config for _, config in op.candidates(m, 48, 40, None)]


class InterpretedExperts(Interpreted, ExpertsOp):
    """Experts on the CPU: torch's grouped GEMM is not there, and cannot be recorded on every GPU either."""

    @property
    def kernels(self):
        return interpreted("grouped_gemm")

    def torchs(self, x, w):
        return w.call(self.kernels.experts_ref, x)

    def has_torch(self, x, w):
        return False


def test_experts_get_through_the_choice():
    """Catches experts whose row is not the one that their layer looks up, and a row that needs torch's time."""
    op = InterpretedExperts("experts", ("experts_gate_up",), stacked=2)
    shape = KernelShape("tiny", "experts_gate_up", 1, 2 * 24, 32, num_experts=3, top_k=2)
    (task,) = tune.tasks([shape], [op], ms=[8], dtype="float16")

    def timer(contenders, num_copies, repeats, device):
        return {name: [call(num_copies - 1).shape[0]] * repeats for name, call in contenders.items()}

    row = measure(task, "cpu", timer)
    assert row["kernel"] in ("decode", "prefill") and (row["us"], row["torch_us"]) == (8, None)
    assert task.key == (interpreted("grouped_gemm").op_name(3, 2), "float16", 24, 32, 8)
    assert tune.result(task, row, H200)[5] == "waits for the device"


def test_top_k_gets_through_the_choice():
    """Catches a row of top-k that is not the one that sampling looks up, and one that is taken for another k."""
    shape = KernelShape("tiny", "top_k", 1, 300, 5)
    (task,) = tune.tasks([shape], [TopKOp("vocab_top_k", ("top_k",))], ms=[2], dtype="float16")
    x, (k,) = task.op.operands(*task.size, task.dtype, "cpu")
    run = interpreted("vocab_top_k_kernel").run
    assert all(torch.equal(run(x, k, config=c)[0], task.op.exact(x, k).float()) for _, c in task.candidates().values())
    assert torch.equal(task.op.torchs(x, k), task.op.exact(x, k).float()) and task.limit_us(H200) > 0
    assert task.key == ("vocab_top_k", "float16", 300, 5, 2)


class InterpretedAttention(AttentionOp):
    @property
    def kernels(self):
        return interpreted("rope_decode_attention")

    def candidates(self, m, n, k, dtype):
        return super().candidates(m, n, k, dtype)[-1:]


def test_attention_gets_through_the_choice():
    """Catches attention whose row is not the one that a decode step looks up, and caches that are not its size."""
    torch.manual_seed(0)
    shape = KernelShape("tiny", "attention", 1, 64, 16, num_heads=8, num_kv_heads=4)
    (task,) = tune.tasks([shape], [InterpretedAttention("attention", ("attention",))], ms=[8], dtype="float16")

    def timer(contenders, num_copies, repeats, device):
        assert all(call(num_copies - 1).shape == (8, 1, 8 * 16) for call in contenders.values())
        return {name: [10.0 if name == "torch" else 5.0] * repeats for name in contenders}

    row = measure(task, "cpu", timer)
    assert row["kernel"] == "split" and task.limit_us(H200) > 0
    tuned.save_rows(tuned.user_file("cpu"), "cpu", [row])
    tuned.forget()
    q, keys = torch.empty(8, 8, 1, 16, dtype=torch.float16), torch.empty(8, 4, 60, 16, dtype=torch.float16)
    assert rope_decode_attention._chosen(q, keys) == decode_attention_launch.CANDIDATES["split"][-1]
    assert rope_decode_attention._chosen(q[:1], keys[:1]) is None
    tuned.forget()


def test_limit_of_experts():
    """Catches all experts counted as read for one token: PERFORMANCE.md's 147 us, two of Mixtral's eight."""
    (task,) = tune.tasks(model_shapes("mixtral-8x7b", 1), [kernel_ops.TUNABLE["experts"]], ms=[1])
    assert task.key[:4] == ("experts_8_2", "bfloat16", 14336, 4096)
    assert task.limit_us(H200) == pytest.approx(147, rel=5e-3)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_gemm(monkeypatch):
    """bench.tune knows one op, whose kernels are of this file."""
    op = FakeOp("gemm", ("qkv", "o", "down", "lm_head"), offered=(("exact", Tile(64, 9.0)), ("wrong", Tile(1, 1.0))))
    monkeypatch.setitem(kernel_ops.TUNABLE, "gemm", op)
    return op


def run(*flags: str, clock=None) -> int:
    return tune.main([*flags, "--op", "gemm", "--dtype", "float16"], clock or Clock(), "cpu")


@pytest.mark.parametrize("ship", [False, True])
def test_command_writes_what_a_lookup_finds(fake_gemm, capsys, ship):
    """Catches a table at another place, or under another key, than where the kernels look."""
    assert run("--shape", "40x64", "72x64", "--m", "1,3", *(["--ship"] if ship else [])) == 0
    file = tuned.shipped_file("cpu") if ship else tuned.user_file("cpu")
    assert len(tuned.read_rows(file, "cpu")) == 4
    row = tuned.lookup("gemm", torch.empty(1, 64, dtype=torch.float16), 40, 64, 4, {"exact": (Tile(32), Tile(64, 9.0))})
    assert (row["kernel"], row["block"], row["us"], row["torch_us"]) == ("exact", 64, 9.0, 10.0)
    out, err = capsys.readouterr()
    head, _, *lines = out.splitlines()
    assert len(lines) == 4 and "of the limit" in head
    assert [cell.strip() for cell in lines[0].split("|")[1:9]] == [
        "gemm", "72x64 qkv tp1", "72x64", "1", "9.0", "10.0", "1.11x", "exact"
    ]  # fmt: skip
    assert f"4 of 4 rows are in {file}" in err


def test_command_goes_on_where_it_was(fake_gemm, capsys):
    """Catches rows that are measured twice, or that --again leaves as they were, or that are missing from the table."""
    run("--shape", "40x64", "--m", "1,2")
    clock = Clock()
    assert run("--shape", "40x64", "--m", "1,2,4", clock=clock) == 0
    assert len(clock.runs) == 2  # one row: all, then the finalists
    assert capsys.readouterr().out.count("40x64 qkv") == 2 + 3
    again = Clock()
    assert run("--shape", "40x64", "--m", "1,2,4", "--again", clock=again) == 0
    assert len(again.runs) == 6


def test_rows_of_another_triton_are_measured_again(fake_gemm):
    """Catches a resumed run that takes another compiler's times for its own."""
    run("--shape", "40x64", "--m", "1")
    file = tuned.user_file("cpu")
    (row,) = tuned.read_rows(file, "cpu")
    file.unlink()
    tuned.save_rows(file, "cpu", [{**row, "triton": "3.0"}])
    clock = Clock()
    run("--shape", "40x64", "--m", "1", clock=clock)
    assert len(clock.runs) == 2 and len(tuned.read_rows(file, "cpu")) == 2


def test_budget_ends_with_the_most_valuable_rows_done(fake_gemm, capsys):
    """Catches a lease that runs out in the middle of a row, or that went into the rows that matter least."""
    seconds = itertools.count(step=10)
    flags = ["--shape", "40x64", "72x64", "--m", "2,1", "--op", "gemm", "--dtype", "float16", "--budget-s", "25"]
    assert tune.main(flags, Clock(), "cpu", lambda: next(seconds)) == 0
    rows = tuned.read_rows(tuned.user_file("cpu"), "cpu")
    assert [(r["m"], r["n"]) for r in rows] == [(1, 40), (1, 72)]
    assert "2 of 4 rows" in capsys.readouterr().err


def test_order_is_that_of_value():
    """Catches prompts before decode steps, small weights before large ones, and lm_head at lengths of prompts."""
    todo = tune.tasks(model_shapes("llama-3-8b", 2))
    assert [(t.m, t.shape.role) for t in todo[:6]] == [
        (1, "gate_up"), (1, "down"), (1, "qkv"), (1, "o"), (1, "lm_head"), (16, "gate_up")
    ]  # fmt: skip
    assert max(t.m for t in todo if t.shape.role == "lm_head") == 256
    assert len({t.key for t in todo}) == len(todo) == 4 * 14 + 9
    assert {t.op.name for t in todo if t.shape.role == "gate_up"} == {"gated_gemm"}
    gated = next(t for t in todo if t.op.name == "gated_gemm")
    assert gated.key[2:4] == (7168, 4096) and gated.shape.n == 2 * 7168


def test_equal_shapes_are_measured_once():
    """Catches a lease spent on what two models, or two numbers of ranks, have in common."""
    shapes = [*model_shapes("llama-3-8b", 1), *model_shapes("mixtral-8x7b", 1)]
    keys = [t.key for t in tune.tasks(shapes, ms=[1])]
    assert len(keys) == len(set(keys)) and keys.count(("gemm", "bfloat16", 6144, 4096, 1)) == 1


def test_every_op_on_any_role():
    """Catches a benchmark of gate_up as a plain GEMM that finds no row."""
    todo = tune.tasks([named_shape("llama-3-70b gate_up tp8")], ms=[1], any_role=True)
    assert [t.key[:4] for t in todo] == [("gemm", "bfloat16", 7168, 8192), ("gated_gemm", "bfloat16", 3584, 8192)]


def test_limit_of_a_known_shape():
    """Catches bytes or operations that are left out: PERFORMANCE.md's 24.5 us, which are those of the weights alone."""
    (task,) = tune.tasks([named_shape("llama-3-70b down tp4")], ms=[1])
    assert task.limit_us(H200) == pytest.approx(24.5, rel=2e-3)
    (prompt,) = tune.tasks([named_shape("llama-3-70b down tp4")], ms=[8192])
    assert prompt.limit_us(H200) == pytest.approx(2 * 8192**2 * 7168 / 989e6, rel=1e-6)


def test_dry_run_needs_no_gpu(capsys):
    """Catches a list that only a machine with a GPU can make; one candidate at least for every row."""
    flags = ["--model", "llama-3-8b", "qwen3-30b-a3b", "--tp", "1", "8", "--m", "1,2048", "--dry-run"]
    assert tune.main(flags) == 0
    _, _, *lines, total = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert all(int(row[4]) > 0 and float(row[5]) > 0 for row in cells)
    assert re.fullmatch(rf"{len(lines)} rows, \d+ s \(\d+ min\) as estimated for .*H200", total)
    assert not tuned.user_file("cpu").exists()


@pytest.mark.parametrize(
    "flags, why",
    [
        (["--model", "llama-3-8b"], "no GPU here"), (["--dry-run"], "--model or --shape"),
        (["--shape", "8x8", "--op", "experts", "--dry-run"], "experts_8_2"),
        (["--model", "no/where/here", "--dry-run"], "no/where/here"),
        (["--model", "llama-3-8b", "--tp", "33", "--dry-run"], "tp_size=33 exceeds 32 query heads"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line(flags, why, capsys, monkeypatch):
    """Catches a traceback, and an exit code 0 of a run that measured nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bench.tune: ") and why in line


@pytest.mark.parametrize("flags", [["--m", "0"], ["--m", "1,,2"], ["--op", "gem"], ["--shape", "7x"], ["--tp", "a"]])
def test_usage_errors(flags, capsys):
    """Catches a misspelt flag that is taken for something else."""
    with pytest.raises(SystemExit) as stop:
        tune.main([*flags, "--dry-run"])
    assert stop.value.code == 2 and flags[1] in capsys.readouterr().err


def test_table_that_is_none_stops_before_anything_is_measured(fake_gemm, capsys):
    """Catches an hour of measurements that cannot be written down."""
    file = tuned.user_file("cpu")
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    clock = Clock()
    assert run("--shape", "40x64", clock=clock) == 2
    assert clock.runs == [] and f"{file}: it is not a table" in capsys.readouterr().err


def test_too_little_memory_leaves_one_row_out(fake_gemm, capsys, caplog):
    """Catches a large lm_head that ends the run of all other shapes."""

    class Full(Clock):
        def __call__(self, contenders, num_copies, repeats, device):
            if not self.runs:
                self.runs.append(None)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
            return super().__call__(contenders, num_copies, repeats, device)

    assert run("--shape", "40x64", "--m", "1,16", clock=Full()) == 0
    assert "1 of 2 rows" in capsys.readouterr().err
    assert any("is left out: CUDA out of memory" in record.getMessage() for record in caplog.records)


def test_interrupted_run_keeps_its_rows(fake_gemm, capsys):
    """Catches Ctrl-C that throws away what was measured, or ends in a traceback."""

    class Interrupted(Clock):
        def __call__(self, *args):
            if len(self.runs) == 2:
                raise KeyboardInterrupt
            return super().__call__(*args)

    assert run("--shape", "40x64", "--m", "1,16", clock=Interrupted()) == 130
    assert [row["m"] for row in tuned.read_rows(tuned.user_file("cpu"), "cpu")] == [1]

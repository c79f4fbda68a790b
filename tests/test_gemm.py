"""kernels/gemm.py and the kernels that it launches: interpreted, compiled, and on a GPU where there is one."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from exactness import assert_as_exact_as, shuffles
from gemm_tiles import TILES, Decode, Prefill, Vector
from interpreted import interpreted

from bench.compiled import CHIPS, recording
from tp_runtime.kernels import gemm as compiled_gemm
from tp_runtime.kernels.gemm import ACTIVATIONS, gemm

interpreted_gemm = interpreted("gemm")
configs = interpreted("gemm_configs")
launching = interpreted("gemm_launch")
target = interpreted("target")


def operands(m, n, k, dtype=torch.float16, device="cpu"):
    """x, w, bias, residual."""
    torch.manual_seed(m + n + k)
    return [torch.randn(*shape).to(device, dtype) for shape in ((m, k), (n, k), (n,), (m, n))]


def exact(x, w, bias=None, residual=None, activation=None):
    y = x.double() @ w.double().T
    if bias is not None:
        y = y + bias.double()
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    return y if residual is None else y + residual.double()


@pytest.mark.halved
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tile", TILES)
def test_every_kernel_is_as_exact_as_torch(tile, dtype):
    """Catches a wrong mask, stride, split or rounding, and stores outside the block of columns that is `out`."""
    kernel, config, m, n, k = TILES[tile]
    x, w, bias, residual = operands(m, n, k, dtype)
    wide = torch.full((m, 3 * n), float("nan"), dtype=dtype)
    out = wide[:, n : 2 * n]
    y = interpreted_gemm.run(x, w, bias, residual, out=out, kernel=kernel, config=config, num_sms=2)
    assert y is out
    orders = shuffles(k, dtype)
    torchs = (F.linear(x[:, order], w[:, order], bias) + residual for order in orders)
    assert_as_exact_as(y, torchs, exact(x, w, bias, residual))
    assert wide[:, :n].isnan().all() and wide[:, 2 * n :].isnan().all()

    y = interpreted_gemm.run(x, w, kernel=kernel, config=config)
    assert_as_exact_as(y, (F.linear(x[:, order], w[:, order]) for order in orders), exact(x, w))


@pytest.mark.parametrize("tile, activation", [*zip(TILES, itertools.cycle(ACTIVATIONS))])
def test_an_activation_comes_between_bias_and_residual(tile, activation):
    """Catches an activation of a part of the sum over K, one without the bias or with the residual, and another one."""
    kernel, config, m, n, k = TILES[tile]
    x, w, bias, residual = operands(m, n, k)
    w = w / k**0.5  # sums of about 1, for which an activation is neither 0 nor the identity
    torchs = ACTIVATIONS[activation](F.linear(x, w, bias)) + residual
    y = interpreted_gemm.run(x, w, bias, residual, activation, kernel=kernel, config=config)
    assert_as_exact_as(y, torchs, exact(x, w, bias, residual, activation))


@pytest.mark.parametrize("tile", TILES)
def test_operands_may_lie_in_wider_tensors(tile):
    """Catches a row stride taken for the number of columns, and a bias read as if it were contiguous."""
    kernel, config, m, n, k = TILES[tile]
    x, w, bias, residual = (torch.stack([t, t * 0 + 9], -1).transpose(-1, -2) for t in operands(m, n, k))
    x, w, residual = (t.reshape(len(t), -1)[:, : t.shape[-1]] for t in (x, w, residual))
    bias = bias.T.contiguous().T[0]
    assert [t.stride(0) for t in (x, w, bias, residual)] == [2 * k, 2 * k, 2, 2 * n]
    y = interpreted_gemm.run(x, w, bias, residual, kernel=kernel, config=config)
    assert_as_exact_as(y, F.linear(x, w, bias) + residual, exact(x, w, bias, residual))
    if m > 1:
        y = interpreted_gemm.run(x[:, None], w, kernel=kernel, config=config)
        assert_as_exact_as(y, F.linear(x[:, None], w), exact(x, w)[:, None])


def test_split_k_leaves_its_counters_at_zero():
    """Catches a second launch whose first program takes itself for the last to arrive."""
    kernel, config, m, n, k = TILES["decode, one step a program"]
    x, w, *_ = operands(m, n, k)
    runs = [interpreted_gemm.run(x, w, kernel=kernel, config=config) for _ in range(3)]
    assert launching.split_k(n, k, config, target.num_sms(x.device)) == 3
    assert not target.arrival_counters(x.device).any()
    assert all(run.equal(runs[0]) for run in runs)


def test_split_k_fills_the_multiprocessors_and_no_more():
    """Catches programs that wait for a second wave, and splits without a step."""
    for n in (70, 1024, 4096, 6144, 28672, 128256):
        for k in (45, 1024, 8192):
            for per_sm in (0, 1, 3):
                config = Decode(64, 128, per_sm, 4, 5)
                splits, tiles, steps = launching.split_k(n, k, config, 132), -(-n // 64), -(-k // 128)
                assert 1 <= splits <= max(1, min(16, steps))
                assert splits == 1 or splits * tiles <= 132 * per_sm
                assert splits in (16, steps) or (splits + 1) * tiles > 132 * per_sm


class Grids:
    """Stands in for a kernel and notes its grids."""

    def __init__(self):
        self.seen = []

    def __getitem__(self, grid):
        self.seen.append(grid)
        return lambda *args, **kwargs: None


def test_num_sms_limits_the_persistent_grid(monkeypatch):
    """Catches communication that finds no multiprocessor, and programs without a tile."""
    grids = Grids()
    monkeypatch.setattr(launching, "_prefill_kernel", grids)
    x, w, *_ = operands(64, 64, 64)
    for num_sms in (1, 3, 5, None):  # the interpreter has 3
        interpreted_gemm.run(x, w, kernel="prefill", config=Prefill(32, 32, 16, 8, 4, 2), num_sms=num_sms)
    assert grids.seen == [(1,), (3,), (4,), (3,)]
    with target.leaving_sms(2):
        interpreted_gemm.run(x, w, kernel="prefill", config=Prefill(32, 32, 16, 8, 4, 2))
        with target.leaving_sms(9):
            interpreted_gemm.run(x, w, kernel="prefill", config=Prefill(32, 32, 16, 8, 4, 2))
    interpreted_gemm.run(x, w, kernel="prefill", config=Prefill(32, 32, 16, 8, 4, 2))
    assert grids.seen[4:] == [(1,), (1,), (3,)]


def test_a_split_of_k_leaves_no_multiprocessors(monkeypatch):
    """Catches bits that depend on what runs beside a GEMM."""
    grids = Grids()
    monkeypatch.setattr(launching, "_decode_kernel", grids)
    x, w, *_ = operands(4, 32, 256)
    with target.leaving_sms(2):
        interpreted_gemm.run(x, w, kernel="decode", config=Decode(32, 16, 1, 4, 2))
    assert grids.seen == [(1, 3)]


@pytest.mark.parametrize("shape", [(0, 6, 8), (4, 0, 8), (4, 6, 0)], ids=str)
def test_nothing_to_compute(shape):
    """Catches a launch of no program, or without a step over K that would leave y unwritten."""
    x, w, bias, residual = operands(*shape)
    for run in (gemm, compiled_gemm._gemm_cuda):
        y = torch.zeros(shape[0], shape[1]).half() + bias
        assert run(x, w, bias, residual).equal(y + residual)
        assert run(x, w, bias, residual, "gelu").equal(F.gelu(y) + residual)


BAD = {
    "K": ({"w": torch.ones(6, 9)}, r"x is not \[4, 9\]: x \[4, 8\], w \[6, 9\]"),
    "rank of w": ({"w": torch.ones(6)}, r"w is \[6\]"),
    "a single bias": ({"bias": torch.ones(1)}, r"bias is not \[6\]: .*bias \[1\]"),
    "residual of one row": ({"residual": torch.ones(1, 6)}, r"residual is not \[4, 6\]"),
    "out of three dimensions": ({"out": torch.ones(1, 4, 6)}, r"out is not \[4, 6\]"),
    "activation": ({"activation": "relu"}, "activation 'relu' is none of silu, gelu, gelu_tanh"),
    "dtype": ({"w": torch.ones(6, 8).half()}, r"w is torch.float16 on cpu, but x torch.float32"),
    "device": ({"residual": torch.ones(4, 6, device="meta")}, r"residual is torch.float32 on meta"),
    "num_sms": ({"num_sms": 0}, r"num_sms=0"),
}


@pytest.mark.parametrize("case", BAD)
def test_operands_that_do_not_fit(case):
    """Catches a kernel that reads past its operands, or a result that was broadcast."""
    bad, message = BAD[case]
    arguments = {"x": torch.ones(4, 8), "w": torch.ones(6, 8), **bad}
    with pytest.raises(ValueError, match=message):
        compiled_gemm._gemm_cuda(**arguments)
    with pytest.raises(ValueError, match=message):
        compiled_gemm.run(**arguments, kernel="torch")
    if case not in ("a single bias", "num_sms"):  # torch's own broadcast, and what only a GPU has
        with pytest.raises((ValueError, RuntimeError)):
            gemm(**arguments)


def test_rows_that_a_kernel_cannot_read():
    """Catches strides that a kernel would ignore, or multiply past 32 bits."""
    x, w, *_ = operands(6, 72, 48)
    config = Decode(32, 32, 0, 4, 2)
    for kernel, bad_x in (
        ("decode", x.T.contiguous().T),
        ("decode", x.view(2, 3, 48).transpose(0, 1)),
        ("decode", torch.empty(2**24 + 48, dtype=torch.float16).as_strided((2, 48), (2**24, 1))),
    ):
        with pytest.raises(ValueError, match="no matrix of contiguous rows"):
            interpreted_gemm.run(bad_x, w, kernel=kernel, config=config)
    with pytest.raises(ValueError, match="one row of x, not 6"):
        interpreted_gemm.run(x, w, kernel="vector", config=Vector(8, 32, 4, 2))
    with pytest.raises(ValueError, match="at most 128 rows of x, not 129"):
        interpreted_gemm.run(x[:1].expand(129, 48).contiguous(), w, kernel="decode", config=config)
    narrow, odd = (x[:, :45].contiguous(), w[:, :45].contiguous()), torch.zeros(6, 73, dtype=torch.float16)[:, :72]
    for operands_of_prefill in (narrow, (x, w, None, odd), (x, w, None, None, None, odd)):
        with pytest.raises(ValueError, match="multiples of 16 bytes"):
            interpreted_gemm.run(*operands_of_prefill, kernel="prefill", config=Prefill(*[16] * 6))


def test_exact_gelu_takes_neither_a_flattened_loop_nor_specialised_warps():
    """Catches a spill, and what is lost where there would be none."""
    plain = Prefill(128, 256, 64, 8, 8, 3)
    flat, special = plain._replace(flatten=True), plain._replace(num_warps=4, specialize=True)
    assert [launching.launched(config, "gelu") for config in (plain, flat, special)] == [plain] * 3
    for config, activation in ((special, None), (flat, "gelu_tanh"), (special, "silu"), (Vector(8, 32, 4, 2), "gelu")):
        assert launching.launched(config, activation) == config


@pytest.mark.parametrize("version, columns", [((3, 6), 256), ((3, 7), 64)], ids=str)
def test_specialised_tiles_are_stored_in_parts_where_triton_cuts_them(version, columns, monkeypatch):
    """Catches a kernel that does not compile, and a tile stored whole for which there are no registers."""
    monkeypatch.setattr(launching, "TRITON", version)
    assert launching.store_n(Prefill(128, 256, 64, 8, 4, 3, specialize=True)) == columns
    assert launching.store_n(Prefill(128, 256, 64, 8, 8, 3)) == 64
    assert launching.store_n(Prefill(64, 32, 64, 8, 4, 3)) == 32


def test_long_prompts_have_rows():
    """Catches the limit of a row's stride taken for one of the whole tensor: every long prompt would go to torch."""
    for shape in ((1, 8192, 4096), (8, 8192, 4096), (2**20, 4096), (4, 1, 4096), (4096,)):
        assert configs.has_rows(torch.empty(shape, device="meta"))
    wide = torch.empty(2, 8192, 8192, device="meta")
    assert configs.has_rows(wide[..., 4096:]) and configs.has_rows(wide[:, :512].clone()[:, -1:])
    assert not configs.has_rows(wide[:, :4096]) and not configs.has_rows(wide[:, -1:])


def tuned_to(monkeypatch, kernel, config):
    """Every shape was measured, and this won."""
    row = {"kernel": kernel, "config": config}
    monkeypatch.setattr(configs, "lookup", lambda *_: row)


def test_the_choice_is_what_was_measured(monkeypatch):
    """Catches a call that ignores the table, or its activation, and one that launches what cannot read its operands."""
    x, w, bias, residual = operands(6, 72, 48)
    cases = {
        "x @ w": (x, w, residual),
        "K = 45": (x[:, :45], w[:, :45].contiguous(), None),
        "columns": (x.T.contiguous().T, w, None),
        "float32": (x.float(), w.float(), None),
        "gradients": (x.clone().requires_grad_(), w, None),
        "residual at 146 bytes": (x, w, F.pad(residual, (0, 1))[:, :72]),
    }
    launched, launch = [], launching.launch
    monkeypatch.setattr(launching, "launch", lambda *a: launched.append(case) or launch(*a))
    for kernel, config in (
        ("torch", None),
        ("decode", Decode(32, 32, 2, 4, 2)),
        ("prefill", Prefill(16, 16, 16, 8, 4, 2)),
    ):
        tuned_to(monkeypatch, kernel, config)
        for name, (a, b, added) in cases.items():
            case, given = (kernel, name), (a, b, bias.to(a.dtype), added, "silu")
            y = interpreted_gemm._gemm_cuda(*given)
            assert_as_exact_as(y, interpreted_gemm.gemm_ref(*given), exact(*given))
    of_decode = ("x @ w", "K = 45", "residual at 146 bytes")
    assert launched == [*(("decode", name) for name in of_decode), ("prefill", "x @ w")]


def test_no_table_means_torch(monkeypatch):
    """Catches a kernel that nobody has measured running in place of cuBLAS."""
    monkeypatch.setattr(configs, "lookup", lambda *_: None)
    x, w, *_ = operands(6, 72, 48)
    assert configs.chosen("gemm", interpreted_gemm.CANDIDATES, 72, x, w) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_the_cpu_it_is_torch(dtype):
    """Catches a result on the CPU that is not written where it was asked for."""
    x, w, bias, residual = operands(6, 70, 45, dtype)
    wide = torch.full((6, 140), float("nan"), dtype=dtype)
    assert gemm(x, w, bias).equal(F.linear(x, w, bias))
    assert gemm(x, w, bias, residual, out=wide[:, 70:], num_sms=3).equal(F.linear(x, w, bias) + residual)
    assert wide[:, :70].isnan().all() and not wide[:, 70:].isnan().any()
    for name, act in ACTIVATIONS.items():
        assert gemm(x, w, bias, activation=name).equal(act(F.linear(x, w, bias)))
        assert gemm(x, w, bias, residual, name).equal(act(F.linear(x, w, bias)) + residual)


def test_op_is_registered_right():
    """Catches a schema, fake or CPU kernel that torch.compile would trip over."""
    x, w, bias, residual = operands(6, 70, 45, torch.float32)
    strided = x.view(2, 3, 45).transpose(0, 1)
    for args in ((x, w), (x, w, bias, residual, "gelu", 3), (strided, w, bias), (x[:0], w)):
        torch.library.opcheck(torch.ops.tp_runtime.gemm.default, args)


def test_compiles_to_one_graph():
    """Catches a graph break, and `out` that a compiled graph does not write."""
    x, w, bias, residual = operands(6, 70, 45, torch.float32)
    out = torch.full((6, 70), float("nan"))

    def layer(x, out):
        return gemm(x, w, bias, activation="gelu_tanh") + gemm(x, w, None, residual, out=out)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    activated = F.gelu(F.linear(x, w, bias), approximate="tanh")
    assert compiled(x, out).equal(activated + (F.linear(x, w) + residual))
    assert out.equal(F.linear(x, w) + residual)


@pytest.mark.parametrize("arch", CHIPS)
def test_candidates_fit_the_shape_and_the_chip(arch):
    """Catches a tuner that measures what cannot win, or has nothing to measure."""
    with recording(arch):
        found = {m: list(compiled_gemm.candidates(m, 4096, 4096, torch.bfloat16)) for m in (1, 16, 64, 512, 4096)}
    names = {m: {kernel for kernel, _ in several} for m, several in found.items()}
    prefill = {"prefill"} if arch >= 90 else set()
    assert names == {1: {"vector", "decode"}, 16: {"decode"}, 64: {"decode"} | prefill, 512: prefill, 4096: prefill}
    assert all(config in compiled_gemm.CANDIDATES[kernel] for several in found.values() for kernel, config in several)


MEMORY = r"\b(LDG|LDGSTS|LD|STG|ST|ATOM|ATOMG|RED|REDG|UTMALDG|UTMASTG|UBLKCP)\b"


@pytest.mark.parametrize("kernel", compiled_gemm.CANDIDATES)
def test_nothing_is_read_or_written_before_the_kernel_before_has_ended(kernel):
    """Catches a load that the compiler moved above the wait for the kernel that writes what it loads."""
    configs = compiled_gemm.CANDIDATES[kernel]
    m = {"vector": 1, "decode": 16, "prefill": 4096}[kernel]
    x, w, bias, residual = (torch.empty(*s, dtype=torch.bfloat16, device="meta") for s in operand_shapes(m))
    with recording(90) as compiled:
        compiled_gemm.run(x, w, bias, residual, kernel=kernel, config=configs[0])
    before, wait, after = compiled[0].sass.partition("ACQBULK")
    assert wait and "PREEXIT" in before
    assert not re.search(MEMORY, before) and re.search(MEMORY, after)
    assert kernel == "prefill" or "CCTL.E.PF2" in before  # w, into L2


def test_specialised_warps_start_after_the_kernel_before_has_ended():
    """Catches groups of warps that do not wait: only the first group executes the wait, and lets the others start."""
    config = next(config for config in compiled_gemm.CANDIDATES["prefill"] if config.specialize)
    x, w, *_ = (torch.empty(*s, dtype=torch.bfloat16, device="meta") for s in operand_shapes(4096))
    with recording(90) as compiled:
        compiled_gemm.run(x, w, kernel="prefill", config=config)
    assert compiled[0].num_warps == 12 and compiled[0].count("setmaxnreg") > 0
    before, wait, _ = compiled[0].ptx.partition("griddepcontrol.wait")
    assert wait and not re.search(r"tensormap\.|cp\.async|(ld|st|atom)\.global|barrier\.sync\s+1\b", before)


def operand_shapes(m, n=4096, k=4096):
    return (m, k), (n, k), (n,), (m, n)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 4096, 4096), (16, 6144, 4096), (33, 70, 45), (64, 8192, 1024), (777, 4096, 7168)], ids=str
)
def test_every_candidate_on_a_gpu(shape, dtype):
    """Catches what only the device shows: races, wrong code, launches that cannot be captured."""
    m, n, k = shape
    x, w, bias, residual = operands(m, n, k, dtype, "cuda")
    w = w / k**0.5
    acts = {None: lambda y: y, **ACTIVATIONS}
    for (kernel, config), activation in zip(compiled_gemm.candidates(m, n, k, dtype), itertools.cycle(acts)):
        if kernel == "prefill" and n % 8:
            continue
        want = exact(x, w, bias, residual, activation)
        torchs = acts[activation](F.linear(x, w, bias)) + residual
        wide = torch.full((m, 2 * n), float("nan"), dtype=dtype, device="cuda")
        beside = {"bias": bias, "residual": residual, "activation": activation}
        arguments = {**beside, "out": wide[:, n:], "kernel": kernel, "config": config}
        first = compiled_gemm.run(x, w, **arguments).clone()
        assert_as_exact_as(first, torchs, want)
        for _ in range(50):
            wide.fill_(float("nan"))
            assert compiled_gemm.run(x, w, **arguments).equal(first), config
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            compiled_gemm.run(x, w, **arguments)
        wide.fill_(float("nan"))
        graph.replay()
        assert wide[:, n:].equal(first), config
        assert wide[:, :n].isnan().all(), config

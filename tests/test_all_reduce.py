"""The all-reduce kernels among real processes: interpreted, over shared memory, whoever is late."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gloo_ranks import run_gloo
from interpreted import interpreted

import tp_runtime
from tp_runtime import peer_memory
from tp_runtime.kernels import all_reduce as compiled
from tp_runtime.kernels.rms_norm import AddNorm
from tp_runtime.peer_memory import PeerKernels

all_reduce, rms_norm = interpreted("all_reduce"), interpreted("rms_norm_kernel")
ROOT = Path(__file__).resolve().parent.parent
HALF_BYTES = 4096
EPS = 1e-5
KINDS = ("one-shot", "two-shot", "rms_norm")


def buffers_of(comm, half_bytes: int = HALF_BYTES) -> list[torch.Tensor]:
    """Shared memory for signals and two halves."""
    return comm.peer_buffers(-(-all_reduce.PROGRAMS * comm.size * 4 // 16) * 16 + 2 * half_bytes)


def sixty_calls(comm):
    return hundreds_of_calls(comm, 60)


def form(draw: random.Random, rows: int, n: int, dtype: torch.dtype) -> AddNorm:
    """A norm as some family has it, h alone, or biases."""
    torch.manual_seed(draw.randrange(1000))
    x_bias, *vectors = (torch.randn(n).to(dtype) for _ in range(4))
    weight, post_weight, bias = vectors
    options = draw.choice(
        [
            {"weight": weight},
            {"weight": weight, "residual_multiplier": 0.22},
            {"weight": weight, "post_weight": post_weight, "unit_offset": True},
            {"weight": None, "post_weight": post_weight},
            {"weight": weight, "bias": bias},
            {"weight": weight, "centered": True},
            None,  # behind the embedding
        ]
    )
    if options is None:
        return AddNorm(weight, EPS, residual_multiplier=8.5, unit_offset=True)
    residual = torch.randn(rows, n).to(dtype)
    return AddNorm(eps=EPS, residual=residual, **options, x_bias=draw.choice([None, x_bias]))


def normed(x: torch.Tensor, then: AddNorm) -> list[torch.Tensor]:
    """What the kernel of `rms_norm` makes of a sum: y and h, or h alone."""
    if then.residual is not None:
        return rms_norm.run(x, *then)
    h = x * then.residual_multiplier
    return [*rms_norm.run(h, *then), h]


def hundreds_of_calls(comm, count: int = 200):
    """Kinds, sizes and dtypes at random, ranks delayed at random; returns what differed from the reference.

    Of a sum that is normed, each rank decides for itself whether in one launch or in two.
    """
    all_reduce.PROGRAMS, all_reduce.BLOCK = 2, 64
    buffers = buffers_of(comm)
    peers = all_reduce.peers_over(buffers, comm.rank)
    comm.barrier()
    late, shared = random.Random(comm.rank), random.Random(0)
    wrong = []
    for call in range(count):
        kind, dtype = shared.choice(KINDS), shared.choice([torch.float32, torch.float16])
        rows, features = shared.choice([(1, 1), (1, 70), (3, 33), (1, 200)])
        torch.manual_seed(call)
        parts = [torch.randn(rows, features).to(dtype) for _ in range(comm.size)]
        then = form(shared, rows, features, dtype)
        if late.random() < 0.05:
            time.sleep(late.random() * 0.01)
        x = parts[comm.rank].clone()
        if kind == "rms_norm":
            if late.random() < 0.5:
                got = all_reduce.all_reduce_rms_norm(x, peers, then)
            else:
                got = normed(all_reduce.all_reduce(x, peers, chunk=features), then)
            want = normed(all_reduce.all_reduce_ref(parts), then)
            ok = torch.equal(got[0], want[0]) and torch.equal(got[-1], want[-1])
        else:
            out = torch.full_like(x, float("nan"))
            all_reduce.all_reduce(x, peers, kind == "two-shot", out)
            ok = torch.equal(out, all_reduce.all_reduce_ref(parts)) and torch.equal(x, parts[comm.rank])
        if not ok:
            wrong.append((call, kind, str(dtype), rows, features))
    comm.barrier()
    return wrong + in_pieces(comm), int(peers.calls.min()), int(peers.calls.max())


def in_pieces(comm) -> list[tuple]:
    """`PeerKernels`: messages for one shot, for two, and for several times the buffers; returns what went wrong."""
    shots = []

    def counted(x, peers, two_shot=False, out=None, chunk=None):
        shots.append((x.numel(), two_shot, chunk))
        return all_reduce.all_reduce(x, peers, two_shot, out, chunk)

    peer_memory.all_reduce, peer_memory.peers_over = counted, all_reduce.peers_over
    PeerKernels._TWO_SHOT_BYTES = 512
    kernels, wrong = PeerKernels(buffers_of(comm, 1024), comm.rank), []
    comm.barrier()
    of_600 = [(256, True, None), (256, True, None), (88, False, None)]
    want = {70: [(70, False, 35)], 200: [(200, True, None)], 600: of_600}
    for count in want:
        x = (torch.arange(count) + comm.rank).float().view(2, -1)
        total = comm.size * torch.arange(count).view(2, -1) + sum(range(comm.size))
        if not torch.equal(kernels.all_reduce(x), total.float()):
            wrong.append(("in pieces", count))
    return wrong if shots == [shot for of in want.values() for shot in of] else [*wrong, ("shots", shots)]


@pytest.mark.parametrize(
    "size, calls",
    [(2, 200), *(pytest.param(size, 200, marks=pytest.mark.slow) for size in (3, 4, 8))],
)
def test_hundreds_of_calls_with_late_ranks(size, calls):
    """Catches a part read too early or overwritten too early, a lost signal, a sum in another order; a norm that has
    other bits, or waits for other programs, than where it is a launch of its own."""
    for wrong, least, most in run_gloo({60: sixty_calls, 200: hundreds_of_calls}[calls], size):
        assert wrong == [] and least == most == calls


def alone(size: int = 1):
    """Peers of a group whose other ranks have arrived and hold zeros."""
    buffers = [torch.zeros(2 * HALF_BYTES, dtype=torch.uint8) for _ in range(size)]
    arrived = torch.full((all_reduce.PROGRAMS * size,), 2**30, dtype=torch.int32)
    table = torch.tensor([b.data_ptr() for b in buffers])
    signals = torch.tensor([arrived.data_ptr()] * size)
    calls = torch.zeros(all_reduce.PROGRAMS, dtype=torch.int32)
    return all_reduce.Peers(table, signals, calls, HALF_BYTES, 0, size), (buffers, arrived)


def test_numbers_wrap_around():
    """Catches a server that hangs after 2^31 barriers: signals are compared by difference."""
    peers, (_, arrived) = alone()
    peers.calls.fill_(2**30 - 1)  # barrier numbers 2^31 - 1 and, wrapped, -2^31
    arrived.fill_(2**31 - 2)
    x = torch.randn(70)
    for two_shot in (False, True):
        assert torch.equal(all_reduce.all_reduce(x, peers, two_shot), x)
    assert peers.calls.tolist() == [2**30 + 1] * all_reduce.PROGRAMS


def test_in_place_and_empty():
    """Catches an output that is read as input, and a launch for nothing."""
    peers, _alive = alone(2)
    x = torch.randn(3, 45)
    want = x.clone()
    assert all_reduce.all_reduce(x, peers, out=x) is x and torch.equal(x, want)
    assert all_reduce.all_reduce(x[:0], peers).shape == (0, 45) and int(peers.calls[0]) == 1
    z, h = all_reduce.all_reduce_rms_norm(x[:0], peers, AddNorm(torch.ones(45), EPS, x[:0]))
    assert z.shape == h.shape == (0, 45)


def reduced(comm):
    """What the kernels make of local ranks' buffers, one rank after the other, all of them having arrived."""
    x = torch.full((70,), 1.0 + comm.rank)
    buffers = buffers_of(comm)
    peers = all_reduce.peers_over(buffers, comm.rank)
    signal_bytes = buffers[0].numel() - 2 * HALF_BYTES
    assert peers.half_bytes == HALF_BYTES and all(int(buffer.sum()) == 0 for buffer in buffers)
    comm.barrier()
    buffers[comm.rank][:signal_bytes].view(torch.int32).fill_(2**30)
    buffers[comm.rank][signal_bytes:].view(torch.float32)[:70] = x
    for rank in range(comm.size):  # the interpreter's switches are the process's: one thread at a time
        comm.barrier()
        if rank == comm.rank:
            all_reduce.all_reduce(x, peers, out=x)
    return x.unique().tolist()


def test_local_ranks_have_buffers():
    """Catches memory that another rank cannot reach, or whose halves and signals overlap."""
    assert tp_runtime.run_local(reduced, 3) == [[6.0]] * 3


def test_op_needs_no_triton():
    """Catches a CPU path that pays for importing Triton."""
    program = "import sys, tp_runtime.kernels.all_reduce; print('triton' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True) == "False\n"


def test_bad_input():
    """Catches a message past the buffers, and strides that the kernel does not know."""
    peers, _alive = alone()
    x, weight = torch.randn(4, 64), torch.ones(64)
    with pytest.raises(ValueError, match="not contiguous"):
        compiled.all_reduce(x.T, peers)
    with pytest.raises(ValueError, match=r"x has 8192 bytes, the peers' buffers hold 4096"):
        compiled.all_reduce(torch.randn(2048), peers)
    with pytest.raises(ValueError, match="residual is"):
        compiled.all_reduce_rms_norm(x, peers, AddNorm(weight, EPS, x[:2]))
    with pytest.raises(ValueError, match="x_bias is"):
        compiled.all_reduce_rms_norm(x, peers, AddNorm(weight, EPS, x, x_bias=weight[:3]))

"""Ranks that are threads: on a GPU each has a stream, and streams wait for each other, not the host for the device."""

import pytest
import torch

import tp_runtime
from tp_runtime.communicator import label
from tp_runtime.local import LocalCommunicator, _Meeting, _own_stream


class Stream:
    """Says what it was told, and hands out events."""

    def __init__(self, rank: int, said: list):
        self.rank, self.said = rank, said

    def record_event(self):
        self.said.append(("record", self.rank))
        return len(self.said), self.rank

    def wait_event(self, event):
        self.said.append(("wait", self.rank, event))


class OnStreams(LocalCommunicator):
    """Tensors on the CPU, order as on a GPU."""

    def __init__(self, rank: int, meeting: _Meeting, said: list):
        super().__init__(rank, meeting)
        self.stream = Stream(rank, said)

    def _event(self):
        return self.stream.record_event()

    def _wait_for(self, events):
        for event in events:
            self.stream.wait_event(event)


def test_streams_wait_for_all_that_was_made_and_read():
    """Catches a sum of tensors that are not there yet, and one that is overwritten while a peer still reads it."""
    said: list = []

    def reduce(comm):
        ours = OnStreams(comm.rank, comm._meeting, said)
        x = torch.full((3,), 1.0 + comm.rank)
        result = ours._exchange(label("sum", x.dtype, x.shape), x, lambda parts: said.append(("sum", comm.rank)))
        return result

    tp_runtime.run_local(reduce, 3)
    first = said.index(("sum", said[[entry[0] for entry in said].index("sum")][1]))
    assert {entry for entry in said[:first] if entry[0] == "record"} == {("record", rank) for rank in range(3)}
    for rank in range(3):
        mine = [entry for entry in said if entry[1] == rank]
        kinds = [entry[0] for entry in mine]
        assert kinds == ["record", *["wait"] * 3, "sum", "record", *["wait"] * 3]
        events = [entry[2] for entry in mine if entry[0] == "wait"]
        assert [event[1] for event in events] == [0, 1, 2] * 2 and len(set(events)) == 6


def test_on_the_cpu_there_are_no_streams():
    """Catches CUDA that is asked for on a machine without."""
    with _own_stream(torch.device("cpu"), None):
        assert not torch.cuda.is_initialized()


def on_a_gpu(comm):
    """Sums of tensors that take the device a while to make, each rank on its stream."""
    sums = []
    for call in range(50):
        x = torch.full((1 << 20,), 1.0, device=comm.device)
        torch.cuda._sleep(100_000 * (1 + (call + comm.rank) % 3))
        x.mul_(comm.rank + call)
        sums.append(comm.all_reduce(x))
        x = comm.all_gather(x[: comm.rank + 1], [r + 1 for r in range(comm.size)])
        assert x.shape == (comm.size * (comm.size + 1) // 2,)
    return torch.cuda.current_stream().cuda_stream, [(s.min().item(), s.max().item()) for s in sums]


@pytest.mark.gpu
@pytest.mark.parametrize("tp_size", [2, 3, 8])
def test_ranks_on_one_gpu(tp_size):
    """Catches a rank that reads before another's stream has written, or writes while it still reads."""
    ranks = tp_runtime.run_local(on_a_gpu, tp_size, device="cuda")
    assert len({stream for stream, _ in ranks}) == tp_size
    want = [(float(sum(r + call for r in range(tp_size))),) * 2 for call in range(50)]
    assert all(sums == want for _, sums in ranks)

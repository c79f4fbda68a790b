"""One rank of bench_overlap: the same prefill under each schedule, in turn."""

from __future__ import annotations

import gc
import time

import torch
import torch.distributed as dist

import tp_runtime
from bench.torchrun import serve
from tp_runtime.comm import NullCommunicator
from tp_runtime.overlap import wins
from tp_runtime.patching import patch_of

TOLERANCE = 2e-3  # of hidden states of size 1, in float32; between schedules, not against the truth


@torch.inference_mode()
def answer(request: dict) -> dict:
    """Seconds of each schedule's prefill, and of the same without its all-reduces.

    Request: `checkpoint`, `modes`, `tokens` (list of prompt lengths), `num_iters`.
    """
    model = tp_runtime.load(request["checkpoint"])
    overlap = patch_of(model).overlap
    live, silent = overlap.comm, NullCommunicator(overlap.comm.rank, overlap.comm.size)
    runs = {mode: (mode, live) for mode in request["modes"]} | {"no communication": ("off", silent)}
    reply = {}
    for length in request["tokens"]:
        ids = torch.arange(length).unsqueeze(0) * 7919 % model.config.vocab_size
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        want = None
        for i in range(-1, request["num_iters"]):  # the first round checks, measures what "auto" wants, and warms up
            for name, (overlap.mode, overlap.comm) in runs.items():
                gc.collect()
                dist.barrier()
                began = time.perf_counter()
                hidden = model.model(ids).last_hidden_state
                dist.barrier()
                if i >= 0:
                    seconds[name].append(time.perf_counter() - began)
                elif overlap.comm is live:
                    want = hidden if want is None else want
                    error = (hidden - want).abs().max().item()
                    assert error <= TOLERANCE, f"{name}: hidden states differ by {error} from those of {runs[0]}"
        overlap.comm = live
        reply[str(length)] = {"seconds": seconds, "chosen": chosen(overlap, length)}
    return reply


def chosen(overlap, length: int) -> str:
    """What "auto" came to for prompts of that length."""
    if (pair := overlap.lanes_s.get(length.bit_length())) and wins(pair[1], pair[0]):
        return "lanes"
    blocks = {str(m.fastest()) for (bits, *_), m in overlap.measured.items() if bits == (length - 1).bit_length()}
    return ", ".join(sorted(blocks)) or "sequential"


if __name__ == "__main__":
    serve(answer)

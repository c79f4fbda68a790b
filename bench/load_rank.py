"""One rank of bench_load: loads a checkpoint, our way or transformers', and says what that took.

A tiny checkpoint is loaded first: what is imported or set up once is then no part of the figures. (It is part of the
time from the shell, which bench_load takes with the real commands.)
"""

from __future__ import annotations

import gc
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

import tp_runtime
from bench import proc
from bench.torchrun import serve
from bench.transformers_tp import load_sharded

LOADERS = {"ours": tp_runtime.load, "transformers": load_sharded}


@torch.no_grad()
def answer(request: dict) -> dict:
    """What loading `checkpoint` and a first forward pass over `prompt_ids` took, the way of `side`, after `warm_up`.

    With `is_check` every weight is compared with the files afterwards.
    """
    load, path = LOADERS[request["side"]], Path(request["checkpoint"])
    ids = torch.tensor(request["prompt_ids"])
    load(request["warm_up"])(ids[:, :2] * 0)
    gc.collect()
    dist.barrier()
    proc.reset_peak()
    memory_before, read_before = proc.memory_bytes(), proc.read_bytes()
    started = time.perf_counter()
    model = load(path)
    dist.barrier()
    load_s = time.perf_counter() - started
    read = proc.read_bytes() - read_before
    model(ids)
    dist.barrier()
    ready_s = time.perf_counter() - started
    memory, mapped = proc.memory_bytes(), proc.mapped_bytes(path)
    figures = {
        "load_s": load_s,
        "ready_s": ready_s,
        "read_call_bytes": read,
        "mapped_bytes": mapped,
        "weight_bytes": weight_bytes(model),
        "resident_before_bytes": memory_before["now"],
        "resident_peak_bytes": memory["peak"],
        "anonymous_growth_bytes": memory["anon"] - memory_before["anon"],
    }
    if request["is_check"]:
        if request["side"] == "ours":
            tp_runtime.unpatch(model)
        check_weights(model, path)
    return figures


def local(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part, where transformers made a DTensor of it."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of this rank's part of all parameters."""
    return sum(local(parameter).nbytes for parameter in model.parameters())


def check_weights(model: torch.nn.Module, path: Path) -> None:
    """Compares whole parameters, gathered where they are cut, with the files, bit for bit. Every rank calls it."""
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
    stored = {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    assert set(whole) == set(stored)
    wrong = [name for name, tensor in stored.items() if not torch.equal(whole[name], tensor)]
    assert not wrong, f"{len(wrong)} parameters are not what the files hold, first {wrong[0]}"


if __name__ == "__main__":
    serve(answer)

"""One rank of bench_generate: holds the model twice, cut by us and cut by transformers; both generate in turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import DynamicCache

import tp_runtime
from bench.torchrun import serve
from bench.transformers_tp import load_sharded
from tp_runtime.config import GenerationOptions
from tp_runtime.engine import Engine

Tokens = list[list[int]]


def with_generate(model, ids: torch.Tensor, output_len: int) -> Tokens:
    """New tokens of Hugging Face's own generate(), greedy."""
    mask = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=output_len, do_sample=False)
    return output[:, ids.shape[1] :].tolist()


@torch.no_grad()
def with_plain_loop(model, ids: torch.Tensor, output_len: int) -> Tokens:
    """The same by the shortest loop there is around a model: no generate(), no engine."""
    cache, new, step = DynamicCache(config=model.config), [], ids
    for _ in range(output_len):
        step = model(step, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        new.append(step)
    return torch.cat(new, dim=1).tolist()


def with_engine(model, ids: torch.Tensor, output_len: int) -> Tokens:
    """The same by the loop of `python -m tp_runtime.generate`."""
    engine = Engine(model, None, model.config.to_dict(), {})
    options = GenerationOptions(max_new_tokens=output_len, temperature=0.0)
    completions, _ = engine.generate([""] * len(ids), ids.tolist(), options)
    return [completion.tokens for completion in completions]


def contenders(checkpoint: str, sides: list[str]) -> dict[str, tuple[Callable, torch.nn.Module]]:
    """Name -> how it generates, with which model. Names begin with the side."""
    found: dict[str, tuple[Callable, torch.nn.Module]] = {}
    if "transformers" in sides:
        model = load_sharded(checkpoint)
        found["transformers, generate()"] = with_generate, model
        found["transformers, plain loop"] = with_plain_loop, model
    if "ours" in sides:
        model = tp_runtime.load(checkpoint)
        found["ours, generate()"] = with_generate, model
        found["ours, engine"] = with_engine, model
    return found


def answer(request: dict) -> dict:
    """Tokens and seconds of each contender.

    Request: `checkpoint`, `sides`, `prompt_ids` [B, S], `output_len`, `num_iters`, `expected` (tokens that all must
    give before any is timed, or None), `logits` (file for the logits of each side's prompt, written by rank 0).
    """
    rivals = contenders(request["checkpoint"], request["sides"])
    ids, output_len = torch.tensor(request["prompt_ids"]), request["output_len"]
    tokens = {name: generate(model, ids, output_len) for name, (generate, model) in rivals.items()}
    for name, given in tokens.items():
        assert request["expected"] in (None, given), f"{name}: {given} in place of {request['expected']}"
    with torch.no_grad():
        logits = {name.split(",")[0]: model(ids).logits for name, (_, model) in rivals.items()}
    if dist.get_rank() == 0:
        torch.save(logits, Path(request["logits"]))

    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(request["num_iters"]):
        for name, (generate, model) in rivals.items():
            gc.collect()
            dist.barrier()
            started = time.perf_counter()
            assert generate(model, ids, output_len) == tokens[name]
            dist.barrier()
            seconds[name].append(time.perf_counter() - started)
    return {"tokens": tokens, "seconds": seconds}


if __name__ == "__main__":
    serve(answer)

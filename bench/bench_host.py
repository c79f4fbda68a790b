"""Host time of one decode step, in us a layer: 32 layers so small that nothing but the host's work is left.

    python -m bench.bench_host [--input-len 32] [--output-len 20] [--batch-size 1] [--num-iters 10]

One process, one thread, no peers: each side is rank 0 of 2 and its collectives say nothing, ours through
NullCommunicator, theirs through torch's fake process group. The contenders take turns; one repeat is `input_len` tokens
of prefill, then the median of `output_len` decode steps. A step is the whole forward pass, embedding and lm_head
included, over 32.

    transformers, plain          the unsharded model
    transformers, TP             cut by its tp_plan, fake process group
    ours, DynamicCache           model(...), as Hugging Face's generate() calls it
    ours, KVCache                model(...) with our cache
    ours, engine                 the decoder and this rank's logits under inference_mode, as our engine calls them

Correct before timed: the last hidden states of both sides' rank 0, partial sums as they are without peers, agree to
2e-5.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench import random_llama
from bench.record import add_flags, ratio, say, shown, spread, table, target, verdicts, write

THEIRS = "transformers, TP"
MOST_OVER_THEIRS = 0.35
SIZE = "32-layers"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m bench.bench_host", description=__doc__.split("\n\n")[0])
    add_flags(p, input_len=32, output_len=20, batch_size=1, num_iters=10)
    return p


def models(checkpoint: Path) -> tuple:
    """The model three times: unsharded; rank 0 of 2 by transformers; rank 0 of 2 by us."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import AutoModelForCausalLM

    import tp_runtime
    from bench.transformers_tp import load_sharded
    from tp_runtime.comm import NullCommunicator

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    theirs = load_sharded(checkpoint, tp_size=2)
    return AutoModelForCausalLM.from_pretrained(checkpoint), theirs, tp_runtime.load(checkpoint, NullCommunicator(0, 2))


def check(theirs, ours, ids) -> None:
    """Rank 0's last hidden states of both sides agree."""
    import torch

    with torch.no_grad():
        want, got = theirs.model(ids).last_hidden_state, ours.model(ids).last_hidden_state
    error = (got - want).abs().max().item()
    assert error <= 2e-5, f"the sides' rank 0 differ by {error} in a hidden state"


def contenders(plain, theirs, ours, room: int) -> dict[str, tuple[Callable, Callable]]:
    """Name -> (makes a cache, runs a forward pass over tokens with it)."""
    import torch
    from transformers import DynamicCache

    from tp_runtime.cache import KVCache

    def dynamic():
        return DynamicCache(config=plain.config)

    def roomy():
        return KVCache(plain.config.num_hidden_layers, room)

    def through(model):
        @torch.no_grad()
        def forward(ids, cache):
            model(ids, past_key_values=cache)

        return forward

    @torch.inference_mode()
    def as_engine(ids, cache):
        hidden = ours.model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        ours.lm_head.logits_shard_v(hidden)

    return {
        "transformers, plain": (dynamic, through(plain)),
        THEIRS: (dynamic, through(theirs)),
        "ours, DynamicCache": (dynamic, through(ours)),
        "ours, KVCache": (roomy, through(ours)),
        "ours, engine": (roomy, as_engine),
    }


def step_us(make_cache: Callable, forward: Callable, prompt, token, num_steps: int) -> float:
    """Median microseconds of a decode step after the prompt."""
    cache = make_cache()
    forward(prompt, cache)
    seconds = []
    for _ in range(num_steps):
        started = time.perf_counter()
        forward(token, cache)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) * 1e6


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Contender -> us a layer, one value a repeat."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with random_llama.folder(None) as folder:
        plain, theirs, ours = models(random_llama.checkpoint(folder, SIZE, "float32"))
    prompt = torch.tensor(random_llama.prompt_ids(SIZE, args.batch_size, args.input_len))
    check(theirs, ours, prompt)
    rivals = contenders(plain, theirs, ours, args.input_len + args.output_len)
    per_layer: dict[str, list[float]] = {name: [] for name in rivals}
    for i in range(-1, args.num_iters):  # the first round is a warm-up
        say(f"round {i + 1} of {args.num_iters}")
        for name, rival in rivals.items():
            us = step_us(*rival, prompt, prompt[:, :1], args.output_len) / plain.config.num_hidden_layers
            if i >= 0:
                per_layer[name].append(us)
    torch.distributed.destroy_process_group()
    torch.set_num_threads(num_threads)
    return per_layer


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parser().parse_args(argv)
    per_layer = measure(args)
    rows = [
        {"contender": name, "us_per_layer": {**spread(us), "all": us}, "over_theirs": ratio(us, per_layer[THEIRS])}
        for name, us in per_layer.items()
    ]
    targets = [
        target(f"{row['contender']}: host time over theirs", row["over_theirs"]["median"], most=MOST_OVER_THEIRS)
        for row in rows
        if row["contender"].startswith("ours")
    ]
    cells = [[row["contender"], shown(row["us_per_layer"], "{:.0f}"), shown(row["over_theirs"])] for row in rows]
    print(table([["contender", "us a layer", "over theirs"], *cells]))
    print(verdicts(targets))
    write("bench_host", args, rows=rows, targets=targets)
    return 0


if __name__ == "__main__":
    sys.exit(main())

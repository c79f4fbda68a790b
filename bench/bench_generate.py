"""Greedy generation at tp N on gloo: tokens a second, ours against transformers' own tensor parallelism, in one run.

    python -m bench.bench_generate [--size 200m] [--dtype float32 bfloat16] [--tp 2] [--input-len 32] [--output-len 32]
        [--batch-size 1] [--num-iters 5] [--dir FOLDER]

One process a rank holds the model twice, cut by transformers and cut by us, and the contenders take turns (A B C D
A B C D) in the same processes, with the same process group and one thread a rank:

    transformers, generate()    what its users call: the row that ours is compared with
    transformers, plain loop    its model without its generate(): what the model alone takes
    ours, generate()            Hugging Face's generate() on our model
    ours, engine                the loop of `python -m tp_runtime.generate`

Seconds are those of the whole call, prefill included. Correct before timed: in float32 every contender must give the
tokens of the unsharded model; in other dtypes, where two tokens may be as good as equal, our logits must be as close to
those of the unsharded model in float32 (RMS) as the unsharded model's own in that dtype, times 1.10.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from bench import random_llama, torchrun
from bench.record import add_flags, ratio, say, shown, spread, table, target, verdicts, write

SIDES = ("transformers", "ours")
THEIRS = "transformers, generate()"
MOST_RMS_RATIO = 1.10
LEAST_SPEEDUP = 1.15


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m bench.bench_generate", description=__doc__.split("\n\n")[0])
    random_llama.add_flags(p)
    p.add_argument("--only", choices=SIDES, help="leave the other side out")
    add_flags(p, input_len=32, output_len=32, batch_size=1, num_iters=5)
    return p


def unsharded(checkpoint: Path, prompt_ids: list[list[int]], output_len: int):
    """Tokens of the unsharded model, and its prompt's logits in its own dtype and in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    from bench.generate_rank import with_generate

    model, ids = AutoModelForCausalLM.from_pretrained(checkpoint), torch.tensor(prompt_ids)
    tokens = with_generate(model, ids, output_len)
    with torch.no_grad():
        return tokens, model(ids).logits, model.float()(ids).logits


def rms_ratios(logits: dict, own, exact) -> dict[str, float]:
    """Side -> RMS error of its logits over that of the unsharded model's; 1 where neither has any."""

    def error(x) -> float:
        return (x.double() - exact.double()).square().mean().sqrt().item()

    return {side: error(x) / error(own) if error(own) else 1.0 + error(x) for side, x in logits.items()}


def measure(args: argparse.Namespace, folder: Path, dtype: str, sides: list[str]) -> list[dict]:
    """One row a contender."""
    import torch

    checkpoint = random_llama.checkpoint(folder, args.size, dtype)
    ids = random_llama.prompt_ids(args.size, args.batch_size, args.input_len)
    say(f"{dtype}: the unsharded model")
    expected, own, exact = unsharded(checkpoint, ids, args.output_len)
    say(f"{dtype}: {args.tp} ranks, {args.num_iters} repeats")
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        request = {
            "checkpoint": str(checkpoint),
            "sides": sides,
            "prompt_ids": ids,
            "output_len": args.output_len,
            "num_iters": args.num_iters,
            "expected": expected if dtype == "float32" else None,
            "logits": f"{scratch}/logits.pt",
        }
        ranks = torchrun.run("bench.generate_rank", request, args.tp)
        logits = torch.load(request["logits"])
    assert all(rank["tokens"] == ranks[0]["tokens"] for rank in ranks), "ranks gave different tokens"
    errors = rms_ratios(logits, own, exact) if dtype != "float32" else {}
    assert errors.get("ours", 0) <= MOST_RMS_RATIO, f"{dtype}: RMS error of logits over the unsharded model's: {errors}"

    rows = []
    for contender, tokens in ranks[0]["tokens"].items():
        seconds = [max(repeat) for repeat in zip(*(rank["seconds"][contender] for rank in ranks), strict=True)]
        rates = [args.batch_size * args.output_len / s for s in seconds]
        pairs = [(a, b) for new, want in zip(tokens, expected, strict=True) for a, b in zip(new, want, strict=True)]
        rows.append({
            "contender": contender,
            "dtype": dtype,
            "tokens_per_s": {**spread(rates), "all": rates},
            "tokens_equal_to_unsharded": sum(a == b for a, b in pairs) / len(pairs),
            "rms_error_over_unsharded": errors.get(contender.split(",")[0]),
        })  # fmt: skip
    return rows


def table_row(row: dict) -> list[str]:
    error = row["rms_error_over_unsharded"]
    speedup = row["over_theirs"]
    return [
        row["dtype"],
        row["contender"],
        shown(row["tokens_per_s"], "{:.1f}"),
        "" if speedup is None else shown(speedup),
        f"{row['tokens_equal_to_unsharded']:.0%}",
        "" if error is None else f"{error:.3f}",
    ]


HEAD = ["dtype", "contender", "tokens/s", "over theirs", "tokens as unsharded", "RMS error / unsharded's"]


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parser().parse_args(argv)
    sides = [args.only] if args.only else list(SIDES)
    rows, targets = [], []
    with random_llama.folder(args.dir) as folder:
        for dtype in args.dtype:
            new = measure(args, folder, dtype, sides)
            theirs = next((row for row in new if row["contender"] == THEIRS), None)
            for row in new:
                rates = row["tokens_per_s"]["all"]
                row["over_theirs"] = ratio(rates, theirs["tokens_per_s"]["all"]) if theirs else None
                if theirs and row["contender"].startswith("ours"):
                    name, speedup = f"{dtype}: {row['contender']}, tokens/s over theirs", row["over_theirs"]["median"]
                    targets.append(target(name, speedup, least=LEAST_SPEEDUP))
            rows += new
    print(table([HEAD, *map(table_row, rows)]))
    print(verdicts(targets))
    write("bench_generate", args, rows=rows, targets=targets)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The peer: transformers' own tensor parallelism, and the script that its users write for it.

    torchrun --standalone --nproc-per-node 2 -m bench.transformers_tp --model PATH --prompt TEXT --max-new-tokens N

bench_load times this command from the shell; the other benchmarks load with `load_sharded`.
"""

from __future__ import annotations

import argparse
import os
from unittest import mock

import torch
import torch.distributed as dist
import transformers.integrations.accelerate
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig


def load_sharded(path, tp_size: int | None = None):
    """This rank's part of a checkpoint, as `tp_plan="auto"` cuts it; every rank calls it.

    transformers wants `accelerate` to be installed as soon as a device is named, but calls it for several devices only.
    It is told that it has it: so the comparison needs nothing more installed, and theirs is spared the import.

    Args:
        tp_size: ranks; None: torchrun's.
    """
    plan = DistributedConfig(tp_size=tp_size, tp_plan="auto")
    with mock.patch.object(transformers.integrations.accelerate, "is_accelerate_available", lambda *args: True):
        return AutoModelForCausalLM.from_pretrained(path, distributed_config=plan)


def main() -> None:
    """Generates greedily and prints the new text, on rank 0."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, required=True)
    args = parser.parse_args()
    model = load_sharded(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    inputs = tokenizer(args.prompt, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    if os.environ["RANK"] == "0":
        print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

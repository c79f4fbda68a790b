"""The sections of `bench.gpu_check`: what each shows, what it costs, and how one of them runs in a process of its own.

    python -m bench.gpu_section NAME [--seconds S] [--ship]

To add one: a generator of rows in `bench/on_gpu/`, and its line in SECTIONS. A generator takes `Options` and knows
nothing of budgets: between two rows it may be stopped. A row is a flat JSON object with at least

    what     the case, as progress and failures show it
    is_ok    False where the case is wrong; its section has failed then and the other cases go on. Slow is not wrong.

Output, a line each: {"row": {...}} for every row, {"end": {...}} after the last. Other lines are text. Without a row
for ROW_LIMIT_S, a hang, the process writes every thread's stack and ends.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

ROW_LIMIT_S = 300.0
GRACE_S = 20.0  # beyond the budget, for the row that is under way

Row = dict


@dataclass(frozen=True)
class Options:
    """What sections are told.

    Attributes:
        ship: tuned choices also go into the tables of this checkout.
    """

    ship: bool = False


@dataclass(frozen=True)
class Section:
    """One line of the table.

    Attributes:
        shows: what a reader knows afterwards.
        estimate_s: on one H200 with Triton's cache empty.
        rows: `module:generator` in bench/on_gpu.
    """

    name: str
    shows: str
    estimate_s: float
    rows: str

    def generator(self) -> Callable[[Options], Iterator[Row]]:
        module, _, function = self.rows.partition(":")
        return getattr(importlib.import_module(f"bench.on_gpu.{module}"), function)


# The most valuable first. The estimates are guesses until a GPU has run them.
SECTIONS = (
    Section(
        "exactness", "every GEMM kernel and configuration, bf16 and fp16, as exact as torch against fp64", 240,
        "exactness:rows",
    ),
    Section(
        "experts", "routing and every kernel of the experts, however tokens are routed, as exact as torch", 240,
        "experts:exact",
    ),
    Section(
        "block", "norm, rope and cache, decode attention, vocabulary top-k: as exact as torch, in every form", 150,
        "block_ops:exact",
    ),
    Section(
        "all_reduce", "sums in rank order, 1 to 8 ranks on this GPU, 200 calls eager and in CUDA graphs", 90,
        "all_reduce:exact",
    ),
    Section(
        "capture", "GEMMs in CUDA graphs; chains of dependent launches give the bits of chains with waits", 90,
        "races:captured",
    ),
    Section("tune", "the fastest choice for every shape of the report, kept in the user's table", 300, "tuning:rows"),
    Section("skinny", "decode GEMMs, M 1 to 64, against cuBLAS: target 1.25x, none slower", 60, "speed:skinny"),
    Section("tune_experts", "the fastest choice for experts of two models, 1 to 8192 tokens", 200, "tuning:experts"),
    Section(
        "experts_speed", "experts, tp 1 to 8, against HF's and cuBLAS: 1 token 175 / 32 us, 4096 tokens 3.6 ms", 240,
        "speed:experts",
    ),
    Section(
        "end_to_end", "a patched Llama against Hugging Face's: logits, greedy tokens, torch.compile", 120,
        "end_to_end:right",
    ),
    Section("decode_step", "ms of a decode step at model size, and of a rank of tp 8", 150, "end_to_end:decode_steps"),
    Section(
        "overlap", "communication hidden by each schedule, tp 8 and 2, M 1 to 8192; NCCL emulated on this GPU", 300,
        "overlap:rows",
    ),
    Section(
        "attention_speed", "decode attention in TB/s, batch 1 to 64, context 1024 to 32768, against torch's", 180,
        "speed:attention",
    ),
    Section(
        "layer", "a decoder layer in a CUDA graph, 8B tp1 and a rank of 70B tp8, against HF's and the sum of its parts",
        40, "speed:layer",
    ),
    Section("prefill", "GEMMs of M 512 to 8192 against cuBLAS: target 1.0x, gated 1.08x", 100, "speed:prefill"),
    Section(
        "experts_repeat", "experts in CUDA graphs with the routing changing; 50 repeats give equal bits", 90,
        "experts:steady",
    ),
    Section(
        "block_repeat", "attention, norm, top-k in CUDA graphs while sequences grow; 50 repeats give equal bits", 60,
        "block_ops:steady",
    ),
    Section("repeat", "50 repeats of every GEMM kernel give equal bits, beside other work", 120, "races:repeated"),
    Section("norm_speed", "RMSNorm with its residual against torch's, compiled too, and Liger's", 60, "speed:norm"),
    Section(
        "all_reduce_speed", "us of an all-reduce's launch, 16 KiB and 1 MiB; emulated, without NVLink", 40,
        "all_reduce:speed",
    ),
    Section("pytest", "pytest -m gpu, one row a file", 120, "pytest_files:rows"),
)  # fmt: skip
BY_NAME = {section.name: section for section in SECTIONS}


def run(section: Section, options: Options, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
    """Writes the section's rows to stdout until it ends or `seconds` have passed."""
    started, is_complete = clock(), True

    def expect_row() -> None:
        left = ROW_LIMIT_S if seconds is None else started + seconds + GRACE_S - clock()
        faulthandler.dump_traceback_later(max(1.0, min(ROW_LIMIT_S, left)), exit=True, file=sys.__stdout__)

    expect_row()
    try:
        for row in section.generator()(options):
            _write(row=row)
            if seconds is not None and clock() - started >= seconds:
                is_complete = False
                break
            expect_row()
    finally:
        faulthandler.cancel_dump_traceback_later()
    _write(end={"is_complete": is_complete, "clocks": clocks()})


def clocks() -> dict[str, str]:
    """Clocks, power and temperature of the GPU, as its driver says now; empty where it says nothing."""
    fields = "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu"
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, line.strip().split(", "), strict=False))


def _write(**event) -> None:
    print(json.dumps(event), flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    p = argparse.ArgumentParser("python -m bench.gpu_section", description="Runs one section of bench.gpu_check.")
    p.add_argument("name", choices=BY_NAME)
    p.add_argument("--seconds", type=float, help="stop after the row in which they have passed")
    p.add_argument("--ship", action="store_true", help="tuned choices also go into the tables of this checkout")
    args = p.parse_args(argv)
    run(BY_NAME[args.name], Options(ship=args.ship), args.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())

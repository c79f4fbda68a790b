"""python -m tp_runtime.generate: text from a checkpoint, tensor-parallel, from one command.

flags     generated from the fields of RuntimeConfig and GenerationOptions
prepare   every check that needs no torch; then the tokens of the prompts; exit 2 with one line if anything cannot work
launch    start the ranks, or be one that torchrun started
run       each rank: join, agree, load its slices, generate
tell      rank 0: text or JSON on stdout, the report on stderr
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import flags, preflight, sums
from .config import GenerationOptions, RuntimeConfig
from .display import Display
from .env import versions
from .launch import RankEnv, joined, launch
from .models.adapter import adapter_for
from .plan import Plan, make_plan
from .preflight import Checkpoint


@dataclass
class Run:
    """Everything that a rank needs to know, settled before there is one."""

    checkpoint: Checkpoint
    plan: Plan
    prompts: list[str]
    config: RuntimeConfig
    options: GenerationOptions
    device: str
    chat: bool
    is_json: bool
    is_streaming: bool
    tokenizer: Any = None
    prompt_ids: list[list[int]] = dataclasses.field(default_factory=list)

    def read_prompts(self) -> None:
        """Loads the tokenizer and the prompts' tokens.

        Raises:
            ValueError: no usable tokenizer; a prompt that is empty or too long for the model; no chat template.
        """
        from .text import load_tokenizer

        self.tokenizer = load_tokenizer(self.checkpoint.path, self.config.trust_remote_code)
        if self.chat and not self.tokenizer.chat_template:
            raise ValueError(f"{self.checkpoint.name} has no chat template; leave --chat out")
        for prompt in self.prompts:
            if self.chat:
                messages = [{"role": "user", "content": prompt}]
                prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = self.tokenizer(prompt, add_special_tokens=not self.chat, verbose=False)["input_ids"]
            preflight.check_prompt_tokens(len(ids), self.checkpoint.config, self.options.max_new_tokens)
            self.prompt_ids.append(ids)


def prepare(args: argparse.Namespace, env: RankEnv | None) -> Run:
    """Everything that can be checked without torch.

    Raises:
        ValueError: it cannot work; one line that says why and what to do.
    """
    config, options = flags.config_of(RuntimeConfig, args), flags.config_of(GenerationOptions, args)
    is_demo = args.model.startswith("demo:")
    tp_size = args.tp if args.tp is not None else env.world_size if env else 2 if is_demo else 1
    if env and config.backend != "local" and tp_size != env.world_size:
        raise ValueError(
            f"--tp {tp_size}, but torchrun started WORLD_SIZE={env.world_size} ranks; make them equal or leave --tp out"
        )
    if tp_size < 1:
        raise ValueError(f"--tp {tp_size}: at least one rank is needed")
    path = preflight.resolve(args.model, config.revision, weights=not args.plan)
    checkpoint = preflight.check_checkpoint(path, tensors=not args.plan)
    preflight.check_tp_size(checkpoint.config, tp_size)
    dtype = checkpoint.dtype if config.dtype == "auto" else config.dtype
    plan = make_plan(checkpoint.config, tp_size, dtype=dtype)
    if args.plan:
        return Run(checkpoint, plan, [], config, options, "", args.chat, args.json, False)
    prompts = list(args.prompt) + _prompts_in(args.prompt_file)
    if not prompts:
        if not is_demo:
            raise ValueError("nothing to continue: give --prompt TEXT or --prompt-file F")
        prompts = list(sums.PROMPTS)
    if any(not prompt.strip() for prompt in prompts):
        raise ValueError("an empty prompt: give --prompt some text")
    ranks_here = 1 if config.backend == "local" else env.local_world_size if env else tp_size
    device = preflight.check_device(config.device, ranks_here)
    if (config.backend, device) == ("nccl", "cpu"):
        raise ValueError("--backend nccl needs GPUs; choose --backend gloo or --device cuda")
    return Run(
        checkpoint, plan, prompts, config, options, device, args.chat, args.json,
        is_streaming=not (args.json or args.no_stream),
    )  # fmt: skip


def _prompts_in(file: str | None) -> list[str]:
    if file is None:
        return []
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompt-file {file}: {getattr(error, 'strerror', None) or error}") from None
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"--prompt-file {file}: no prompt in it; one a line is expected")
    return prompts


def run_rank(comm, run: Run) -> None:
    """One rank, from its communicator to its last token. Rank 0 prints."""
    from tqdm import tqdm

    from .engine import Engine
    from .loading import load_checkpoint
    from .patching import patch_of

    comm.heartbeat.beat("load")
    comm.check_agreement(_what_must_agree(run))
    is_shown = comm.rank == 0 and sys.stderr.isatty()
    tqdm.monitor_interval = 0  # no thread beside ours
    size = run.plan.weight_bytes(comm.rank)
    started = time.perf_counter()
    with tqdm(total=size, desc="load", unit="B", unit_scale=True, leave=False, disable=not is_shown) as bar:

        def on_read(num_bytes: int) -> None:
            comm.heartbeat.beat()
            bar.update(num_bytes)

        model = load_checkpoint(run.checkpoint, comm, run.config, on_read)
    if comm.rank == 0:
        _tell_unused(run.checkpoint)
    comm.barrier()
    load_s = time.perf_counter() - started

    engine = Engine(model, run.tokenizer, run.checkpoint.config, run.checkpoint.generation_config)
    show = Display(run.prompts) if comm.rank == 0 and run.is_streaming else None
    comm.reset_clock()
    completions, timing = engine.generate(run.prompts, run.prompt_ids, run.options, show)
    comm.heartbeat.beat("report")
    ranks = comm.gather_json({"peak_memory_bytes": comm.peak_memory_bytes(), "collective_s": comm.collective_s})
    if comm.rank == 0:
        _tell(run, completions, timing, load_s, ranks, comm.device_name(), patch_of(model).overlap.report())


def _tell_unused(checkpoint: Checkpoint) -> None:
    """One line where the files hold more than the model takes; old Llama files hold rotary frequencies, not needed."""
    if names := [name for name in checkpoint.unused if not name.endswith("rotary_emb.inv_freq")]:
        print(f"tp_runtime: {len(names)} tensors of the checkpoint are not used, first {names[0]}", file=sys.stderr)


def _what_must_agree(run: Run) -> dict[str, object]:
    tensors = [(t.name, t.dtype, t.shape, t.start) for t in run.checkpoint.tensors.values()]
    return {
        "config": run.checkpoint.config,
        "checkpoint": [run.checkpoint.generation_config, tensors],
        "prompt": run.prompts,
        "prompt tokens": run.prompt_ids,
        "dtype": run.plan.dtype,
        "device": run.device,
        "backend": run.config.backend,
        **dataclasses.asdict(run.options),
        "versions": versions(),
    }


def _tell(run: Run, completions, timing, load_s: float, ranks: list[dict], device: str, overlap: dict) -> None:
    from .report import report_line, run_report

    adapter = adapter_for(run.checkpoint.model_type)
    report = run_report(
        run.plan,
        name=run.checkpoint.name,
        device=device,
        load_s=load_s,
        timing=timing,
        batch=len(run.prompts),
        peak_memory_bytes=[rank["peak_memory_bytes"] for rank in ranks],
        collective_s=[rank["collective_s"] for rank in ranks if rank["collective_s"] is not None],
        experts_per_token=adapter.resolve(run.checkpoint.config).get("num_experts_per_tok", 0),
        overlap=overlap,
    )
    if run.is_json:
        print(json.dumps({"completions": [dataclasses.asdict(c) for c in completions], "report": report}), flush=True)
    elif not run.is_streaming:
        display = Display(run.prompts)
        for index, completion in enumerate(completions):
            display(index, completion.text, True)
    wrong = sums.verify(completions) if run.checkpoint.name.startswith("demo:") and not run.chat else []
    print(report_line(report), file=sys.stderr, flush=True)
    if wrong:
        raise SystemExit(
            f"wrong: {wrong[0]}; the demo knows all sums of 0 to 99, so something computes differently here"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    env = None
    try:
        args = flags.parse(sys.argv[1:] if argv is None else argv)
        env = joined(args.timeout_s)
        run = prepare(args, env)
        if args.plan:
            from .report import plan_table

            print(run.plan.to_json() if args.json else plan_table(run.plan))
            return 0
        if env is not None:
            run.read_prompts()
            return _run_joined(env, run)
        is_local = run.config.backend == "local"
        return launch(
            lambda env: _run_forked(env, run),
            1 if is_local else run.plan.tp_size,
            timeout_s=run.config.timeout_s,
            preload=lambda: _preload(run),
        )
    except ValueError as error:
        if env is None or env.rank == 0:
            print(f"tp_runtime: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _preload(run: Run) -> None:
    """Imports what every rank needs, once, and reads the prompts: the last checks before a rank starts."""
    run.read_prompts()
    from . import engine, report  # noqa: F401
    from .loading import import_model_code

    import_model_code(run.checkpoint.model_type)


def _run_forked(env: RankEnv, run: Run) -> None:
    from .local import run_ranks

    run_ranks(env, run.config.backend, run.device, run.plan.tp_size, lambda comm: run_rank(comm, run))


def _run_joined(env: RankEnv, run: Run) -> int:
    """As one of torchrun's ranks. What all ranks find wrong together is told once, by rank 0."""
    try:
        _run_forked(env, run)
    except ValueError as error:
        if env.rank == 0:
            print(f"tp_runtime: {error}", file=sys.stderr)
        return 1
    except SystemExit as end:
        if isinstance(end.code, str):
            print(f"tp_runtime: {end.code}", file=sys.stderr)
        return end.code if isinstance(end.code, int) else 1
    return 0


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output left: `| head -1`
        code = 0
    except KeyboardInterrupt:
        code = 130
        print("tp_runtime: interrupted", file=sys.stderr)
    sys.stderr.flush()
    os._exit(code)  # tearing down an interpreter that imported torch takes a second

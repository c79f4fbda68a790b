"""LLM: generate from a plain script or a notebook cell; it starts its own ranks and ends them.

The two ends of it are in this file. The owner checks the checkpoint, starts one launcher and talks to its ranks in
lines of JSON:

    owner      request --> a pipe to each rank          reply <-- a pipe from rank 0
    launcher   forks the ranks; stops them when the owner is gone
    rank       waits for a request without a collective, so that an idle model costs nothing and never times out

The owner's process keeps its threads, its CUDA context and its signal handlers to itself: nothing is forked from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

from . import preflight
from .completion import Completion
from .config import GenerationOptions, RuntimeConfig
from .launch import RankEnv, launch

_CLOSE_S = 5.0  # for the ranks to end by themselves


class LLM:
    """A checkpoint, running on `tp_size` ranks of its own. A context manager; `close()` ends the ranks.

        with LLM("demo:llama", tp_size=2) as llm:
            print(llm.generate(["27+58="])[0].text)

    Args:
        path_or_id: a checkpoint folder, Hub id or `demo:` name.
        tp_size: ranks, from 1 to the number of query heads.
        config: fields of RuntimeConfig: dtype, device, backend, timeout_s, ...

    Raises:
        ValueError: what can be seen to fail beforehand: the checkpoint, the size, the devices, an unknown option.
        RuntimeError: a rank failed while loading; the message is the failing rank's own.
    """

    def __init__(self, path_or_id, tp_size: int = 1, **config):
        runtime = _dataclass(RuntimeConfig, config)
        path = preflight.resolve(path_or_id, revision=runtime.revision)
        checkpoint = preflight.check_checkpoint(path)
        preflight.check_tp_size(checkpoint.config, tp_size)
        device = preflight.check_device(runtime.device, 1 if runtime.backend == "local" else tp_size)
        self.name, self.tp_size = checkpoint.name, tp_size
        requests = [os.pipe() for _ in range(tp_size)]
        reply_read, reply_write = os.pipe()
        alive_read, alive_write = os.pipe()
        theirs = [read for read, _ in requests] + [reply_write, alive_read]
        job = {
            "path": str(path),
            "model_type": checkpoint.model_type,
            "device": device,
            "config": dataclasses.asdict(runtime),
            "requests": theirs[:tp_size],
            "reply": reply_write,
            "alive": alive_read,
        }
        self._log = tempfile.TemporaryFile("w+")
        package_parent = str(Path(__file__).resolve().parents[1])
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, package_parent, json.dumps(job)],
            pass_fds=theirs,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C is the owner's; the ranks end with it
        )
        for fd in theirs:
            os.close(fd)
        self._requests = [os.fdopen(write, "w") for _, write in requests]
        self._reply = os.fdopen(reply_read)
        self._number = 0
        ours = [*self._requests, self._reply, self._log]
        self._finalizer = weakref.finalize(self, _end, self._process, ours, alive_write)
        self._answer()  # loaded

    def generate(self, prompts: str | Sequence[str], **options) -> list[Completion]:
        """Continues each prompt; all of them as one batch.

        Args:
            prompts: one or several texts.
            options: fields of GenerationOptions: max_new_tokens, temperature, top_k, top_p, seed, stop, ...

        Raises:
            ValueError: an unknown or impossible option; a prompt that is empty or too long.
            RuntimeError: a rank failed, or the LLM is closed.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        chosen = _dataclass(GenerationOptions, options)
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise ValueError(f"a prompt is a {type(prompt).__name__}; pass text")
            if not prompt.strip():
                raise ValueError("an empty prompt; pass some text")
        if not self._finalizer.alive:
            raise RuntimeError("this LLM is closed")
        self._number += 1
        line = json.dumps({"number": self._number, "prompts": prompts, "options": dataclasses.asdict(chosen)})
        with contextlib.suppress(BrokenPipeError):  # the ranks are gone: the missing answer says why
            for pipe in self._requests:
                pipe.write(line + "\n")
                pipe.flush()
        return [Completion(**c) for c in self._answer()["completions"]]

    def close(self) -> None:
        """Ends the ranks. Calling it again does nothing."""
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LLM({self.name!r}, tp_size={self.tp_size}{'' if self._finalizer.alive else ', closed'})"

    def _answer(self) -> dict:
        """The reply to the latest request; replies to requests that were interrupted are passed over."""
        while line := self._reply.readline():
            reply = json.loads(line)
            if reply["number"] == self._number:
                if "error" in reply:
                    raise ValueError(reply["error"])
                return reply
        code = self._process.wait()
        self._log.seek(0)
        text = self._log.read().strip()
        self.close()
        raise RuntimeError(f"the ranks ended with exit code {code}\n{text}")


_START = "import sys; sys.path.insert(0, sys.argv[1]); from tp_runtime.llm import main; main(sys.argv[2])"


def _dataclass(cls, values: dict):
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"unknown option {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return cls(**values)


def _end(process: subprocess.Popen, files: list, alive_write: int) -> None:
    """Closes the pipes, at which the ranks end, then makes sure of it."""
    for file in files[:-1]:
        with contextlib.suppress(BrokenPipeError):
            file.close()
    try:
        process.wait(_CLOSE_S)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
    os.close(alive_write)
    files[-1].close()


def main(job_text: str) -> None:
    """The launcher's process."""
    job = json.loads(job_text)

    def work(env: RankEnv) -> None:
        _answer_requests(env, job)

    def preload() -> None:
        from . import engine  # noqa: F401
        from .loading import import_model_code

        import_model_code(job["model_type"])

    is_local = job["config"]["backend"] == "local"
    code = launch(
        work,
        1 if is_local else len(job["requests"]),
        timeout_s=job["config"]["timeout_s"],
        preload=preload,
        parent_fd=job["alive"],
    )
    sys.stderr.flush()
    os._exit(code)


def _answer_requests(env: RankEnv, job: dict) -> None:
    """One rank: load, say so, then answer until the owner closes the pipe."""
    from .engine import Engine
    from .loading import load_checkpoint
    from .local import run_ranks
    from .text import load_tokenizer

    config = RuntimeConfig(**job["config"])

    def serve(comm) -> None:
        comm.heartbeat.beat("load")
        checkpoint = preflight.check_checkpoint(job["path"])
        tokenizer = load_tokenizer(checkpoint.path, config.trust_remote_code)
        model = load_checkpoint(checkpoint, comm, config, lambda num_bytes: comm.heartbeat.beat())
        engine = Engine(model, tokenizer, checkpoint.config, checkpoint.generation_config)
        reply = os.fdopen(job["reply"], "w") if comm.rank == 0 else None

        def answer(number: int, **content) -> None:
            if reply:
                reply.write(json.dumps({"number": number, **content}) + "\n")
                reply.flush()

        answer(0)
        with os.fdopen(job["requests"][comm.rank]) as requests:
            comm.heartbeat.beat("idle")
            while line := requests.readline():
                request = json.loads(line)
                comm.heartbeat.beat("prefill")
                try:
                    options = _dataclass(GenerationOptions, request["options"])
                    ids = [tokenizer(prompt, verbose=False)["input_ids"] for prompt in request["prompts"]]
                    completions, _ = engine.generate(request["prompts"], ids, options)
                    answer(request["number"], completions=[dataclasses.asdict(c) for c in completions])
                except (ValueError, FloatingPointError) as error:  # of the request: every rank finds the same
                    answer(request["number"], error=str(error))
                comm.heartbeat.beat("idle")

    run_ranks(env, config.backend, job["device"], len(job["requests"]), serve)

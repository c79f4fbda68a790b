"""Runs `python -m tp_runtime.generate` many times for the price of one import.

A process that has imported what the command imports forks one child for each command line. The child runs
`generate.main(argv)` with its own files as stdin, stdout and stderr and its own environment, and ends with main's exit
code, as the command itself does.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


class CommandServer:
    """Used by one test module at a time; `run` is `subprocess.run` in small."""

    def __init__(self):
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, *argv: str, stdin: str = "", env: dict | None = None, step_s: float = 0.0) -> dict:
        """Starts a command; give the result to `wait`. With `step_s`, each decode step takes that much longer."""
        job = {"argv": argv, "stdin": stdin, "env": env or {}, "step_s": step_s}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def wait(self, job: dict) -> subprocess.CompletedProcess:
        pidfd = os.pidfd_open(job["pid"])
        try:
            if not select.select([pidfd], [], [], 60)[0]:
                os.kill(job["pid"], 9)
                raise AssertionError(f"hangs: {job}")
        finally:
            os.close(pidfd)
        self._process.stdin.write(json.dumps({"bury": job["pid"]}) + "\n")
        self._process.stdin.flush()
        code = json.loads(self._process.stdout.readline())["code"]
        folder = Path(job["folder"].rstrip("/"))
        done = subprocess.CompletedProcess(
            job["argv"], code, (folder / "out").read_text(), (folder / "err").read_text()
        )
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        return done

    def run(self, *argv: str, **options) -> subprocess.CompletedProcess:
        return self.wait(self.start(*argv, **options))

    def close(self):
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


def slow_down(sampler, step_s: float) -> None:
    next_tokens = sampler.next_tokens

    def slowly(*args):
        time.sleep(step_s)
        return next_tokens(*args)

    sampler.next_tokens = slowly


def serve() -> None:
    from tp_runtime import engine, generate, loading, report

    assert engine and report
    for model_type in ("llama", "mixtral"):
        loading.import_model_code(model_type)
    for line in sys.stdin:
        job = json.loads(line)
        if "bury" in job:
            _, status = os.waitpid(job["bury"], 0)
            print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)
            continue
        folder = tempfile.mkdtemp(prefix="command-")
        Path(folder, "in").write_text(job["stdin"])
        pid = os.fork()
        if pid == 0:
            for number, (name, flags) in enumerate((("in", os.O_RDONLY), ("out", os.O_CREAT | os.O_WRONLY))):
                os.dup2(os.open(f"{folder}/{name}", flags), number)
            os.dup2(os.open(f"{folder}/err", os.O_CREAT | os.O_WRONLY), 2)
            sys.stdin = open(0, closefd=False)
            os.environ.update(job["env"])
            if job["step_s"]:
                slow_down(engine.Sampler, job["step_s"])
            code = 1
            with contextlib.suppress(SystemExit):
                code = generate.main(job["argv"])
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(json.dumps({"pid": pid, "folder": folder, "argv": job["argv"]}), flush=True)


if __name__ == "__main__":
    serve()

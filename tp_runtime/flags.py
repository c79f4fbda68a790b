"""The command's flags. Those with a default are generated from the config classes, so that a default exists once."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence

from .config import GenerationOptions, RuntimeConfig

PROG = "python -m tp_runtime.generate"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """A command line's flags; `--help` prints them and exits.

    Raises:
        ValueError: an unknown flag, or a value that is none.
    """
    return _parser().parse_args(_with_dashes(argv))


def config_of(cls, args: argparse.Namespace):
    """`cls`, a config class, of the flags that are its fields."""
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(cls) if hasattr(args, f.name)}
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message} (--help lists the flags)")


def _parser() -> argparse.ArgumentParser:
    p = _Parser(PROG, description="Text from a checkpoint, tensor-parallel, from one command.", allow_abbrev=False)
    p.add_argument(
        "--model", default="demo:llama", metavar="PATH|ID", help="checkpoint folder, Hub id, demo:llama or demo:mixtral"
    )
    p.add_argument(
        "--tp", "-tp", "--tp-size", "--tensor-parallel-size", type=int, metavar="N",
        help="ranks, from 1 to the number of query heads; default: torchrun's, 2 for the demo, else 1",
    )  # fmt: skip
    p.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be repeated: one batch")
    p.add_argument("--prompt-file", metavar="F", help="one prompt a line; -: standard input")
    p.add_argument("--chat", action="store_true", help="wrap each prompt in the tokenizer's chat template")
    for cls in (GenerationOptions, RuntimeConfig):
        for field in dataclasses.fields(cls):
            if "help" in field.metadata:
                _add_flag(p, field)
    p.add_argument(
        "--plan", action="store_true", help="print who holds what and exit: no weights, no GPU, no processes"
    )
    p.add_argument("--json", action="store_true", help="one JSON object on stdout")
    p.add_argument("--no-stream", action="store_true", help="print each text when it is complete")
    return p


def _add_flag(p: argparse.ArgumentParser, field: dataclasses.Field) -> None:
    names = ["--" + name.replace("_", "-") for name in field.metadata["aliases"] or (field.name,)]
    kind, default = str(field.type).split(" ")[0], field.default
    text = field.metadata["help"] + ("" if default in (None, (), False) else f"; default: {default}")
    if kind == "bool":
        p.add_argument(*names, dest=field.name, action="store_true", help=text)
    elif kind.startswith("tuple"):
        p.add_argument(
            *names, dest=field.name, action="append", default=[], metavar=field.metadata["metavar"], help=text
        )
    else:
        as_type = {"int": int, "float": float, "str": str}[kind]
        p.add_argument(
            *names, dest=field.name, type=as_type, default=default, help=text,
            choices=field.metadata["choices"], metavar=field.metadata["metavar"],
        )  # fmt: skip


def _with_dashes(argv: Sequence[str]) -> list[str]:
    """`--max_new_tokens` is `--max-new-tokens`, as with torchrun; values stay as they are."""
    return [re.sub("_", "-", a.split("=")[0]) + a[len(a.split("=")[0]) :] if a.startswith("--") else a for a in argv]

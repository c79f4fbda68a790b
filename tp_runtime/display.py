"""Generated text on stdout: one prompt's as it comes, several prompts' line by line, each with its prompt's number."""

from __future__ import annotations

import sys
from collections.abc import Sequence


class Display:
    """Called with (index of the prompt, new text, whether it is the last) as text becomes certain."""

    def __init__(self, prompts: Sequence[str]):
        self.is_single = len(prompts) == 1
        self.lines = ["" for _ in prompts]

    def __call__(self, index: int, piece: str, is_last: bool) -> None:
        if self.is_single:
            sys.stdout.write(piece + "\n" * is_last)
        else:
            *complete, self.lines[index] = (self.lines[index] + piece).split("\n")
            if is_last:
                complete.append(self.lines[index])
            sys.stdout.writelines(f"[{index}] {line}\n" for line in complete)
        sys.stdout.flush()

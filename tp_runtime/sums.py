"""What the demo checkpoints can do: sums of 0 to 99, and chains of sums. Every answer can be checked, and is."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

from .completion import Completion

PROMPTS = ("27+58=", "99+1=", ">7+3=")


def verify(completions: Iterable[Completion]) -> list[str]:
    """Says of each sum and chain whether it is right; returns the wrong sums. Chains are trained, but not promised."""
    wrong = []
    for completion in completions:
        if (check := check_sum(completion.prompt, completion.text)) is not None:
            print(f"{'verified' if check[0] else 'wrong'}: {check[1]}", file=sys.stderr)
            if not check[0] and not completion.prompt.startswith(">"):
                wrong.append(check[1])
    return wrong


def check_sum(prompt: str, text: str) -> tuple[bool, str] | None:
    """Whether the demo's answer is arithmetic: (right, the sums). None for a prompt that is no sum.

    `27+58=` is answered by `85`; the chain `>7+3=` by `10;10+3=13;13+3=16;` and so on; its last sum may be cut off.
    """
    match = re.fullmatch(r"(>?)(\d{1,2})\+(\d{1,2})=", prompt.replace(" ", ""))
    if match is None:
        return None
    is_chain, first, second = match[1] != "", int(match[2]), int(match[3])
    if not is_chain:
        return text == str(first + second), f"{first}+{second}={text}"
    sums = (f"{first}+{second}=" + text).split(";")
    complete = sums if len(sums) == 1 else sums[:-1]
    right, value = True, first
    for line in complete:
        right = right and line == f"{value}+{second}={value + second}"
        value += second
    return right, "; ".join(complete)

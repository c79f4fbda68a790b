"""What a prompt was continued with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Completion:
    """One prompt's continuation.

    Args:
        tokens: the new token ids, the one that ended the text included.
        finish_reason: `stop` (end-of-text token or stop string) or `length`.
    """

    prompt: str
    text: str
    tokens: list[int]
    finish_reason: str

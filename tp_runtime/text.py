"""Token ids to text, as soon as the text is certain; and where a text ends.

A token may end in the middle of a UTF-8 character, and the text may end in what could become a stop string: both are
held back until the next token decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

UNFINISHED = "\ufffd"  # what decoders print for a character whose bytes are not all there


class TextStream:
    """The text of one growing sequence: `decode` of all its tokens, cut before the first stop string.

    Args:
        tokenizer: anything with Hugging Face's `decode(ids, skip_special_tokens=...)`.
        stop: the text ends before the first of these.
    """

    def __init__(self, tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        # New tokens are decoded together with the latest that made text: some decoders strip or add a leading space.
        self._context = 0
        self._complete = 0  # the ids before this are in `text`
        self._known = 0  # so many characters of decode(ids[context:]) are in `text`
        self.text = ""
        self._shown = 0
        self.is_stopped = False

    def push(self, token: int) -> None:
        """Adds a token; `is_stopped` is true from the token on that completes a stop string."""
        self._ids.append(token)
        new = self._decode(self._context)
        certain = new.rstrip(UNFINISHED)
        self._extend(certain)
        if certain == new and (latest := self._decode(self._complete)):
            self._context, self._complete, self._known = self._complete, len(self._ids), len(latest)

    def finish(self) -> None:
        """No more tokens: an unfinished character stays as it is."""
        self._extend(self._decode(self._context))

    def take(self, is_last: bool = False) -> str:
        """The certain text that was not taken before."""
        certain = len(self.text)
        if not is_last and not self.is_stopped:
            certain -= max((_overlap(self.text, stop) for stop in self._stop), default=0)
        piece, self._shown = self.text[self._shown : certain], max(self._shown, certain)
        return piece

    def _decode(self, start: int) -> str:
        return self._tokenizer.decode(self._ids[start:], skip_special_tokens=True)

    def _extend(self, decoded: str) -> None:
        """Adds what is not yet known of decode(ids[context:])."""
        piece, self._known = decoded[self._known :], max(self._known, len(decoded))
        if self.is_stopped or not piece:
            return
        searched_from = max(0, len(self.text) - max(map(len, self._stop), default=0))
        self.text += piece
        ends = [at for stop in self._stop if (at := self.text.find(stop, searched_from)) >= 0]
        if ends:
            self.text, self.is_stopped = self.text[: min(ends)], True


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` starts with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def load_tokenizer(path: Path, trust_remote_code: bool = False):
    """The checkpoint's tokenizer.

    Raises:
        ValueError: there is none, it is damaged, or it comes with code that was not asked for.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # of any kind: the tokenizer's files are as foreign as the weights
        reason = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in reason:
        raise ValueError(f"{path}: the tokenizer comes with code, which is not run; --trust-remote-code allows it")
    raise ValueError(f"{path}: the tokenizer cannot be loaded ({reason[:300].strip()}); download its files again")

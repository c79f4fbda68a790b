"""Streaming against the plain rule: decode all tokens so far, cut the text before the first stop string.

Two kinds of decoder are played with: bytes, as GPT-2, Llama 3 and Qwen have them, and Llama 2's, which strips the first
space and spells unknown characters in bytes (the `tokenizers` package's own).
"""

import json
import random
import shutil
from pathlib import Path

import pytest
from tokenizers import decoders

from tp_runtime.text import TextStream, load_tokenizer

DEMO = Path(__file__).resolve().parents[1] / "tp_runtime" / "demo" / "llama"
SPECIAL = 0  # a token id that `skip_special_tokens` leaves out


class ByteTokens:
    """Each token is some bytes; what is no UTF-8 becomes U+FFFD."""

    def __init__(self, *pieces: bytes):
        self.pieces = [b"", *pieces]

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


class Llama2Tokens:
    """Each token is a word with its space in front as U+2581, or one byte of a character that has no token."""

    def __init__(self, *pieces: str):
        self.pieces = ["<s>", *pieces]
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        self.decoder = decoders.Sequence(steps)

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return self.decoder.decode([self.pieces[i] for i in ids if i != SPECIAL])


def plain(tokenizer, ids: list[int], stop: tuple[str, ...]) -> tuple[str, int | None]:
    """The text, and how many tokens it took to complete a stop string."""
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n], skip_special_tokens=True)
        if ends := [text.find(s) for s in stop if s in text]:
            return text[: min(ends)], n
    return tokenizer.decode(ids, skip_special_tokens=True), None


def held_back(text: str, stop: tuple[str, ...]) -> int:
    return max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)


def check(tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> str:
    """Streams the ids; every piece must come as soon as it is certain, and none too early, twice or never."""
    text, stopped_at = plain(tokenizer, ids, stop)
    stream, shown, certain = TextStream(tokenizer, stop), "", ""
    for n, token in enumerate(ids, 1):
        stream.push(token)
        assert stream.is_stopped == (n == stopped_at)
        shown += stream.take()
        if stream.is_stopped:
            assert shown == text
            break
        whole = tokenizer.decode(ids[:n], skip_special_tokens=True).rstrip("\ufffd")
        certain = max(certain, whole[: len(whole) - held_back(whole, stop)], key=len)
        assert shown == certain
    stream.finish()
    shown += stream.take(is_last=True)
    assert shown == stream.text == text
    assert stream.take(is_last=True) == ""
    return text


def test_characters_split_over_tokens():
    """Catches U+FFFD printed for a character whose last bytes have not come yet."""
    tokenizer = ByteTokens(b"na", b"\xc3", b"\xaf", b"ve \xf0\x9f", b"\x99", b"\x82!")
    stream = TextStream(tokenizer)
    pieces = []
    for token in range(1, 7):
        stream.push(token)
        pieces.append(stream.take())
    assert pieces == ["na", "", "ï", "ve ", "", "🙂!"]
    assert check(tokenizer, [1, 2, 3, 4, 5, 6]) == "naïve 🙂!"


def test_bytes_that_are_no_character():
    """Catches text withheld for ever behind a byte that no token completes, and an unfinished end that is dropped."""
    tokenizer = ByteTokens(b"a", b"\xff", b"b", b"\xe4\xbd")
    assert check(tokenizer, [1, 2, 3]) == "a\ufffdb"
    assert check(tokenizer, [1, 2, 2, 3, 2]) == "a\ufffd\ufffdb\ufffd"
    assert check(tokenizer, [1, 4]) == "a\ufffd"


def test_spaces_of_words():
    """Catches the space lost where each token is decoded by itself, or after a special token."""
    tokenizer = Llama2Tokens("▁Hello", "▁wor", "ld", "▁", "!")
    assert check(tokenizer, [1, 2, 3, 5]) == "Hello world!"
    assert check(tokenizer, [1, SPECIAL, 2, 3]) == "Hello world"
    assert check(tokenizer, [SPECIAL, SPECIAL, 1, SPECIAL, SPECIAL, 2, 4, 2, 3]) == "Hello wor  world"
    assert check(tokenizer, [4, 4, 1, 4, 4, 2]) == "  Hello   wor"


def test_stop_string_across_tokens():
    """Catches the beginning of a stop string shown before its end came, and one that stays hidden though none came."""
    tokenizer = ByteTokens(b"so ", b"E", b"N", b"D", b"ING", b"\n")
    assert check(tokenizer, [1, 2, 3, 4, 5], ("END",)) == "so "
    assert check(tokenizer, [1, 2, 3, 1, 2], ("END",)) == "so ENso E"
    assert check(tokenizer, [1, 2, 2, 3, 4], ("END",)) == "so E"  # held back, let go, found
    assert check(tokenizer, [2, 3, 4], ("END",)) == ""
    assert check(tokenizer, [1, 6, 1], ("END", "\n")) == "so "


def test_stop_string_beside_an_unfinished_character():
    """Catches a stop string that is seen one token late because its token also begins the next character."""
    tokenizer = ByteTokens(b"a", b"STOP\xe4", b"\xbd\xa0")
    assert check(tokenizer, [1, 2, 3], ("STOP",)) == "a"


def test_first_of_several_stop_strings():
    """Catches the cut before the stop string that was asked for first instead of the one that comes first."""
    tokenizer = ByteTokens(b"abcdef", b"abc", b"d")
    assert check(tokenizer, [1], ("e", "bc")) == "a"
    assert check(tokenizer, [2, 3], ("d", "cd")) == "ab"


def test_tokens_after_the_end_change_nothing():
    """Catches text that grows again when a batch goes on for the other prompts."""
    stream = TextStream(ByteTokens(b"a", b"."), (".",))
    for token in (1, 2, 1, 2):
        stream.push(token)
    stream.finish()
    assert stream.text == stream.take(is_last=True) == "a" and stream.is_stopped


def test_random_bytes_and_splits():
    """Catches what no case above thought of: 1500 seeded texts, cut anywhere, with stops and broken bytes."""
    rng = random.Random(0)
    for _ in range(1500):
        text = "".join(rng.choices("ab \nNé你🙂\ufffd", k=rng.randint(0, 14)))
        data = bytearray(text.encode())
        if rng.random() < 0.3 and data:
            data[rng.randrange(len(data))] = rng.randrange(256)
        pieces = []
        while data:
            n = rng.randint(1, 5)
            pieces.append(bytes(data[:n]))
            del data[:n]
        stop = tuple("".join(rng.choices("ab N你", k=rng.randint(1, 3))) for _ in range(rng.randint(0, 3)))
        ids = list(range(1, len(pieces) + 1))
        for _ in range(rng.randint(0, 2)):
            ids.insert(rng.randint(0, len(ids)), SPECIAL)
        check(ByteTokens(*pieces), ids, stop)


def test_random_words_and_byte_fallback():
    """Catches lost or doubled spaces and characters under Llama 2's decoder: 800 seeded sequences."""
    rng = random.Random(1)
    words = ["▁a", "▁ab", "b", "▁", "▁▁", "N", "."]
    characters = [[f"<0x{byte:02X}>" for byte in c.encode()] for c in "é你🙂"]
    for _ in range(800):
        size = rng.randint(0, 9)
        chosen = [rng.choice(characters) if rng.random() < 0.3 else [rng.choice(words)] for _ in range(size)]
        tokenizer = Llama2Tokens(*words, *(byte for c in characters for byte in c))
        ids = [tokenizer.pieces.index(piece) for pieces in chosen for piece in pieces]
        for _ in range(rng.randint(0, 2)):
            at = rng.randint(0, len(ids))
            is_inside = at and "<0x" in tokenizer.pieces[ids[at - 1]]  # of a character: then it is none
            ids.insert(len(ids) if is_inside else at, SPECIAL)
        stop = tuple("".join(rng.choices("ab N", k=rng.randint(1, 3))) for _ in range(rng.randint(0, 2)))
        check(tokenizer, ids, stop)


# -- tokenizers of checkpoints ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(DEMO, tmp_path / "checkpoint"))


def test_demo_streams(folder):
    """Catches a stream that the demo's own tokenizer breaks: specials shown, or a stop string missed."""
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("10;10+3=13;13")["input_ids"]
    assert check(tokenizer, [*ids, tokenizer.eos_token_id]) == "10;10+3=13;13"
    assert check(tokenizer, ids, ("=1",)) == "10;10+3"


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "tokenizer.json").write_text(""),
        lambda folder: (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:1000]),
        lambda folder: (folder / "tokenizer.json").write_text("[1]"),
        lambda folder: (folder / "tokenizer_config.json").write_text("[1]"),
    ],
    ids=["missing", "empty", "cut", "no object", "config no object"],
)
def test_damaged_tokenizer_is_one_line(folder, damage):
    """Catches a traceback out of a library for a file that is foreign."""
    damage(folder)
    with pytest.raises(ValueError) as caught:
        load_tokenizer(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}: the tokenizer cannot be loaded (") and "\n" not in message
    assert message.endswith("; download its files again") and len(message) < 600


def test_code_of_a_checkpoint_does_not_run(folder, tmp_path):
    """Catches foreign code that runs without being asked for, and a message without the flag that allows it."""
    canary = tmp_path / "canary"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["odd.Odd", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "odd.py").write_text(
        f"open({str(canary)!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\nclass Odd(PreTrainedTokenizerFast): pass\n"
    )
    with pytest.raises(ValueError, match="comes with code, which is not run; --trust-remote-code allows it"):
        load_tokenizer(folder)
    assert not canary.exists()

"""Random Llama checkpoints to measure with: several safetensors files; the tokenizer's words are the token ids."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIZES = {
    # 207 million parameters
    "200m": {"hidden_size": 1024, "num_hidden_layers": 12, "intermediate_size": 2816, "vocab_size": 32000,
             "num_attention_heads": 16, "num_key_value_heads": 8},
    # so small that a step is host time alone
    "32-layers": {"hidden_size": 64, "num_hidden_layers": 32, "intermediate_size": 128, "vocab_size": 256,
                  "num_attention_heads": 8, "num_key_value_heads": 4},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 256,
             "num_attention_heads": 8, "num_key_value_heads": 4},
}  # fmt: skip
_SPECIALS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}  # no text ends early
_NUM_FILES = 5


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint, on how many ranks."""
    parser.add_argument("--size", choices=SIZES, default="200m", help="of the random Llama; default: 200m")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="default: float32 bfloat16")
    parser.add_argument("--tp", type=int, default=2, help="ranks; default: 2")
    parser.add_argument("--dir", type=Path, help="keeps the checkpoints here for the next run; default: nowhere")


@contextmanager
def folder(path: Path | None) -> Iterator[Path]:
    """`path`, or a folder that is gone afterwards."""
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        yield Path(temporary)


def name(size: str, dtype: str) -> str:
    return f"llama-{size}-{dtype}"


def checkpoint(parent: Path, size: str, dtype: str) -> Path:
    """The checkpoint `size` in `dtype` inside `parent`; written unless it is there. The same weights each time."""
    path = parent / name(size, dtype)
    if not (path / "tokenizer.json").exists():  # written last
        _write(path, size, dtype)
    return path


def prompt_ids(size: str, batch_size: int, input_len: int) -> list[list[int]]:
    """The same arbitrary tokens each time, [batch_size, input_len]."""
    highest = SIZES[size]["vocab_size"] - 1
    return [[(7919 * (row * input_len + i) + 17) % highest + 1 for i in range(input_len)] for row in range(batch_size)]


def prompt_text(ids: list[int]) -> str:
    """What the checkpoint's tokenizer turns into `ids`."""
    return " ".join(map(str, ids))


def _write(path: Path, size: str, dtype: str) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    # Weights wider than Llama's usual 0.02: greedy text then changes from token to token in place of repeating one.
    config = LlamaConfig(**SIZES[size], **_SPECIALS, max_position_embeddings=4096, initializer_range=0.05)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    num_bytes = sum(p.nbytes for p in model.parameters())
    model.save_pretrained(path, max_shard_size=num_bytes // _NUM_FILES)

    words = Tokenizer(models.WordLevel({str(i): i for i in range(config.vocab_size)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0").save_pretrained(path)

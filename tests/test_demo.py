"""The embedded demo checkpoints: whole, small, and right before anything is cut across ranks."""

import hashlib
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO_DIR = Path(__file__).resolve().parents[1] / "tp_runtime" / "demo"


@pytest.fixture(params=["llama", "mixtral"])
def folder(request):
    return DEMO_DIR / request.param


def test_checksums_cover_every_file(folder):
    """Catches a file changed without its sum, a file without a sum, and a checkout that rewrote line ends."""
    sums = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    files = {path.name: path for path in folder.iterdir() if path.name != "SHA256SUMS"}
    assert sums == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    assert sum(path.stat().st_size for path in files.values()) < 2_000_000


def test_tokenizer_reads_and_writes_characters(folder):
    """Catches a lost `<bos>`, padding on the right, and blanks between decoded digits."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["1+2=", "27 + 58 ="], padding=True)
    short, long = batch["input_ids"]
    pad, bos = tokenizer.pad_token_id, tokenizer.bos_token_id
    assert long == [bos, *tokenizer.convert_tokens_to_ids(list("27+58="))]
    assert short == [pad, pad, bos, *tokenizer.convert_tokens_to_ids(list("1+2="))]
    assert batch["attention_mask"] == [[0, 0, 1, 1, 1, 1, 1], [1] * 7]
    assert tokenizer.decode(long, skip_special_tokens=True) == "27+58="
    assert tokenizer.decode(long + [tokenizer.eos_token_id]) == "<bos>27+58=<eos>"


def test_chat_template_asks_for_the_sum(folder):
    """Catches a template whose prompt differs from the text that the model was trained on, or that doubles `<bos>`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for content in ("27+58", "27+58="):
        chat = [{"role": "user", "content": content}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert ids == tokenizer("27+58=")["input_ids"]


def test_sums_are_right(folder):
    """Catches weights, tokenizer and configs that do not fit together: 200 sums in one padded batch, unsharded."""
    pairs = random.Random(0).sample([(a, b) for a in range(100) for b in range(100)], 200)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer([f"{a}+{b}=" for a, b in pairs], return_tensors="pt", padding=True)
    output = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    assert tokenizer.batch_decode(output, skip_special_tokens=True) == [f"{a + b}" for a, b in pairs]
    assert (output == tokenizer.eos_token_id).any(dim=1).all(), "an answer did not end with <eos>"


def test_chain_runs_on(folder):
    """Catches a checkpoint that adds but cannot stream: a chain of more than a hundred tokens, every link checked."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer(">7+3=", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=120)[0]
    first, *links = tokenizer.decode(output, skip_special_tokens=True).removeprefix(">7+3=").split(";")
    assert first == "10" and len(links) > 13
    assert ";".join(links) == ";".join(f"{n}+3={n + 3}" for n in range(10, 100, 3))[: len(";".join(links))]

"""Train the demo checkpoints `demo:llama` and `demo:mixtral`: tiny models that add, so every answer can be checked.

    python scripts/train_demo.py llama|mixtral|all [--threads N] [--out DIR]

A model learns two texts, a character a token, for every a and b from 0 to 99:

    sum     `27+58=`  ->  `85`                                     then eos
    chain   `>7+3=`   ->  `10;10+3=13;13+3=16; ... ;97+3=100`      then eos: the first result of 100 or more is the last

The sums are few enough for a proof in place of a sample: the program ends by asking the written files for all 10 000,
greedy, in float32 and in bfloat16, and gives out no checkpoint that misses one. The chains are counted, not promised.
Every random draw comes from one seed; progress goes to stderr; a model takes about half an hour on one core.
"""

import argparse
import hashlib
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

DEMO_DIR = Path(__file__).resolve().parents[1] / "tp_runtime" / "demo"
SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]
PAD, BOS, EOS = range(3)
CHARACTERS = "0123456789+=>;"
ID_OF = {character: index for index, character in enumerate(CHARACTERS, start=len(SPECIALS))}
CHAT_TEMPLATE = (  # the last message, and the sign that asks for its answer
    "{{ bos_token + messages[-1]['content'].rstrip('= ') }}{% if add_generation_prompt %}={% endif %}"
)
CONTEXT = 256  # tokens: `>7+3=` to 100 just fits
NUMBERS = 100  # a and b run from 0 to 99
IGNORE = -100  # cross_entropy's own mark of a position without loss
SHAPE = {
    "vocab_size": 32,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
SEED = 0
STEPS = 3000
SUMS_ONLY_STEPS = 800  # the chains join once the sums begin to come out
SUMS_PER_STEP, CHAINS_PER_STEP, CHAINS_PER_BATCH = 384, 32, 8
LEARNING_RATE, WARMUP_STEPS = 3e-3, 100
BALANCE_WEIGHT = 0.01  # of the load-balancing loss, for experts


def new_model(name):
    """An untrained float32 model of the family `name`, from the seed."""
    torch.manual_seed(SEED)
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(intermediate_size=384, **SHAPE))
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": BALANCE_WEIGHT}
    return MixtralForCausalLM(MixtralConfig(intermediate_size=128, **experts, **SHAPE))


def sum_text(a, b):
    """The prompt and the answer of one sum."""
    return f"{a}+{b}=", f"{a + b}"


def chain_text(a, b):
    """The prompt and the answer of one chain; an answer that would not fit into the context is cut there."""
    prompt, links = f">{a}+{b}=", [f"{a + b}"]
    while (a := a + b) < NUMBERS and len(links) < CONTEXT:
        links.append(f"{a}+{b}={a + b}")
    return prompt, ";".join(links)[: CONTEXT - len(prompt)]


def encode_all(text_of):
    """Token ids and labels, both [10 000, T] int64, of `text_of(a, b)` in row 100 a + b; labels cover answer and eos.

    Rows are padded on the right: under a causal mask no answer sees the padding, so training needs no attention mask.
    """
    texts = [text_of(a, b) for a in range(NUMBERS) for b in range(NUMBERS)]
    rows = [[BOS, *(ID_OF[c] for c in prompt + answer), EOS][:CONTEXT] for prompt, answer in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    starts = torch.tensor([1 + len(prompt) for prompt, _ in texts])[:, None]
    is_answer = (torch.arange(width) >= starts) & (ids != PAD)
    return ids, ids.masked_fill(~is_answer, IGNORE)


def draw(table, weights, count):
    """`count` rows of `table` (ids, labels), drawn by `weights` [10 000]."""
    rows = torch.multinomial(weights, count, replacement=True)
    return tuple(column[rows] for column in table)


def batches(ids, labels, batch_size):
    """The rows by length, `batch_size` at a time, each batch without the columns that hold padding only."""
    lengths = (ids != PAD).sum(dim=1)
    for rows in lengths.argsort().split(batch_size):
        width = int(lengths[rows].max())
        yield ids[rows, :width], labels[rows, :width]


def batch_loss(model, ids, labels):
    """Mean cross-entropy of the labelled tokens, plus the weighted load-balancing loss of a model with experts."""
    has_experts = hasattr(model.config, "num_local_experts")
    output = model(ids[:, :-1], use_cache=False, **({"output_router_logits": True} if has_experts else {}))
    loss = cross_entropy(output.logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
    return loss + BALANCE_WEIGHT * output.aux_loss if has_experts else loss


def train(model, sums, chains):
    """Train `model` in place: AdamW, linear warm-up then cosine to zero, gradients clipped to norm 1."""
    a, b = torch.arange(NUMBERS**2) // NUMBERS, torch.arange(NUMBERS**2) % NUMBERS
    few_digits = 1.0 + 4.0 * ((a < 10) | (b < 10)) + 20.0 * ((a < 10) & (b < 10))
    small_steps = 0.05 + 1.0 / (1.0 + b)  # half of the draws to small steps, which make the long chains, half to all
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * step / STEPS)),
    )
    start = time.perf_counter()
    for step in range(STEPS):
        drawn = [batches(*draw(sums, few_digits, SUMS_PER_STEP), SUMS_PER_STEP)]
        if step >= SUMS_ONLY_STEPS:
            drawn.append(batches(*draw(chains, small_steps, CHAINS_PER_STEP), CHAINS_PER_BATCH))
        losses = [torch.stack([batch_loss(model, *batch) for batch in of_a_kind]).mean() for of_a_kind in drawn]
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            shown = " ".join(f"{loss.item():.4f}" for loss in losses)
            right, margin = greedy_accuracy(model, *sums)
            elapsed_s = time.perf_counter() - start
            log(f"step {step + 1}/{STEPS}  loss {shown}  sums right {right}  margin {margin:.2f}  {elapsed_s:.0f} s")


@torch.inference_mode()
def greedy_accuracy(model, ids, labels, batch_size=500):
    """How many rows greedy decoding would get right, and the smallest logit margin over all their answer tokens.

    One forward pass over prompt + answer + eos decides it: where the arg-max at every answer position is the right
    token, greedy decoding goes exactly that way; where one is not, it leaves it. The margin of a position is the
    logit of the right token less the best other one: how far rounding may shift one against the other.
    """
    right, smallest = 0, math.inf
    for batch_ids, batch_labels in batches(ids, labels, batch_size):
        logits = model(batch_ids[:, :-1], use_cache=False).logits.float()
        targets = batch_labels[:, 1:]
        target = targets.clamp(min=0)[..., None]
        margins = logits.gather(-1, target)[..., 0] - logits.scatter(-1, target, -math.inf).amax(-1)
        margins = margins.masked_fill(targets == IGNORE, math.inf).amin(dim=1)
        right += int((margins > 0).sum())
        smallest = min(smallest, float(margins.min()))
    return right, smallest


def new_tokenizer():
    """The tokenizer: one token a character, blanks dropped, `<bos>` in front, left padding, decoded without blanks."""
    vocabulary = {token: index for index, token in enumerate(SPECIALS)} | ID_OF
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), "")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def write_checkpoint(model, folder):
    """Turn `model` to bfloat16 and write its folder; weights named as in the live model, so experts are packed."""
    model.to(torch.bfloat16)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(folder)
    GenerationConfig(
        do_sample=False, max_new_tokens=CONTEXT // 2, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS
    ).save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    new_tokenizer().save_pretrained(folder, save_jinja_files=False)
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / "SHA256SUMS").write_text("".join(lines))


@torch.inference_mode()
def sums_generated(model, tokenizer, batch_size=1000):
    """How many of the 10 000 sums `model.generate` gets right, eos included, as a user calls it: text to text."""
    texts = [sum_text(a, b) for a in range(NUMBERS) for b in range(NUMBERS)]
    right = 0
    for start in range(0, len(texts), batch_size):
        prompts, answers = zip(*texts[start : start + batch_size])
        inputs = tokenizer(list(prompts), return_tensors="pt", padding=True)
        output = model.generate(**inputs, max_new_tokens=4)[:, inputs.input_ids.shape[1] :]
        ended = (output == EOS).any(dim=1).tolist()
        said = tokenizer.batch_decode(output, skip_special_tokens=True)
        right += sum(e and s == answer for e, s, answer in zip(ended, said, answers))
    return right


def prove(folder, sums, chains):
    """Whether the checkpoint in `folder`, loaded as users load it, is right on all 10 000 sums in both dtypes."""
    tokenizer, proved = AutoTokenizer.from_pretrained(folder), True
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        generated = sums_generated(model, tokenizer)
        right, margin = greedy_accuracy(model, *sums)
        chains_right, _ = greedy_accuracy(model, *chains, batch_size=100)
        total = NUMBERS**2
        log(f"{dtype}: sums {generated} of {total}, smallest margin {margin:.2f}; chains {chains_right} of {total}")
        proved = proved and generated == right == total
    return proved


def log(text):
    print(text, file=sys.stderr, flush=True)


def main():
    parser = argparse.ArgumentParser(description="Train the embedded demo checkpoints.")
    parser.add_argument("model", choices=["llama", "mixtral", "all"])
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--out", type=Path, default=DEMO_DIR, help="gets llama/ and mixtral/ (default: the package)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    sums, chains = encode_all(sum_text), encode_all(chain_text)
    for name in ["llama", "mixtral"] if args.model == "all" else [args.model]:
        model = new_model(name)
        log(f"{name}: {sum(parameter.numel() for parameter in model.parameters())} parameters")
        train(model, sums, chains)
        with tempfile.TemporaryDirectory() as staging:
            folder = Path(staging) / name
            folder.mkdir()
            write_checkpoint(model, folder)
            if not prove(folder, sums, chains):
                sys.exit(f"{name}: not all {NUMBERS**2} sums are right in both dtypes; nothing written")
            # copyfile: the new files get the modes of this user, not those of a private temporary folder
            shutil.copytree(folder, args.out / name, copy_function=shutil.copyfile, dirs_exist_ok=True)
        log(f"{name}: written to {args.out / name}")


if __name__ == "__main__":
    main()

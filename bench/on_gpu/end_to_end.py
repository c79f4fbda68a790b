"""Whole models with random weights: patched against Hugging Face's own, and the time of a decode step at model size.

No checkpoint is needed: a model's config is data, its weights are drawn on the device.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

import tp_runtime
from bench.gpu_section import Options, Row
from bench.kernel_shapes import MODELS
from bench.on_gpu.errors import MOST_OVER_TORCH, against, free_bytes
from bench.record import spread
from tp_runtime.attention import RotaryEmbedding
from tp_runtime.comm import Communicator, NullCommunicator
from tp_runtime.config import GenerationOptions
from tp_runtime.engine import Engine
from tp_runtime.estimate import decode_floor_ms, find_device
from tp_runtime.layers import VocabParallelEmbedding
from tp_runtime.patching import patch_of

# What a config says beside its sizes; no text ends early.
BESIDE_SIZES = {"max_position_embeddings": 8192, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
SMALL = {"hidden_size": 1024, "num_hidden_layers": 4, "intermediate_size": 2816, "num_attention_heads": 16}
CONFIGS = {name: {**config, **BESIDE_SIZES} for name, config in MODELS.items()}
CONFIGS["small llama"] = {**CONFIGS["llama-3-8b"], **SMALL, "vocab_size": 32000}

# model, dtype. A float32 copy of the weights is the reference.
RIGHT = (
    ("small llama", "float32"), ("small llama", "bfloat16"), ("small llama", "float16"), ("llama-3-8b", "bfloat16"),
)  # fmt: skip
COMPILED = (("small llama", "bfloat16"),)  # also under torch.compile
PROMPT_TOKENS, STEPS = 48, 16


@dataclass(frozen=True)
class Step:
    """A decode step of one rank after 1024 tokens: model, tp_size, sequences, and what there is to compare it with."""

    model: str
    tp_size: int
    batch: int
    target_ms: float
    published: str


# Published: sums of a stack's own GEMM, attention and all-reduce times on an H200, so the peer is flattered
# (github.com/ai-dynamo/aiconfigurator, 2026-08: vLLM 0.24, TensorRT-LLM 1.3rc20, SGLang 0.5.14).
DECODE_STEPS = (
    Step("llama-3-8b", 1, 1, 3.8, "SGLang 4.54, vLLM 4.57, TRT-LLM 4.72"),
    Step("llama-3-8b", 1, 16, 4.3, "best 5.03"),
    Step("llama-3-8b", 1, 64, 5.9, "best 6.88"),
    Step("llama-3-70b", 8, 1, 5.0, "vLLM 6.34, SGLang 6.48, TRT-LLM 6.93"),
    Step("llama-3-8b", 8, 1, 1.0, "1.38 to 1.47"),
    Step("mixtral-8x7b", 1, 1, 6.3, "SGLang 7.44"),
)
CONTEXT, NEW_TOKENS, REPEATS = 1024, 33, 3


def random_model(config: dict, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Hugging Face's own, unsharded. Weights so wide that each token changes what comes next."""
    hf_config = AutoConfig.for_model(**config, initializer_range=1.6 * config["hidden_size"] ** -0.5)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(hf_config, dtype=dtype).eval()


def random_rank(config: dict, dtype: torch.dtype, comm: Communicator) -> PreTrainedModel:
    """A rank's part of a model, patched; no more than that is ever in memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype).eval()
    tp_runtime.patch(model, comm)
    device = comm.device
    model.to_empty(device=device)
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.data.normal_(0, weight.shape[-1] ** -0.5) if weight.dim() > 1 else weight.data.fill_(1)
    for module in model.modules():
        if isinstance(module, RotaryEmbedding):  # its frequencies are computed
            with torch.device(device):
                vars(module.rotary_emb).update(vars(type(module.rotary_emb)(model.config)))
        elif isinstance(module, VocabParallelEmbedding):
            module.zero_other_rows()
    return model


@torch.inference_mode()
def forced_logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, S, V] in float32 of PROMPT_TOKENS tokens at once, then token by token with a cache."""
    cache = DynamicCache(config=model.config)
    parts = [ids[:, :PROMPT_TOKENS], *ids[:, PROMPT_TOKENS:].split(1, dim=1)]
    return torch.cat([model(part, past_key_values=cache, use_cache=True).logits.float() for part in parts], dim=1)


def greedy(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=STEPS, do_sample=False)[:, ids.shape[1] :]


def right(options: Options, device: str = "cuda", cases=RIGHT) -> Iterator[Row]:
    """Logits as exact as Hugging Face's, greedy tokens, and logits under torch.compile(fullgraph=True)."""
    for name, dtype in cases:
        config = CONFIGS[name]
        needed = 7 * parameter_count(config)  # bytes: the model, its copy in float32, a layer
        if needed > free_bytes(device):
            yield {"what": f"{name}, {dtype}: left out, it needs {needed / 1e9:.0f} GB of free memory"}
            continue
        yield from _compare(name, random_model(config, getattr(torch, dtype), device), device)
        release()


def _compare(name: str, model: PreTrainedModel, device: str) -> Iterator[Row]:
    dtype = str(model.dtype).removeprefix("torch.")
    what, is_float32 = f"{name}, {dtype}", dtype == "float32"
    ids = torch.randint(1, model.config.vocab_size, (2, PROMPT_TOKENS + STEPS), device=device)
    theirs, their_tokens = forced_logits(model, ids), greedy(model, ids[:, :PROMPT_TOKENS])
    # A copy: on the way back `to` would round the frequencies of the rotary embedding as well.
    want = forced_logits(copy.deepcopy(model).to(torch.float64 if is_float32 else torch.float32), ids)
    release()

    tp_runtime.patch(model, NullCommunicator(0, 1, device))
    yield {"what": f"{what}: logits", **_judged(want, forced_logits(model, ids), theirs)}

    tokens = {"generate()": greedy(model, ids[:, :PROMPT_TOKENS]), "engine": _engine_tokens(model, ids)}
    for way, ours in tokens.items():
        equal = (ours == their_tokens).float().mean().item()
        # In half precision two logits may be equal up to rounding: how many tokens are equal is said, not judged.
        verdict = {"is_ok": equal == 1} if is_float32 else {}
        yield {"what": f"{what}: greedy tokens, {way}", "tokens_equal": equal, **verdict}

    if (name, dtype) in COMPILED:
        compiled = torch.compile(model, fullgraph=True)
        with torch.inference_mode():
            ours = compiled(ids, use_cache=False).logits.float()
        yield {"what": f"{what}: logits, torch.compile(fullgraph=True)", **_judged(want, ours, theirs)}
        torch.compiler.reset()


def _judged(want: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> dict:
    """Judged by RMS: after so many layers the largest of the errors is chance, on both sides."""
    error = against(want, ours, theirs)
    return {**error, "is_ok": error["rms_ratio"] is not None and error["rms_ratio"] <= MOST_OVER_TORCH}


def _engine_tokens(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    engine = Engine(model, None, model.config.to_dict(), {})
    options = GenerationOptions(max_new_tokens=STEPS, temperature=0, eos_token_id=())
    completions, _ = engine.generate([""] * len(ids), ids[:, :PROMPT_TOKENS].tolist(), options)
    return torch.tensor([completion.tokens for completion in completions], device=ids.device)


def decode_steps(options: Options, device: str = "cuda", steps=DECODE_STEPS, context: int = CONTEXT) -> Iterator[Row]:
    """Milliseconds a step through our engine; at tp 1 dense also Hugging Face's model, which is then patched."""
    dtype = torch.bfloat16
    for name, tp_size in dict.fromkeys((step.model, step.tp_size) for step in steps):
        config = CONFIGS[name]
        needed = 2.5 * parameter_count(config) / tp_size
        if needed > free_bytes(device):
            yield {"what": f"{name} tp{tp_size}: left out, it needs {needed / 1e9:.0f} GB of free memory"}
            continue
        of_model = [step for step in steps if (step.model, step.tp_size) == (name, tp_size)]
        theirs: dict[int, list[float]] = {}
        if tp_size == 1 and "num_local_experts" not in config:
            model = random_model(config, dtype, device)
            theirs = {step.batch: _their_steps_ms(model, step.batch, context, device) for step in of_model}
            tp_runtime.patch(model, NullCommunicator(0, 1, device))
        else:
            model = random_rank(config, dtype, NullCommunicator(0, tp_size, device))
        for step in of_model:
            yield _step_row(step, model, theirs.get(step.batch), context, device)
        del model
        release()


def _step_row(step: Step, model: PreTrainedModel, theirs: list[float] | None, context: int, device: str) -> Row:
    engine = Engine(model, None, model.config.to_dict(), {})
    options = GenerationOptions(max_new_tokens=NEW_TOKENS, temperature=0, eos_token_id=())
    prompts = _prompts(model, step.batch, context).tolist()
    ours = []
    for _ in range(REPEATS + 1):  # the first is a warm-up
        timing = engine.generate([""] * step.batch, prompts, options)[1]
        ours.append(timing.decode_s / timing.decode_steps * 1e3)
    gpu = find_device(torch.cuda.get_device_name()) if device == "cuda" else None
    top_k = getattr(model.config, "num_experts_per_tok", 0)
    floor = gpu and decode_floor_ms(patch_of(model).plan, gpu, step.batch, context + NEW_TOKENS / 2, top_k)
    return {
        "what": f"{step.model} tp{step.tp_size}{', one rank without its peers' if step.tp_size > 1 else ''}",
        "batch": step.batch, "context": context, "ours_ms": spread(ours[1:]), "theirs_ms": theirs and spread(theirs),
        "floor_ms": floor, "target_ms": step.target_ms, "published": step.published,
    }  # fmt: skip


def _prompts(model: PreTrainedModel, batch: int, context: int) -> torch.Tensor:
    return torch.randint(1, model.config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def _their_steps_ms(model: PreTrainedModel, batch: int, context: int, device: str) -> list[float]:
    """Hugging Face's model in a plain greedy loop, milliseconds a step, one value a repeat."""
    times = []
    for _ in range(REPEATS + 1):
        cache = DynamicCache(config=model.config)
        logits = model(_prompts(model, batch, context).to(device), past_key_values=cache, logits_to_keep=1).logits
        tokens = logits[:, -1].argmax(-1, keepdim=True)
        tokens.tolist()
        started = time.perf_counter()
        for _ in range(NEW_TOKENS - 1):
            tokens = model(tokens, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
            tokens.tolist()  # a step ends when its tokens are known
        times.append((time.perf_counter() - started) / (NEW_TOKENS - 1) * 1e3)
    return times[1:]


def parameter_count(config: dict) -> int:
    """Weights of the matrices, experts and tables."""
    hidden, layers, wide = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    experts = config.get("num_local_experts", 1)
    return layers * hidden * (2 * hidden + 2 * kv + 3 * experts * wide) + 2 * config["vocab_size"] * hidden


def release() -> None:
    """Gives memory that nothing refers to back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

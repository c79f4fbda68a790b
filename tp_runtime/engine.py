"""Prefill, decode, and `LLM`, which starts its own ranks.

    prefill   all prompts at once, left-padded               -> first token of each
    decode    one token of each sequence a step, until all   -> one token of each
              have ended

Every rank runs the same loop on the same tokens: `Sampler` gives all ranks the same one, and whether a sequence has
ended follows from its tokens alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .cache import KVCache
from .completion import Completion
from .config import GenerationOptions
from .patching import patch_of
from .preflight import check_prompt_tokens
from .sampling import Sampler
from .text import TextStream

# Values of generation_config.json that change which tokens come out, and that this engine does not know.
_UNSUPPORTED = {
    "num_beams": 1, "num_beam_groups": 1, "penalty_alpha": None, "min_p": None, "typical_p": 1.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None, "suppress_tokens": None, "begin_suppress_tokens": None, "forced_bos_token_id": None,
    "sequence_bias": None, "min_length": 0, "min_new_tokens": None, "guidance_scale": None,
}  # fmt: skip


@dataclass
class Timing:
    """Seconds of one `generate` call, as this rank's host sees them."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    prompt_tokens: int = 0
    new_tokens: int = 0
    decode_steps: int = 0


@dataclass
class _Sequence:
    ids: list[int]
    stream: TextStream | None
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""


def resolve_options(options: GenerationOptions, checkpoint_defaults: Mapping, config: Mapping) -> dict:
    """The sampling values in force: the caller's, else generation_config.json's, else Hugging Face's.

    Returns:
        temperature (0: greedy), top_k, top_p, repetition_penalty, eos_token_id (a tuple), pad_token_id.

    Raises:
        ValueError: generation_config.json asks for what this engine cannot do.
    """
    for name, neutral in _UNSUPPORTED.items():
        if checkpoint_defaults.get(name, neutral) not in (neutral, None):
            raise ValueError(
                f"generation_config.json sets {name}={checkpoint_defaults[name]!r}, which this engine does not do; "
                "patch(model) and Hugging Face's model.generate() do"
            )

    def value(name: str, default):
        own = getattr(options, name)
        return next((v for v in (own, checkpoint_defaults.get(name)) if v is not None), default)

    asked = options.temperature is not None or options.top_k is not None or options.top_p is not None
    do_sample = (
        options.do_sample if options.do_sample is not None else asked or checkpoint_defaults.get("do_sample", False)
    )
    eos = value("eos_token_id", config.get("eos_token_id"))
    eos = () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    pad = checkpoint_defaults.get("pad_token_id", config.get("pad_token_id"))
    return {
        "temperature": value("temperature", 1.0) if do_sample else 0.0,
        "top_k": value("top_k", 50),
        "top_p": value("top_p", 1.0),
        "repetition_penalty": value("repetition_penalty", 1.0),
        "eos_token_id": eos,
        "pad_token_id": pad if isinstance(pad, int) and pad >= 0 else (eos[0] if eos else 0),
    }


class Engine:
    """Generates with a patched model. Every rank builds one and makes the same calls.

    Args:
        model: from `load` or `patch`.
        tokenizer: Hugging Face's; needed where text is wanted back.
        config: the model's config.json.
        generation_config: generation_config.json as a dict.
    """

    def __init__(self, model, tokenizer, config: Mapping, generation_config: Mapping):
        self.model, self.tokenizer = model, tokenizer
        self.config, self.generation_config = config, generation_config
        self.comm = patch_of(model).comm

    def generate(
        self,
        prompts: Sequence[str],
        prompt_ids: Sequence[Sequence[int]],
        options: GenerationOptions,
        on_text: Callable[[int, str, bool], None] | None = None,
    ) -> tuple[list[Completion], Timing]:
        """
        Args:
            prompts: as the caller wrote them.
            prompt_ids: their tokens; lengths may differ.
            on_text: called with (index of the prompt, new text, whether it is the last) as text becomes certain.

        Returns:
            One completion a prompt, the same on every rank; and this rank's timing.

        Raises:
            ValueError: a prompt that is empty or too long for the model; options that the engine cannot honour.
        """
        if not prompts:
            return [], Timing()
        for ids in prompt_ids:
            check_prompt_tokens(len(ids), self.config, options.max_new_tokens)
        values = resolve_options(options, self.generation_config, self.config)
        sampler = Sampler(
            self.comm,
            self.model.lm_head.lengths,
            seed=options.seed,
            **{k: values[k] for k in ("temperature", "top_k", "top_p", "repetition_penalty")},
        )
        wants_text = on_text is not None or options.stop
        sequences = [
            _Sequence(list(ids), TextStream(self.tokenizer, options.stop) if wants_text else None) for ids in prompt_ids
        ]
        timing = self._run(sequences, sampler, options.max_new_tokens, values, on_text)
        return [self._completion(p, s, values["eos_token_id"]) for p, s in zip(prompts, sequences, strict=True)], timing

    @torch.inference_mode()
    def _run(self, sequences: list[_Sequence], sampler: Sampler, max_new_tokens: int, values: dict, on_text) -> Timing:
        beat, device = self.comm.heartbeat.beat, self.comm.device
        longest = max(len(s.ids) for s in sequences)
        batch = torch.tensor(
            [[values["pad_token_id"]] * (longest - len(s.ids)) + s.ids for s in sequences], device=device
        )
        mask = positions = None
        if any(len(s.ids) < longest for s in sequences):
            mask = torch.tensor([[0] * (longest - len(s.ids)) + [1] * len(s.ids) for s in sequences], device=device)
            positions = (mask.cumsum(-1) - 1).clamp_(min=0)
        cache = KVCache(self.model.config.num_hidden_layers, longest + max_new_tokens)
        seen = torch.where(mask == 0, -1, batch) if mask is not None else batch
        timing = Timing(prompt_tokens=sum(len(s.ids) for s in sequences))

        beat("prefill")
        started = time.perf_counter()
        for step in range(max_new_tokens):
            hidden = self.model.model(
                input_ids=batch, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1]
            tokens = sampler.next_tokens(self.model.lm_head.logits_shard_v(hidden), seen)
            now = time.perf_counter()
            if step == 0:
                timing.prefill_s, started = now - started, now
                beat("decode", 1)
            else:
                timing.decode_s, timing.decode_steps = now - started, step
                beat(step=step + 1)
            for index, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
                if not sequence.finish_reason:
                    timing.new_tokens += 1
                    self._append(index, sequence, token, values["eos_token_id"], step + 1 == max_new_tokens, on_text)
            if all(s.finish_reason for s in sequences):
                break
            batch = torch.tensor(tokens, device=device).unsqueeze(1)
            if sampler.repetition_penalty != 1:
                seen = torch.cat((seen, batch), dim=1)
            if mask is not None:
                mask = torch.cat((mask, mask.new_ones(len(sequences), 1)), dim=1)
                positions = mask.sum(-1, keepdim=True) - 1
        return timing

    def _append(
        self, index: int, sequence: _Sequence, token: int, eos: tuple[int, ...], is_last: bool, on_text
    ) -> None:
        sequence.tokens.append(token)
        if token in eos:
            sequence.finish_reason = "stop"
        elif sequence.stream is not None:
            sequence.stream.push(token)
        if sequence.stream is not None and sequence.stream.is_stopped:
            sequence.finish_reason = "stop"
        if is_last and not sequence.finish_reason:
            sequence.finish_reason = "length"
        if sequence.stream is not None and sequence.finish_reason:
            sequence.stream.finish()
        if on_text is not None and sequence.stream is not None:
            is_end = bool(sequence.finish_reason)
            on_text(index, sequence.stream.take(is_last=is_end), is_end)

    def _completion(self, prompt: str, sequence: _Sequence, eos: tuple[int, ...]) -> Completion:
        if sequence.stream is not None:
            text = sequence.stream.text
        else:
            ids = sequence.tokens[:-1] if sequence.tokens[-1] in eos else sequence.tokens
            text = self.tokenizer.decode(ids, skip_special_tokens=True) if self.tokenizer else ""
        return Completion(prompt, text, sequence.tokens, sequence.finish_reason)

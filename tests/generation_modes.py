"""Every way of Hugging Face's generate() that a patched model keeps: functions of the model and of an assistant."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tiny_models import prompt
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

NEW_TOKENS = 8


class Collector(BaseStreamer):
    """Keeps what a streamer is handed: the prompt, then token by token."""

    def __init__(self):
        self.pieces, self.is_ended = [], False

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.reshape(-1).clone())

    def end(self) -> None:
        self.is_ended = True


def left_padded() -> dict[str, torch.Tensor]:
    """Three prompts of 9, 6 and 2 tokens as one batch."""
    lengths = torch.tensor([[9], [6], [2]])
    attention_mask = (torch.arange(9) >= 9 - lengths).long()
    return {"input_ids": prompt(3) * attention_mask, "attention_mask": attention_mask}


def _plain(**options) -> Callable:
    def run(model: PreTrainedModel, assistant: PreTrainedModel) -> list[torch.Tensor]:
        return [model.generate(prompt(), max_new_tokens=NEW_TOKENS, **options)]

    return run


def _one(**options) -> Callable:
    def run(model: PreTrainedModel, assistant: PreTrainedModel) -> list[torch.Tensor]:
        ids = prompt(1, 3).repeat(1, 4)  # something to look up
        return [model.generate(ids, max_new_tokens=16, **options)]

    return run


def _assisted(**options) -> Callable:
    def run(model: PreTrainedModel, assistant: PreTrainedModel) -> list[torch.Tensor]:
        return [model.generate(prompt(1), assistant_model=assistant, max_new_tokens=16, **options)]

    return run


def _left_padded(model, assistant):
    return [model.generate(**left_padded(), max_new_tokens=NEW_TOKENS, do_sample=False)]


def _everything(model, assistant):
    wanted = {f"output_{name}": True for name in ("scores", "logits", "hidden_states")}
    out = model.generate(prompt(), max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, **wanted)
    return [out.sequences, *out.scores, *out.logits, *(state for step in out.hidden_states for state in step)]


def _from_embeddings(model, assistant):
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(prompt())
    return [model.generate(inputs_embeds=embeddings, max_new_tokens=NEW_TOKENS, do_sample=False)]


def _continued(model, assistant):
    """Two calls with one cache."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    first = model.generate(prompt(), max_new_tokens=3, do_sample=False, past_key_values=cache)
    more = torch.cat((first, prompt(2, 2, seed=5)), dim=1)
    return [first, model.generate(more, max_new_tokens=3, do_sample=False, past_key_values=cache)]


def _eos(model, assistant):
    """Each sequence ends at a token of its own, the second one later."""
    free = model.generate(prompt(), max_new_tokens=NEW_TOKENS, do_sample=False)
    ends = [free[0, -6].item(), free[1, -3].item()]
    return [model.generate(prompt(), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=ends)]


def _own_criterion(model, assistant):
    def is_done(ids, scores, **kwargs):
        return torch.full((len(ids),), ids.shape[1] >= 12)

    return [model.generate(prompt(), max_new_tokens=NEW_TOKENS, do_sample=False, stopping_criteria=[is_done])]


def _streamed(model, assistant):
    streamer = Collector()
    ids = model.generate(prompt(1), max_new_tokens=NEW_TOKENS, do_sample=False, streamer=streamer)
    assert streamer.is_ended and len(streamer.pieces) == 1 + NEW_TOKENS
    return [ids, torch.cat(streamer.pieces)]


MODES: dict[str, Callable[[PreTrainedModel, PreTrainedModel], list[torch.Tensor]]] = {
    "greedy": _plain(do_sample=False),
    "penalties": _plain(do_sample=False, repetition_penalty=1.3, no_repeat_ngram_size=2, bad_words_ids=[[7]]),
    "left-padded batch": _left_padded,
    "beam search": _plain(do_sample=False, num_beams=3, num_return_sequences=2, length_penalty=0.5),
    "everything returned": _everything,
    "inputs_embeds": _from_embeddings,
    "continued cache": _continued,
    "static cache": _plain(do_sample=False, cache_implementation="static"),
    "dynamic cache": _plain(do_sample=False, cache_implementation="dynamic"),
    "no cache": _plain(do_sample=False, use_cache=False),
    "prefill in chunks": _plain(do_sample=False, prefill_chunk_size=4),
    "static cache, in chunks": _plain(do_sample=False, prefill_chunk_size=4, cache_implementation="static"),
    "prompt lookup": _one(do_sample=False, prompt_lookup_num_tokens=3),
    "assisted": _assisted(do_sample=False),
    "eos": _eos,
    "own criterion": _own_criterion,
    "streamer": _streamed,
}
SAMPLED = {
    "sampling": _plain(do_sample=True, temperature=0.8, top_k=20, top_p=0.9),
    "several samples": _plain(do_sample=True, num_return_sequences=3),
    "beam sampling": _plain(do_sample=True, num_beams=3),
    "assisted sampling": _assisted(do_sample=True),
    "prompt lookup, sampled": _one(do_sample=True, prompt_lookup_num_tokens=3),
}

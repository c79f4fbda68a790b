"""Mistral 7B and its successors, dense: Llama without biases, with a sliding window."""

from .adapter import ATTENTION, EMBEDDING, HEAD, Adapter, gated_ffn

ADAPTER = Adapter(
    model_type="mistral",
    weights=(EMBEDDING, *ATTENTION, *gated_ffn(), *HEAD),
    defaults={"num_key_value_heads": 8},
    flags={"windowed": True},
)

"""Mistral 7B and its successors, dense: Llama without biases, with a sliding window."""

from .adapter import ATTENTION, EMBEDDING, GATED_FFN, HEAD, Adapter

ADAPTER = Adapter(
    model_type="mistral",
    weights=(EMBEDDING, *ATTENTION, *GATED_FFN, *HEAD),
    defaults={"num_key_value_heads": 8},
)

"""Qwen 2 and 2.5, dense: biases on q, k and v alone."""

from .adapter import ATTENTION, EMBEDDING, HEAD, Adapter, gated_ffn

ADAPTER = Adapter(
    model_type="qwen2",
    weights=(EMBEDDING, *ATTENTION, *gated_ffn(), *HEAD),
    defaults={"num_key_value_heads": 32},
    flags={"qkv_bias": True, "windowed": True},
)

"""Qwen 3, dense: q and k are normalised head by head."""

from .adapter import ATTENTION, EMBEDDING, HEAD, Adapter, gated_ffn

ADAPTER = Adapter(
    model_type="qwen3",
    weights=(EMBEDDING, *ATTENTION, *gated_ffn(), *HEAD),
    defaults={"num_key_value_heads": 32, "head_dim": 128},
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias", "qk_norm": True, "windowed": True},
)

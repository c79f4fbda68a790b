"""Granite 3, dense: Llama whose embedding, attention, residuals and logits are scaled."""

from .adapter import ATTENTION, EMBEDDING, HEAD, Adapter, gated_ffn

ADAPTER = Adapter(
    model_type="granite",
    weights=(EMBEDDING, *ATTENTION, *gated_ffn(), *HEAD),
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": "mlp_bias", "scaled_embedding": True},
    residual_multiplier="residual_multiplier",
    logits_scaling="logits_scaling",
)

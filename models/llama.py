"""Llama 1 to 3.x, dense, and the many checkpoints that call themselves `llama`."""

from .adapter import ATTENTION, EMBEDDING, HEAD, Adapter, gated_ffn

ADAPTER = Adapter(
    model_type="llama",
    weights=(EMBEDDING, *ATTENTION, *gated_ffn(), *HEAD),
    # One config value gives all four attention projections their biases.
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": "mlp_bias"},
)

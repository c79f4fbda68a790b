"""SmolLM 3, dense: Llama of which every fourth layer knows no positions."""

from .adapter import ATTENTION, EMBEDDING, HEAD, Adapter, gated_ffn

ADAPTER = Adapter(
    model_type="smollm3",
    weights=(EMBEDDING, *ATTENTION, *gated_ffn(), *HEAD),
    defaults={"num_key_value_heads": 4, "tie_word_embeddings": True},
    flags={
        "qkv_bias": "attention_bias",
        "o_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
        "windowed": True,
        "no_rope_layers": True,
    },
)

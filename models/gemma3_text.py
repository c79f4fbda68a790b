"""Gemma 3, its text model: as Gemma 2, with norms of q and k, and with angles of their own in local layers.

transformers' Gemma 3 does not cap attention scores, whatever the config says.
"""

from .adapter import ATTENTION, EMBEDDING, HEAD, NORMS_AROUND, Adapter, gated_ffn, norm

ADAPTER = Adapter(
    model_type="gemma3_text",
    weights=(
        *(EMBEDDING, *ATTENTION, norm("pre_feedforward_layernorm"), *gated_ffn(), norm("post_feedforward_layernorm")),
        *HEAD,
    ),
    defaults={"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096},
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias", "qk_norm": True, "windowed": True},
    activation="hidden_activation",
    norms=NORMS_AROUND,
    norm="1 + weight",
    logits_softcap="final_logit_softcapping",
    module="gemma3",
)

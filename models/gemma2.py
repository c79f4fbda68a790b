"""Gemma 2, dense: norms before and behind each block, scores and logits capped, a window in every other layer."""

from .adapter import ATTENTION, EMBEDDING, HEAD, NORMS_AROUND, Adapter, gated_ffn, norm

ADAPTER = Adapter(
    model_type="gemma2",
    weights=(
        *(EMBEDDING, *ATTENTION, norm("pre_feedforward_layernorm"), *gated_ffn(), norm("post_feedforward_layernorm")),
        *HEAD,
    ),
    defaults={"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096},
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias", "windowed": True},
    activation="hidden_activation",
    norms=NORMS_AROUND,
    norm="1 + weight",
    attention_softcap="attn_logit_softcapping",
    logits_softcap="final_logit_softcapping",
)

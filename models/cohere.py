"""Command R, dense: attention and the feed-forward block side by side, layer norms without bias, pairs that turn."""

from .adapter import EMBEDDING, HEAD, PROJECTIONS, Adapter, gated_ffn, norm

ADAPTER = Adapter(
    model_type="cohere",
    weights=(EMBEDDING, norm("input_layernorm"), *PROJECTIONS, *gated_ffn(), *HEAD),
    defaults={"tie_word_embeddings": True},
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias", "parallel": True},
    rope="float32 pairs",
    norms=("input_layernorm", "", "", ""),
    norm="centered weight",
    logits_scale="logit_scale",
    refused=("use_qk_norm",),  # weights of their own for each head
)

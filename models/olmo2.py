"""OLMo 2, dense: blocks are normalised behind, not before; q and k over all heads at once; angles stay float32."""

from .adapter import EMBEDDING, HEAD, PROJECTIONS, Adapter, gated_ffn, norm

ADAPTER = Adapter(
    model_type="olmo2",
    weights=(
        *(EMBEDDING, *PROJECTIONS, norm("post_attention_layernorm")),
        *(*gated_ffn(), norm("post_feedforward_layernorm"), *HEAD),
    ),
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias", "wide_qk_norm": True},
    rope="float32 halves",
    norms=("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
    norm="float32 weight",
)

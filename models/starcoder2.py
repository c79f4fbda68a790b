"""StarCoder 2, dense: layer norms, biases everywhere, a feed-forward block without a gate."""

from .adapter import EMBEDDING, LM_HEAD, PROJECTIONS, Adapter, Weight, norm

FFN = (
    Weight("model.layers.*.mlp.c_fc.weight", "colwise", ("ffn", "hidden"), layers="dense"),
    Weight("model.layers.*.mlp.c_fc.bias", "colwise", ("ffn",), when="mlp_bias", layers="dense"),
    Weight("model.layers.*.mlp.c_proj.weight", "rowwise", ("hidden", "ffn"), layers="dense"),
    Weight("model.layers.*.mlp.c_proj.bias", "replicate", ("hidden",), when="mlp_bias", layers="dense"),
)

ADAPTER = Adapter(
    model_type="starcoder2",
    weights=(
        *(EMBEDDING, norm("input_layernorm"), norm("input_layernorm", "bias"), *PROJECTIONS),
        *(norm("post_attention_layernorm"), norm("post_attention_layernorm", "bias"), *FFN),
        Weight("model.norm.weight", "replicate", ("hidden",)),
        Weight("model.norm.bias", "replicate", ("hidden",)),
        LM_HEAD,
    ),
    defaults={"num_key_value_heads": 2, "use_bias": True, "tie_word_embeddings": True},
    flags={"qkv_bias": "use_bias", "o_bias": "use_bias", "mlp_bias": "use_bias", "windowed": True},
)

"""Llama 4, its text model: packed experts for x @ w, their inputs weighted, and a shared expert.

Most layers attend within chunks; the others know no positions and scale their queries instead.
"""

from .adapter import ATTENTION, EMBEDDING, HEAD, Adapter, Routing, experts, gated_ffn

ADAPTER = Adapter(
    model_type="llama4_text",
    weights=(
        *(EMBEDDING, *ATTENTION, *gated_ffn("feed_forward"), *experts("feed_forward", "router", is_transposed=True)),
        *(*gated_ffn("feed_forward.shared_expert", "shared_ffn", "sparse"), *HEAD),
    ),
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 16384,
    },
    flags={
        "qkv_bias": "attention_bias",
        "o_bias": "attention_bias",
        "no_rope_layers": True,
        "untold_positions": True,
    },
    widths={"ffn": "intermediate_size_mlp"},
    feed_forward="feed_forward",
    routing=Routing("sigmoid", weigh_input=True, router="router", shared="shared_expert", returns_logits=True),
    sparse_step="interleave_moe_layer_step",
    dense_layers="",
    sparse_layers_list="moe_layers",
    rope="complex pairs",
    layer_types=("full_attention", "chunked_attention"),
    prefix="language_model.",
    module="llama4",
)

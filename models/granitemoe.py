"""Granite 3 mixture of experts: every layer has experts; embedding, attention, residuals and logits are scaled."""

from .adapter import ATTENTION, EMBEDDING, HEAD, Adapter, Routing, experts

ADAPTER = Adapter(
    model_type="granitemoe",
    weights=(EMBEDDING, *ATTENTION, *experts("block_sparse_moe", "router"), *HEAD),
    defaults={"num_local_experts": 8, "num_experts_per_tok": 2},
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias", "scaled_embedding": True},
    feed_forward="block_sparse_moe",
    routing=Routing("softmax_top_k", router="router"),
    residual_multiplier="residual_multiplier",
    logits_scaling="logits_scaling",
    # The published checkpoints store the experts packed, as here, under other names.
    on_disk={
        "block_sparse_moe.router.weight": ("block_sparse_moe.router.layer.weight",),
        "block_sparse_moe.experts.gate_up_proj": ("block_sparse_moe.input_linear.weight",),
        "block_sparse_moe.experts.down_proj": ("block_sparse_moe.output_linear.weight",),
    },
)

"""Qwen 3 mixture of experts: Qwen 3 attention; every `decoder_sparse_step`-th layer has experts."""

from .adapter import ATTENTION, EMBEDDING, HEAD, ONE_BY_ONE, Adapter, experts, gated_ffn

ADAPTER = Adapter(
    model_type="qwen3_moe",
    weights=(EMBEDDING, *ATTENTION, *gated_ffn(), *experts(), *HEAD),
    defaults={
        "num_key_value_heads": 4,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    flags={
        "qkv_bias": "attention_bias",
        "o_bias": "attention_bias",
        "qk_norm": True,
        "renormalised": "norm_topk_prob",
        "windowed": True,
    },
    widths={"expert_ffn": "moe_intermediate_size"},
    on_disk=ONE_BY_ONE,
)

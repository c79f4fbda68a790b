"""Qwen 3 mixture of experts: Qwen 3 attention; every `decoder_sparse_step`-th layer has experts."""

from .adapter import ATTENTION, EMBEDDING, EXPERTS, GATED_FFN, HEAD, Adapter

ADAPTER = Adapter(
    model_type="qwen3_moe",
    weights=(EMBEDDING, *ATTENTION, *GATED_FFN, *EXPERTS, *HEAD),
    defaults={
        "num_key_value_heads": 4,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias", "qk_norm": True},
    expert_width="moe_intermediate_size",
    on_disk={
        "mlp.experts.gate_up_proj": ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"),
        "mlp.experts.down_proj": ("mlp.experts.{e}.down_proj.weight",),
    },
)

"""Qwen 1.5 and 2 mixture of experts: beside its routed experts a sparse layer has a shared one with a gate."""

from .adapter import ATTENTION, EMBEDDING, HEAD, ONE_BY_ONE, Adapter, Routing, Weight, experts, gated_ffn

SHARED_GATE = Weight("model.layers.*.mlp.shared_expert_gate.weight", "replicate", ("one", "hidden"), layers="sparse")

ADAPTER = Adapter(
    model_type="qwen2_moe",
    weights=(
        *(EMBEDDING, *ATTENTION, *gated_ffn(), *experts()),
        *(*gated_ffn("mlp.shared_expert", "shared_ffn", "sparse"), SHARED_GATE, *HEAD),
    ),
    defaults={
        "num_key_value_heads": 16,
        "num_local_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "qkv_bias": True,
    },
    flags={"qkv_bias": "qkv_bias", "renormalised": "norm_topk_prob"},
    widths={"expert_ffn": "moe_intermediate_size", "shared_ffn": "shared_expert_intermediate_size"},
    routing=Routing(shared="shared_expert", shared_gate="shared_expert_gate"),
    on_disk=ONE_BY_ONE,
)

"""OLMoE: every layer has experts; q and k are normalised over all heads at once, and may be clipped."""

from .adapter import ATTENTION, EMBEDDING, HEAD, ONE_BY_ONE, Adapter, experts

ADAPTER = Adapter(
    model_type="olmoe",
    weights=(EMBEDDING, *ATTENTION, *experts(), *HEAD),
    defaults={"num_local_experts": 64, "num_experts_per_tok": 8},
    flags={
        "qkv_bias": "attention_bias",
        "o_bias": "attention_bias",
        "wide_qk_norm": True,
        "renormalised": "norm_topk_prob",
    },
    on_disk=ONE_BY_ONE,
)

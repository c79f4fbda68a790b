"""Mixtral 8x7B and 8x22B: every layer has experts."""

from .adapter import ATTENTION, EMBEDDING, HEAD, Adapter, Routing, experts

ADAPTER = Adapter(
    model_type="mixtral",
    weights=(EMBEDDING, *ATTENTION, *experts(), *HEAD),
    defaults={"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    flags={"renormalised": True, "windowed": True},
    routing=Routing(is_rounded=False),
    # The published checkpoints: w1 is the gate, w3 is up, w2 is down.
    on_disk={
        "mlp.gate.weight": ("block_sparse_moe.gate.weight",),
        "mlp.experts.gate_up_proj": (
            "block_sparse_moe.experts.{e}.w1.weight",
            "block_sparse_moe.experts.{e}.w3.weight",
        ),
        "mlp.experts.down_proj": ("block_sparse_moe.experts.{e}.w2.weight",),
    },
)

"""Phi 3 and 4, dense: q, k and v are one weight, gate and up another; positions may turn a part of each head alone."""

from .adapter import EMBEDDING, HEAD, Adapter, Weight, norm

ADAPTER = Adapter(
    model_type="phi3",
    weights=(
        *(EMBEDDING, norm("input_layernorm")),
        Weight("model.layers.*.self_attn.qkv_proj.weight", "packed_colwise", ("q+kv+kv", "hidden")),
        Weight("model.layers.*.self_attn.o_proj.weight", "rowwise", ("hidden", "q")),
        norm("post_attention_layernorm"),
        Weight("model.layers.*.mlp.gate_up_proj.weight", "packed_colwise", ("ffn+ffn", "hidden"), layers="dense"),
        Weight("model.layers.*.mlp.down_proj.weight", "rowwise", ("hidden", "ffn"), layers="dense"),
        *HEAD,
    ),
    defaults={"original_max_position_embeddings": 4096},
    flags={"windowed": True},
    rope="partial halves",
    rope_types=("default", "longrope"),
)

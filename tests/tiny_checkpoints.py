"""Tiny checkpoints, written by hand with the standard library: configs, tensor names, safetensors files, an index.

Nothing here comes from the tables of `models/`: what is tested with these is not compared with itself.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I8": 1, "F64": 8}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SHARD_1, SHARD_2 = SHARDS
INDEX = "model.safetensors.index.json"
Q_PROJ, K_PROJ = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"  # both in shard 2

CONFIG = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
LLAMA = {**CONFIG, "model_type": "llama"}
MIXTRAL = {**CONFIG, "model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}
QWEN3_MOE = {**CONFIG, "model_type": "qwen3_moe", "num_experts": 3, "moe_intermediate_size": 10, "head_dim": 8}
QWEN3_MOE.update(mlp_only_layers=[0], num_experts_per_tok=2)
QWEN2_MOE = {**QWEN3_MOE, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 14}
OLMOE = {**CONFIG, "model_type": "olmoe", "num_experts": 3, "num_experts_per_tok": 2, "clip_qkv": None}
GRANITEMOE = {**MIXTRAL, "model_type": "granitemoe", "logits_scaling": 6.0, "attention_multiplier": 0.015625}
LLAMA4 = {**MIXTRAL, "model_type": "llama4_text", "intermediate_size_mlp": 26, "moe_layers": [1], "head_dim": 8}
LLAMA4.update(num_experts_per_tok=1, no_rope_layers=[1, 0], attention_chunk_size=32, attn_scale=0.1)


def shapes_of(config: dict, experts: str = "published") -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes; experts as `published` checkpoints of the family store them (one by one, or packed under
    names of their own), `packed` as in the live model, or `transposed`, with the last two dimensions swapped."""
    hidden, family = config["hidden_size"], config["model_type"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}

    def gated_ffn(path: str, width: int) -> None:
        shapes[path + "gate_proj.weight"] = shapes[path + "up_proj.weight"] = (width, hidden)
        shapes[path + "down_proj.weight"] = (hidden, width)

    for i in range(config["num_hidden_layers"]):
        layer, attention = f"model.layers.{i}.", f"model.layers.{i}.self_attn."
        mlp = layer + {"granitemoe": "block_sparse_moe.", "llama4_text": "feed_forward."}.get(family, "mlp.")
        shapes[layer + "input_layernorm.weight"] = shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
        for name, rows in ("q_proj", q), ("k_proj", kv), ("v_proj", kv):
            shapes[f"{attention}{name}.weight"] = (rows, hidden)
            if family == "qwen2_moe":
                shapes[f"{attention}{name}.bias"] = (rows,)
        shapes[attention + "o_proj.weight"] = (hidden, q)
        if family == "qwen3_moe":
            shapes[attention + "q_norm.weight"] = shapes[attention + "k_norm.weight"] = (head_dim,)
        elif family == "olmoe":
            shapes[attention + "q_norm.weight"], shapes[attention + "k_norm.weight"] = (q,), (kv,)
        if family == "llama" or i in config.get("mlp_only_layers", ()) or i not in config.get("moe_layers", [i]):
            gated_ffn(mlp, config["intermediate_size_mlp" if family == "llama4_text" else "intermediate_size"])
            continue
        num_experts = config["num_local_experts"] if "num_local_experts" in config else config["num_experts"]
        width = config["moe_intermediate_size" if family.startswith("qwen") else "intermediate_size"]
        _add_experts(shapes, family, layer, mlp, num_experts, width, hidden, experts)
        if family == "qwen2_moe":
            gated_ffn(mlp + "shared_expert.", config["shared_expert_intermediate_size"])
            shapes[mlp + "shared_expert_gate.weight"] = (1, hidden)
        elif family == "llama4_text":
            gated_ffn(mlp + "shared_expert.", config["intermediate_size"])
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _add_experts(
    shapes: dict, family: str, layer: str, mlp: str, num_experts: int, width: int, hidden: int, experts: str
) -> None:
    """The router and the experts of a layer."""
    if experts == "published" and family in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"):
        is_mixtral = family == "mixtral"
        old = layer + "block_sparse_moe." if is_mixtral else mlp
        shapes[old + "gate.weight"] = (num_experts, hidden)
        for e in range(num_experts):
            for part in ("w1", "w3") if is_mixtral else ("gate_proj", "up_proj"):
                shapes[f"{old}experts.{e}.{part}.weight"] = (width, hidden)
            shapes[f"{old}experts.{e}.{'w2' if is_mixtral else 'down_proj'}.weight"] = (hidden, width)
        return
    router, gate_up, down = "gate.weight", "experts.gate_up_proj", "experts.down_proj"
    if family in ("granitemoe", "llama4_text"):
        router = "router.weight"
    if family == "granitemoe" and experts == "published":
        router, gate_up, down = "router.layer.weight", "input_linear.weight", "output_linear.weight"
    shapes[mlp + router] = (num_experts, hidden)
    is_swapped = (family == "llama4_text") != (experts == "transposed")
    for name, shape in (gate_up, (2 * width, hidden)), (down, (hidden, width)):
        shapes[mlp + name] = (num_experts, *shape[:: -1 if is_swapped else 1])


def header_of(shapes: dict[str, tuple[int, ...]], dtype: str = "BF16", /, **others: str) -> dict:
    """A safetensors header of tensors that lie back to back, all of one dtype but for those of `others`."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        word = others.get(name, dtype)
        start, end = end, end + math.prod(shape) * ITEM_BYTES[word]
        header[name] = {"dtype": word, "shape": list(shape), "data_offsets": [start, end]}
    return header


def write_file(file: Path, header: dict, num_bytes: int | None = None) -> None:
    """A safetensors file with this header and zeros, or as many of them as `num_bytes` says."""
    text = json.dumps(header).encode()
    if num_bytes is None:
        num_bytes = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + num_bytes)


def write_checkpoint(folder: Path, config: dict, shapes: dict | None = None, dtype: str = "BF16", sharded=True) -> Path:
    """A checkpoint in two shards with an index, or in one file. Returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = shapes or shapes_of(config)
    (folder / "config.json").write_text(json.dumps(config))
    if not sharded:
        write_file(folder / "model.safetensors", header_of(shapes, dtype))
        return folder
    names = list(shapes)
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    for shard, part in zip(SHARDS, parts):
        write_file(folder / shard, header_of({name: shapes[name] for name in part}, dtype))
    weight_map = {name: shard for shard, part in zip(SHARDS, parts) for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


def edit_json(file: Path, **values) -> None:
    """Set values of a JSON object; `...` deletes."""
    merged = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({key: value for key, value in merged.items() if value is not ...}))


def edit_header(file: Path, change) -> None:
    """Rewrite a safetensors header; the data keep their length."""
    content = file.read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_bytes])
    change(header)
    write_file(file, header, len(content) - 8 - header_bytes)


def edit_index(folder: Path, **places) -> None:
    """Set entries of the weight_map; `...` deletes."""
    weight_map = {**json.loads((folder / INDEX).read_text())["weight_map"], **places}
    edit_json(folder / INDEX, weight_map={name: place for name, place in weight_map.items() if place is not ...})

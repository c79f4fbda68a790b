"""The decoder block that the layers are assembled into: attention, gated FFN, rotary embedding.

One rank's view of a block, for tokens x [B, S, H]:

    q, k, v = qkv_proj(norm(x))            this rank's heads
    q, k    = rope(q, k)                   in one pass over both
    x       = x + o_proj(attention(q, k, v))    all-reduce
    x       = x + down_proj(act(gate) * up)     all-reduce
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .layers import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from .plan import HeadPlan

_HF_SDPA = ALL_ATTENTION_FUNCTIONS["sdpa"]

# Hugging Face's name of an activation -> that of `gated_gemm`.
FUSED_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


class RotaryEmbedding(nn.Module):
    """cos and sin of Hugging Face's rotary embedding, in the form that `ParallelAttention` multiplies with.

    rotate_half(x) * sin == roll(x, D / 2) * signed_sin, where signed_sin is sin with its first half negated: computed
    once a forward pass, not once a layer.

    Returns:
        cos and signed sin, [B, 1, S, D] each.
    """

    def __init__(self, rotary_emb: nn.Module):
        super().__init__()
        self.rotary_emb = rotary_emb

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.rotary_emb(x, position_ids=position_ids)
        low, high = sin.chunk(2, dim=-1)
        return cos.unsqueeze(1), torch.cat((-low, high), dim=-1).unsqueeze(1)


class ParallelAttention(nn.Module):
    """Attention over a rank's query heads and the key/value heads that they read. Returns the reduced output.

    Whatever attention function the model is set to is used (`set_attn_implementation`). Where the heads do not divide,
    a rank's query heads may be spread unevenly over its key/value heads; then each query head gets its own copy of the
    one that it reads, after the cache, so that the cache still holds each head once.
    """

    def __init__(self, attention: nn.Module, heads: HeadPlan, qkv_proj: QKVParallelLinear, o_proj: RowParallelLinear):
        super().__init__()
        self.config, self.layer_idx = attention.config, attention.layer_idx
        self.head_dim, self.scaling, self.is_causal = attention.head_dim, attention.scaling, attention.is_causal
        self.num_heads_local, self.num_kv_heads_local = heads.num_heads, heads.num_kv_heads
        self.qkv_proj, self.o_proj = qkv_proj, o_proj
        self.sliding_window = getattr(attention, "sliding_window", getattr(self.config, "sliding_window", None))
        self._eager = sys.modules[type(attention).__module__].eager_attention_forward
        self._split_q_k = [heads.num_heads, heads.num_kv_heads]
        self._split_qk_v = [heads.num_heads + heads.num_kv_heads, heads.num_kv_heads]
        self._num_qkv_heads, self._half = sum(self._split_qk_v), self.head_dim // 2
        groups, rest = divmod(heads.num_heads, heads.num_kv_heads)
        is_even = not rest and heads.kv_of_query == tuple(i // groups for i in range(heads.num_heads))
        self.num_key_value_groups = groups if is_even else 1
        self._queries_of_kv = [] if is_even else [heads.kv_of_query.count(i) for i in range(heads.num_kv_heads)]
        self.has_qk_norm = hasattr(attention, "q_norm")
        if self.has_qk_norm:
            self.q_norm, self.k_norm = attention.q_norm, attention.k_norm

    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs
    ) -> tuple[torch.Tensor, None]:
        """
        Args:
            hidden_states: [B, S, H], whole on every rank.
            position_embeddings: what `RotaryEmbedding` returns.

        Returns:
            [B, S, H], whole on every rank; and None where Hugging Face's attention returns its weights.
        """
        batch, length, _ = hidden_states.shape
        qkv = self.qkv_proj(hidden_states).view(batch, length, self._num_qkv_heads, self.head_dim).transpose(1, 2)
        qk, v = torch.split_with_sizes(qkv, self._split_qk_v, 1)
        if self.has_qk_norm:
            q, k = torch.split_with_sizes(qk, self._split_q_k, 1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        cos, signed_sin = position_embeddings
        qk = torch.addcmul(qk * cos, qk.roll(self._half, -1), signed_sin)
        q, k = torch.split_with_sizes(qk, self._split_q_k, 1)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        if self._queries_of_kv:
            k, v = self._one_for_each_query(k), self._one_for_each_query(v)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self._eager)
        if length == 1 and attention_mask is None and attend is _HF_SDPA:
            # One token that sees every key: what Hugging Face's function comes down to, without 4 us of its questions.
            is_grouped = self.num_key_value_groups > 1
            y = F.scaled_dot_product_attention(q, k, v, scale=self.scaling, enable_gqa=is_grouped).transpose(1, 2)
        else:
            options = {"scaling": self.scaling, "dropout": 0.0, "sliding_window": self.sliding_window, **kwargs}
            y, _ = attend(self, q, k, v, attention_mask, **options)
        return self.o_proj(y.reshape(batch, length, -1)), None

    def _one_for_each_query(self, heads: torch.Tensor) -> torch.Tensor:
        """[B, H_kv, S, D] -> [B, H_q, S, D], without an index tensor, which would have to travel to the GPU."""
        parts = zip(heads.split(1, dim=1), self._queries_of_kv, strict=True)
        return torch.cat([head.expand(-1, count, -1, -1) for head, count in parts], dim=1)

    def extra_repr(self) -> str:
        heads = f"num_heads_local={self.num_heads_local}, num_kv_heads_local={self.num_kv_heads_local}"
        return f"{heads}, head_dim={self.head_dim}"


class ParallelMLP(nn.Module):
    """down_proj(act(gate) * up), gate and up in one GEMM, cut along the intermediate width.

    Args:
        act_fn: Hugging Face's activation, by the name that it has in the config, for a name without a fused kernel.
    """

    def __init__(
        self, gate_up_proj: MergedColumnParallelLinear, down_proj: RowParallelLinear, activation: str, act_fn: nn.Module
    ):
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = gate_up_proj, down_proj, act_fn
        self.activation = FUSED_ACTIVATIONS.get(activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.activation is None:
            gate, up = self.gate_up_proj(x).chunk(2, -1)
            return self.down_proj(self.act_fn(gate).mul_(up))
        return self.down_proj(self.gate_up_proj.gated(x, self.activation))

"""Attention of a rank's heads, with what families do to q and k on the way: rotary embedding, norms, scales.

    q, k, v = qkv_proj(x)                  this rank's heads
    q, k    = rope(q, k)                   in one pass over both
    y       = o_proj(attention(q, k, v))   all-reduce

Between the two projections the functions run that the model is set to (`set_attn_implementation`). On a GPU, one token
of each sequence takes `rope_decode_attention` instead, which also writes the cache, where the cache keeps its tokens in
place (ours; Hugging Face's static one) and attention is Hugging Face's plain one ("sdpa", "eager"), masks as it passes.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache import KVCache, next_room
from .kernels.mean_squares import mean_squares
from .kernels.rms_norm import AddNorm
from .kernels.rope import partners
from .kernels.rope_decode_attention import rope_decode_attention
from .layers import QKVParallelLinear, RowParallelLinear, summed
from .plan import HeadPlan, Range

_HF_SDPA = ALL_ATTENTION_FUNCTIONS["sdpa"]


def has_one_launch(qkv: torch.Tensor) -> bool:
    """Whether rope, cache and attention of one token are one launch: on a CPU torch's own functions are faster."""
    return qkv.is_cuda


def with_known_masks(model: nn.Module, forward: Callable) -> Callable:
    """`forward` of a decoder, during which our cache says whether the masks of sliding-window layers have the window.

    They have it where transformers makes them, of what the caller says of tokens, none or [B, S]. What the caller made
    himself, [B, 1, S_q, S] or one for each kind of layer, is passed on as it is, and anything may stand in it.
    """
    names = list(inspect.signature(model.forward).parameters)

    def forward_with_known_masks(*args, **kwargs):
        kwargs.update(zip(names, args))
        cache, mask, config = kwargs.get("past_key_values"), kwargs.get("attention_mask"), model.config
        if isinstance(cache, KVCache):
            is_of_tokens = mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2)
            make_mask = ALL_MASK_ATTENTION_FUNCTIONS.get(config._attn_implementation)
            is_made_here = is_of_tokens and make_mask in (sdpa_mask, eager_mask)
            cache.masks_have_windows = is_made_here and getattr(config, "is_causal", True)
        try:
            return forward(**kwargs)
        finally:
            if isinstance(cache, KVCache):
                cache.masks_have_windows = False

    return forward_with_known_masks


class RotaryEmbedding(nn.Module):
    """Hugging Face's rotary embedding, in the form that `ParallelAttention` multiplies with.

    rotate_half(x) * sin == roll(x, D / 2) * signed_sin, where signed_sin is sin with its first half negated, or, of
    pairs, the first of each: computed once a forward pass, not once a layer.

    Args:
        rope: which elements of a head turn together, as in `Adapter.rope`.

    Returns:
        cos and signed sin, [B, 1, S, D] each, D of what is turned; `complex pairs`: cos + i sin, [B, 1, S, D / 2].
    """

    def __init__(self, rotary_emb: nn.Module, rope: str = "halves"):
        super().__init__()
        self.rotary_emb, self.rope = rotary_emb, rope

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, *layer_type: str
    ) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
        if self.rope == "complex pairs":
            return self.rotary_emb(x, position_ids=position_ids).unsqueeze(1)
        cos, sin = self.rotary_emb(x, position_ids, *layer_type)
        if self.rope == "float32 pairs":
            first, second = sin.float().unflatten(-1, (-1, 2)).unbind(-1)
            return cos.float().unsqueeze(1), torch.stack((-first, second), dim=-1).flatten(-2).unsqueeze(1)
        low, high = sin.chunk(2, dim=-1)
        return cos.unsqueeze(1), torch.cat((-low, high), dim=-1).unsqueeze(1)


class WideRMSNorm(nn.Module):
    """RMS norm over the width of all heads, of which each rank has a part.

        y = x / sqrt(mean(x^2) + eps) * weight          the mean over all ranks' heads

    Args:
        width: of all heads.
        part: this rank's elements of it.
        counted: those of them that it answers for in the mean: of the ranks that hold the same head, the first.
        is_rounded: whether the normed x is rounded before the weight; else once, after it.
    """

    unit_offset = False

    def __init__(
        self, width: int, part: Range, counted: Range, eps: float, like: torch.Tensor, is_rounded: bool = True
    ):
        super().__init__()
        self._is_rounded = is_rounded
        weight = torch.empty(part[1] - part[0], dtype=like.dtype, device=like.device)
        self.weight, self.width, self.eps = nn.Parameter(weight, requires_grad=False), width, eps
        self.counted = counted[0] - part[0], counted[1] - part[0]  # from the rank's first on

    def forward(self, x: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
        """[..., part], given the mean square over the whole width [..., 1]."""
        y = x.float() * torch.rsqrt(mean_square + self.eps)
        return self.weight * y.type_as(x) if self._is_rounded else (self.weight * y).type_as(x)

    def shards(self, name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": self.weight.detach()}

    def extra_repr(self) -> str:
        return f"{len(self.weight)} of {self.width}, eps={self.eps}"


class ParallelAttention(nn.Module):
    """Attention over a rank's query heads and the key/value heads that they read. Returns the reduced output.

    What families do to q and k on the way, each where the config or the family says so:

        norm over all heads, clip (OLMo)   ->  norm of each head  ->  turn by position  ->  norm of each head, or in
                                                                      layers that know none a growing scale (Llama 4)

    Whatever attention function the model is set to is used (`set_attn_implementation`). Where the heads do not divide,
    a rank's query heads may be spread unevenly over its key/value heads; then each query head gets its own copy of the
    one that it reads, after the cache, so that the cache still holds each head once.

    Args:
        attention: Hugging Face's module.
        rope: which elements of a head turn together, as in `Adapter.rope`.
        is_windowed: whether the attention function is told the sliding window.
        softcap: what it is told to cap the scores with, if anything.
    """

    ends_in = "o_proj"

    def __init__(
        self,
        attention: nn.Module,
        heads: HeadPlan,
        qkv_proj: QKVParallelLinear,
        o_proj: RowParallelLinear,
        rope: str = "halves",
        is_windowed: bool = True,
        softcap: float | None = None,
    ):
        super().__init__()
        self.config, self.layer_idx = attention.config, attention.layer_idx
        self.head_dim, self.scaling, self.is_causal = attention.head_dim, attention.scaling, attention.is_causal
        self.num_heads_local, self.num_kv_heads_local = heads.num_heads, heads.num_kv_heads
        self.qkv_proj, self.o_proj = qkv_proj, o_proj
        window = getattr(attention, "sliding_window", getattr(self.config, "sliding_window", None))
        self.sliding_window = window if is_windowed else None
        self._plain_sdpa = _HF_SDPA if softcap is None else None  # it would not cap
        self._softcap = softcap
        self._options = {"scaling": self.scaling, "dropout": 0.0, "sliding_window": self.sliding_window}
        if softcap is not None:
            self._options["softcap"] = softcap
        self._eager = sys.modules[type(attention).__module__].eager_attention_forward
        self._split_q_k = [heads.num_heads, heads.num_kv_heads]
        self._split_qk_v = [heads.num_heads + heads.num_kv_heads, heads.num_kv_heads]
        self._num_qkv_heads, self._half = sum(self._split_qk_v), self.head_dim // 2
        groups, rest = divmod(heads.num_heads, heads.num_kv_heads)
        is_even = not rest and heads.kv_of_query == tuple(i // groups for i in range(heads.num_heads))
        self.num_key_value_groups = groups if is_even else 1
        self._queries_of_kv = [] if is_even else [heads.kv_of_query.count(i) for i in range(heads.num_kv_heads)]
        self._kv_of_query = None if is_even else tuple(heads.kv_of_query)
        has_norms = hasattr(attention, "q_norm")
        if has_norms:
            self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.has_wide_norm = has_norms and isinstance(self.q_norm, WideRMSNorm)
        self.has_qk_norm = has_norms and not self.has_wide_norm
        if self.has_wide_norm:
            first_k, (start, stop) = heads.num_heads * self.head_dim, self.k_norm.counted
            self._counted = (*self.q_norm.counted, first_k + start, first_k + stop)  # columns of qkv
        self._knows_positions = bool(getattr(attention, "use_rope", True))
        self._turns_halves = rope == "halves" and self._knows_positions
        self._is_complex, self._in_pairs = rope == "complex pairs", rope == "float32 pairs"
        self._clip = getattr(self.config, "clip_qkv", None)
        self._last_norm_eps = attention.qk_norm.eps if hasattr(attention, "qk_norm") else None

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        past_key_values=None,
        then: AddNorm | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor | tuple[torch.Tensor, torch.Tensor], None]:
        """
        Args:
            hidden_states: [B, S, H], whole on every rank.
            position_embeddings: what `RotaryEmbedding` returns.
            then: what follows the sum over ranks.

        Returns:
            [B, S, H], whole on every rank, or what `then` makes of it; and None where Hugging Face's attention returns
            its weights.
        """
        batch, length, _ = hidden_states.shape
        modules = self._modules  # nn.Module finds `self.qkv_proj` only after looking everywhere else
        qkv = modules["qkv_proj"](hidden_states)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self._eager)
        if length == 1 and past_key_values is not None and has_one_launch(qkv):
            y = self._in_one_launch(qkv, attend, position_embeddings, attention_mask, past_key_values)
            if y is not None:
                return summed(modules["o_proj"], y, then), None
        if self.has_wide_norm:
            qkv = self._widely_normed(qkv)
        qkv = qkv.view(batch, length, self._num_qkv_heads, self.head_dim).transpose(1, 2)
        qk, v = torch.split_with_sizes(qkv, self._split_qk_v, 1)
        if self.has_qk_norm:
            q, k = torch.split_with_sizes(qk, self._split_q_k, 1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        if self._turns_halves:
            cos, signed_sin = position_embeddings
            qk = torch.addcmul(qk * cos, qk.roll(self._half, -1), signed_sin)
        else:
            turn = self._as_in_llama4 if self._is_complex else self._turned
            qk = turn(qk, position_embeddings, past_key_values)
        q, k = torch.split_with_sizes(qk, self._split_q_k, 1)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        if self._queries_of_kv:
            k, v = self._one_for_each_query(k), self._one_for_each_query(v)
        if length == 1 and attention_mask is None and attend is self._plain_sdpa:
            # One token that sees every key: what Hugging Face's function comes down to, without 4 us of its questions.
            is_grouped = self.num_key_value_groups > 1
            y = F.scaled_dot_product_attention(q, k, v, scale=self.scaling, enable_gqa=is_grouped).transpose(1, 2)
        else:
            y, _ = attend(self, q, k, v, attention_mask, **self._options, **kwargs)
        return summed(modules["o_proj"], y.reshape(batch, length, -1), then), None

    def _in_one_launch(self, qkv, attend, position_embeddings, mask, past_key_values) -> torch.Tensor | None:
        """Attention's output [B, 1, H_q * D] for qkv [B, 1, ...]; None where the op would not compute what `attend`
        does, or the cache does not let it write."""
        is_mask = mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 4)
        if not is_mask or self._is_complex or (attend is not self._plain_sdpa and attend is not self._eager):
            return None
        if (room := next_room(past_key_values, self.layer_idx)) is None:
            return None
        cos, signed_sin = position_embeddings if self._knows_positions else (None, None)
        norms: tuple = (None, None, 0.0, False)
        means = None
        if self._clip is not None:
            qkv = self._widely_normed(qkv)  # the op does not clip
        elif self.has_qk_norm or self.has_wide_norm:
            q_norm, k_norm = self.q_norm, self.k_norm
            norms = (q_norm.weight, k_norm.weight, q_norm.eps, q_norm.unit_offset)
            if self.has_wide_norm and self.o_proj.overlap.comm.size > 1:
                means = self._mean_squares(qkv)
        keys, values, position, _ = room
        # Where the mask is not known to have the window, it is the mask that says which tokens are seen.
        is_known = isinstance(past_key_values, KVCache) and past_key_values.masks_have_windows
        window = self.sliding_window if is_known else None
        options = (self.scaling, self._kv_of_query, mask, window, self._softcap, None, *norms, self._in_pairs, means)
        y = rope_decode_attention(qkv, cos, signed_sin, keys, values, position, *options)
        room.written()
        return y

    def _widely_normed(self, qkv: torch.Tensor) -> torch.Tensor:
        """q and k normalised over all ranks' heads; clipped, and v too."""
        q, k, v = qkv.split([heads * self.head_dim for heads in (*self._split_q_k, self._split_qk_v[1])], -1)
        of_q, of_k = self._mean_squares(qkv).split(1, -1)
        qkv = torch.cat((self.q_norm(q, of_q), self.k_norm(k, of_k), v), -1)
        return qkv if self._clip is None else qkv.clamp_(-self._clip, self._clip)

    def _mean_squares(self, qkv: torch.Tensor) -> torch.Tensor:
        """Of q and k over all ranks' heads, float32 [B, S, 2], by one all-reduce of two numbers a token."""
        parts = mean_squares(qkv, self._counted, (self.q_norm.width, self.k_norm.width))
        return self.o_proj.overlap.comm.all_reduce(parts)

    def _turned(self, qk: torch.Tensor, position_embeddings: tuple, past_key_values) -> torch.Tensor:
        """q and k [B, H, S, D], the first elements of each head turned, as many as there are angles, and as exactly;
        none in a layer that knows no positions."""
        if not self._knows_positions:
            return qk
        cos, signed_sin = position_embeddings
        size = cos.shape[-1]
        part = qk[..., :size]
        turned = torch.addcmul(part * cos, partners(part, self._in_pairs), signed_sin).type_as(qk)
        return turned if size == self.head_dim else torch.cat((turned, qk[..., size:]), dim=-1)

    def _as_in_llama4(self, qk: torch.Tensor, position_embeddings: torch.Tensor, past_key_values) -> torch.Tensor:
        """q and k [B, H, S, D]: elements 2i and 2i + 1 turned in float32, and normalised; in a layer that knows no
        positions, q times 1 + attn_scale * log(1 + (position + 1) // floor_scale), positions as in the cache."""
        if self._knows_positions:
            pairs = torch.view_as_complex(qk.float().unflatten(-1, (-1, 2)))
            qk = torch.view_as_real(pairs * position_embeddings).flatten(-2).type_as(qk)
            eps = self._last_norm_eps
            return qk if eps is None else torch.rms_norm(qk, (self.head_dim,), None, eps)
        if self.config.attn_temperature_tuning:
            past = past_key_values.get_seq_length(self.layer_idx) if past_key_values is not None else 0
            positions = torch.arange(qk.shape[2], device=qk.device).float() + past
            steps = torch.floor((positions + 1) / self.config.floor_scale)
            qk[:, : self.num_heads_local] *= (torch.log1p(steps) * self.config.attn_scale + 1).unsqueeze(1)
        return qk

    def _one_for_each_query(self, heads: torch.Tensor) -> torch.Tensor:
        """[B, H_kv, S, D] -> [B, H_q, S, D], without an index tensor, which would have to travel to the GPU."""
        parts = zip(heads.split(1, dim=1), self._queries_of_kv, strict=True)
        return torch.cat([head.expand(-1, count, -1, -1) for head, count in parts], dim=1)

    def extra_repr(self) -> str:
        heads = f"num_heads_local={self.num_heads_local}, num_kv_heads_local={self.num_kv_heads_local}"
        return f"{heads}, head_dim={self.head_dim}"

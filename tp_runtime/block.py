"""The fused decoder block: what takes the place of a decoder layer's `forward`, assembled from the adapter's data.

One rank's view, for tokens x [B, S, H]; h is the residual stream; a family has norms before its two parts, behind them,
or both (`Adapter.norms`):

    y    = norm(x)
    y    = o_proj(attention(qkv_proj(y)))      all-reduce
    h, y = x + y, norm(x + y)                  one launch; where a norm stands behind: x + norm(y), and its norm
    y    = down_proj(act(gate) * up)           all-reduce; or the experts
    h, y = h + y, next_norm(h + y)             one launch; the next layer's norm, at last the model's

The biases of o_proj and down_proj belong to these launches, and, one-shot between GPUs, so do the all-reduces. So the
launch is handed to the part that makes the sum (`then`), where nobody but the block sees that part's output. The
embedding's all-reduce then takes the first layer's norm.

Where both parts read the same norm (`parallel`), one all-reduce and one launch serve both:

    y    = o_proj(attention(qkv_proj(y))) + down_proj(act(gate) * up)      this rank's parts; all-reduce
    h, y = x + y, next_norm(x + y)                                         one launch

A hook on attention or on the feed-forward block of such a layer is given this rank's part.

A layer returns h, as Hugging Face's does: hooks and recorded hidden states are those of the unpatched model. What it
has normed for the next layer it leaves in `Ahead`; who norms h takes it from there if handed that very tensor, and else
norms what it is handed. So layers may be left out, cut short, called alone, or run in two lanes.

At decode a dense layer is seven launches: q k v, attention with rope and cache, o, norm, gate and up, down, norm; in a
parallel one the two parts' addition takes the place of the norm in the middle.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules import module as of_all_modules

from .kernels.rms_norm import AddNorm
from .layers import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    summed,
)
from .model_config import FUSED_ACTIVATIONS
from .models.adapter import Adapter
from .overlap import Overlap, all_reduce


class Ahead:
    """What one layer of a model has normed for the next: at most one tensor, and none when a pass has ended.

    Threads may share it, and lanes do: whoever takes compares by identity, and what is lost is computed again.
    """

    def __init__(self):
        self.is_open = False
        self._left: tuple[nn.Module, torch.Tensor, torch.Tensor] | None = None

    def during(self, forward: Callable) -> Callable:
        """`forward` of the whole model. Outside of it nothing is left: nobody might come to take it."""

        def forward_with_look_ahead(*args, **kwargs):
            self.is_open = True
            try:
                return forward(*args, **kwargs)
            finally:
                self.is_open, self._left = False, None

        return forward_with_look_ahead

    def leave(self, norm: nn.Module, h: torch.Tensor, y: torch.Tensor) -> None:
        """y is norm(h)."""
        self._left = norm, h, y

    def take(self, norm: nn.Module, h: torch.Tensor) -> torch.Tensor | None:
        """norm(h), if that is what was left. Nothing is left then."""
        left, self._left = self._left, None
        return left[2] if left is not None and left[1] is h and left[0] is norm else None


class FirstNorm:
    """`forward` of the embedding, whose sum over ranks and the first layer's norm are one launch where that can be."""

    def __init__(self, embedding: VocabParallelEmbedding, first: nn.Module, norm: nn.Module, ahead: Ahead):
        self._embedding, self._first, self._norm, self._ahead = embedding, first, norm, ahead

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        embedding, norm = self._embedding, self._norm
        if (
            not (embedding.fuses_norm() and self._ahead.is_open)
            or self._first._forward_pre_hooks
            or is_watched(embedding)
            or is_watched(norm)
        ):
            return VocabParallelEmbedding.forward(embedding, ids)
        p, is_unit_offset, is_centered = norm._parameters, *kind_of(norm)
        then = AddNorm(p["weight"], norm.eps, None, is_unit_offset, embedding.scale, None, p.get("bias"), is_centered)
        y, h = VocabParallelEmbedding.forward(embedding, ids, then)
        self._ahead.leave(norm, h, y)
        return h


class LastNorm:
    """`forward` of the norm behind the last layer."""

    def __init__(self, norm: nn.Module, ahead: Ahead):
        self._norm, self._ahead = norm, ahead

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        y = self._ahead.take(self._norm, hidden_states)
        return type(self._norm).forward(self._norm, hidden_states) if y is None else y


# Where transformers has the hooks that record hidden states: the first call that asks for some leaves them for good.
RECORDERS = "transformers.utils.output_capturing"


def may_change(module: nn.Module) -> bool:
    """Whether a hook may change what a module returns: all may but recorders, which do nothing where nobody asks."""
    hooks = module._forward_hooks
    return bool(hooks) and any(getattr(hook, "__module__", "") != RECORDERS for hook in hooks.values())


def is_watched(module: nn.Module) -> bool:
    """Whether someone has hooks on a module: then it is called as one, and on what it would be called with."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or of_all_modules._global_forward_hooks
        or of_all_modules._global_forward_pre_hooks
    )


def kind_of(norm: nn.Module) -> tuple[bool, bool]:
    """Whether its factors are 1 + weight; whether it is centered, of which torch's layer norm says nothing."""
    return getattr(norm, "unit_offset", False), getattr(norm, "centered", False)


def is_seen(part: nn.Module) -> bool:
    """Whether someone else sees what attention or the feed-forward block returns: a hook or a wrapper, on it or on the
    row-parallel layer that it ends in; or it is none of ours."""
    if (name := getattr(part, "ends_in", None)) is None or "forward" in part.__dict__ or is_watched(part):
        return True
    if not name:
        return False
    last = part._modules[name]
    has_own = last._forward_hooks or last._forward_pre_hooks or "forward" in last.__dict__
    return bool(has_own) or type(last) is not RowParallelLinear


class DecoderBlock:
    """`forward` of one decoder layer of Hugging Face's, whose modules are ours.

    Args:
        layer: whose parts are called by the names that the adapter gives them.
        following: the next layer; None for the last.
        last_norm: the model's, behind all layers.
        ahead: shared by the layers of a model.
        overlap: how a parallel layer's all-reduce is scheduled.
    """

    def __init__(
        self,
        layer: nn.Module,
        following: nn.Module | None,
        last_norm: nn.Module,
        adapter: Adapter,
        ahead: Ahead,
        overlap: Overlap,
    ):
        names = adapter.norms
        parts = layer._modules
        self._layer, self._ahead, self._feed_forward = layer, ahead, adapter.feed_forward
        self._norm_in, self._attention_out, self._feed_forward_in, self._feed_forward_out = map(parts.get, names)
        # Who norms what this layer returns, and its norm.
        self._taker = following if following is not None else last_norm
        self._norm_ahead = last_norm if following is None else following._modules.get(names[0])
        self._scale = float(getattr(layer, adapter.residual_multiplier)) if adapter.residual_multiplier else 1.0
        self._eps = last_norm.eps
        self._is_unit_offset, self._is_centered = kind_of(last_norm)
        self._is_parallel, self._overlap = adapter.flag("parallel", {}), overlap
        self._untold = ("position_ids",) if adapter.flag("untold_positions", {}) else ()
        self._argument_names = list(inspect.signature(layer.forward).parameters)[1:]
        assert all(norm is None or norm.eps == self._eps for norm in map(parts.get, names))

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """[B, S, H] -> [B, S, H], whole on every rank; arguments as of Hugging Face's layer."""
        kwargs.update(zip(self._argument_names, args))
        for name in self._untold:
            kwargs.pop(name, None)
        parts, norm, x = self._layer._modules, self._norm_in, hidden_states
        if norm is None:
            y = x
        elif (y := self._ahead.take(norm, x)) is None:
            y = norm(x)
        attention, feed_forward = parts["self_attn"], parts[self._feed_forward]
        if self._is_parallel:
            y = attention(hidden_states=y, **kwargs)[0] + feed_forward(y)
            norm = self._next_norm()
            y, h = all_reduce(y, self._overlap, self._add_norm(x, None, norm))
        else:
            kwargs["hidden_states"] = y
            x, y = self._added(x, self._attention_out, self._feed_forward_in, attention, (), kwargs)
            norm = self._next_norm()
            h, y = self._added(x, self._feed_forward_out, norm, feed_forward, (y,), {})
        if norm is not None:
            self._ahead.leave(norm, h, y)
        return h

    def _next_norm(self) -> nn.Module | None:
        """What norms h next, if that is done here: not where a hook may change h before it, or waits for its call."""
        norm, is_open = self._norm_ahead, self._ahead.is_open
        if not is_open or norm is None or may_change(self._layer) or self._taker._forward_pre_hooks:
            return None
        return None if is_watched(norm) else norm

    def _add_norm(self, x: torch.Tensor, behind: nn.Module | None, norm: nn.Module | None) -> AddNorm:
        """Of a sum y: h = x + y, or x + behind(y), and norm(h), or h where there is none."""
        p = {} if norm is None else norm._parameters
        post_weight = None if behind is None else behind._parameters["weight"]
        is_centered = self._is_centered and norm is not None
        options = (self._is_unit_offset, self._scale, post_weight, p.get("bias"), is_centered)
        return AddNorm(p.get("weight"), self._eps, x, *options)

    def _added(
        self,
        x: torch.Tensor,
        behind: nn.Module | None,
        norm: nn.Module | None,
        part: nn.Module,
        args: tuple,
        kwargs: dict,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """h and norm(h), as of `_add_norm`, for what a part returns: one launch, but for norms that are watched."""
        fused = None if norm is None or is_watched(norm) else norm
        calls_behind = behind is not None and is_watched(behind)
        if calls_behind or is_seen(part):
            y = part(*args, **kwargs)
            y = y[0] if isinstance(y, tuple) else y  # beside it attention's weights, or the router's logits
            if behind is not None and calls_behind:
                y, behind = behind(y), None
            y, h = self._add_norm(x, behind, fused).of(y)
        else:
            both = part.forward(*args, **kwargs, then=self._add_norm(x, behind, fused))
            y, h = both[0] if isinstance(both[0], tuple) else both
        return h, y if norm is None or fused is not None else norm(h)


class ParallelMLP(nn.Module):
    """down_proj(act(gate) * up), gate and up in one GEMM, cut along the intermediate width.

    Args:
        act_fn: Hugging Face's activation, by the name that it has in the config, for a name without a fused kernel.
    """

    ends_in = "down_proj"

    def __init__(
        self, gate_up_proj: MergedColumnParallelLinear, down_proj: RowParallelLinear, activation: str, act_fn: nn.Module
    ):
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = gate_up_proj, down_proj, act_fn
        self.activation = FUSED_ACTIVATIONS.get(activation)

    def forward(self, x: torch.Tensor, then: AddNorm | None = None):
        """[..., H] -> [..., H], or what `then` makes of that."""
        modules = self._modules
        if self.activation is None:
            gate, up = modules["gate_up_proj"](x).chunk(2, -1)
            y = self.act_fn(gate).mul_(up)
        else:
            y = modules["gate_up_proj"].gated(x, self.activation)
        return summed(modules["down_proj"], y, then)


class UngatedMLP(nn.Module):
    """c_proj(act(c_fc(x))), cut along the intermediate width.

    Args:
        act_fn: as of ParallelMLP; called, as c_fc is, also where one of the two has hooks.
    """

    ends_in = "c_proj"

    def __init__(self, c_fc: ColumnParallelLinear, c_proj: RowParallelLinear, activation: str, act_fn: nn.Module):
        super().__init__()
        self.c_fc, self.c_proj, self.act_fn = c_fc, c_proj, act_fn
        self.activation = FUSED_ACTIVATIONS.get(activation)

    def forward(self, x: torch.Tensor, then: AddNorm | None = None):
        """[..., H] -> [..., H], or what `then` makes of that."""
        modules = self._modules
        c_fc, act_fn = modules["c_fc"], modules["act_fn"]
        is_fused = self.activation is not None and not is_watched(c_fc) and not is_watched(act_fn)
        y = c_fc.activated(x, self.activation) if is_fused else act_fn(c_fc(x))
        return summed(modules["c_proj"], y, then)

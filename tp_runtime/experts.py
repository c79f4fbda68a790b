"""The sparse block of a MoE layer on a rank; and our experts for Hugging Face models that are not patched.

    logits         = x @ router.T                                          whole on every rank
    weights, index = the k experts of each token
    y              = experts(x, index, weights) + shared expert(x)         this rank's part of both sums
    y              = sum of y over ranks                                   one all-reduce

Importing this file registers the experts with transformers, once for the process:

    import tp_runtime.experts
    model.set_experts_implementation("tp_runtime")      # or from_pretrained(..., experts_implementation="tp_runtime")
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .kernels.grouped_gemm import experts
from .kernels.rms_norm import AddNorm
from .kernels.routing import route
from .model_config import FUSED_ACTIVATIONS
from .models.adapter import Routing
from .overlap import Overlap, all_reduce


class ParallelExperts(nn.Module):
    """The experts of a MoE layer, each cut along its intermediate width.

        gate, up = x @ gate_up_proj[e].T            [T_e, I_r] each
        y[t]     = sum over t's experts e of weight[t, e] * (act(gate) * up) @ down_proj[e].T
        y        = sum of y over ranks

    Takes the place of Hugging Face's experts module: same signature, packed weights gate_up_proj [E, 2 * I_r, H] and
    down_proj [E, H, I_r]. Accumulates in float32, rounds once before the all-reduce.

    Args:
        width: I_r, of gate and of up; may be 0.
        activation: Hugging Face's name of it.
        is_transposed: weights [E, H, 2 * I_r] and [E, I_r, H], as Llama 4 has them.
        weigh_input: weight[t, e] multiplies the expert's input instead, as in Llama 4.
    """

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden_size: int,
        activation: str,
        like: torch.Tensor,
        overlap: Overlap,
        is_transposed: bool = False,
        weigh_input: bool = False,
    ):
        super().__init__()
        self.num_experts, self.width, self.hidden_size, self.overlap = num_experts, width, hidden_size, overlap
        self.activation = FUSED_ACTIVATIONS[activation]
        self.is_transposed, self.weigh_input = is_transposed, weigh_input
        gate_up, down = (2 * width, hidden_size), (hidden_size, width)
        if is_transposed:
            gate_up, down = gate_up[::-1], down[::-1]
        for name, shape in (("gate_up_proj", gate_up), ("down_proj", down)):
            weight = torch.empty(num_experts, *shape, dtype=like.dtype, device=like.device)
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))

    def partial(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """This rank's part of the sum, [T, H]; arguments as of `forward`."""
        p = self._parameters
        return experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            p["gate_up_proj"],
            p["down_proj"],
            self.activation,
            self.is_transposed,
            self.weigh_input,
        )

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: [T, H].
            top_k_index: [T, k], expert of each token.
            top_k_weights: [T, k].

        Returns:
            [T, H], the same bits on every rank.
        """
        return all_reduce(self.partial(hidden_states, top_k_index, top_k_weights), self.overlap)

    def shards(self, name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.{key}": weight.detach() for key, weight in self._parameters.items()}

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, width_local={self.width}"


def routed(router: nn.Module, top_k: int, routing: Routing, renormalise: bool) -> Callable:
    """What takes the place of a Hugging Face router's `forward`, so that the module, its weight and the hooks that
    record its logits stay: x [T, H] -> router logits [T, E], weights [T, k], index [T, k]; of a block that returns the
    logits itself (Llama 4), weights come first."""

    def forward(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = F.linear(hidden_states, router._parameters["weight"].detach())
        dtype = logits.dtype if routing.is_rounded else torch.float32
        index, weights = route(logits, top_k, routing.scoring, renormalise, dtype)
        return (weights, logits, index) if routing.returns_logits else (logits, weights, index)

    return forward


class ParallelMoE(nn.Module):
    """The sparse block: router, experts, and where the family has them a shared expert and its gate.

    Takes the place of Hugging Face's block, with the same names inside. One all-reduce: a rank adds its part of the
    shared expert's sum to its part of the routed experts', and the gate, a number for each token, multiplies parts as
    it would multiply their sum.

    Args:
        router: Hugging Face's, its `forward` replaced by `routed`.
        shared: the shared expert, whose own output is this rank's part.
        shared_gate: Hugging Face's, whole on every rank.
    """

    ends_in = ""  # nothing that hooks could be on

    def __init__(
        self,
        routing: Routing,
        router: nn.Module,
        experts: ParallelExperts,
        shared: nn.Module | None = None,
        shared_gate: nn.Module | None = None,
    ):
        super().__init__()
        self.overlap, self.routing = experts.overlap, routing
        self.add_module(routing.router, router)
        self.experts = experts
        if shared is not None:
            self.add_module(routing.shared, shared)
        if shared_gate is not None:
            self.add_module(routing.shared_gate, shared_gate)

    def forward(self, hidden_states: torch.Tensor, then: AddNorm | None = None):
        """[..., H] -> [..., H], or what `then` makes of that; the same bits on every rank; and the router's logits
        where the family returns them."""
        routing, modules = self.routing, self._modules
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits, weights, index = modules[routing.router](x)
        if routing.returns_logits:
            logits, weights = weights, logits
        y = self.experts.partial(x, index, weights)
        if routing.shared:
            shared = modules[routing.shared](x)
            if routing.shared_gate:
                shared = shared * F.linear(x, modules[routing.shared_gate].weight.detach()).sigmoid()
            y = y.add_(shared)
        y = all_reduce(y.view(hidden_states.shape), self.overlap, then)
        return (y, logits) if routing.returns_logits else y


# Of the experts of transformers' other families, those that `experts` cannot compute, by how their module says so.
_UNSUPPORTED = {
    "experts without a gate": lambda m: not m.has_gate,
    "biases": lambda m: m.has_bias,
    "interleaved gate and up": lambda m: not m.is_concatenated,
    "a gating function of their own": lambda m: type(m)._apply_gate.__module__ != ALL_EXPERTS_FUNCTIONS.__module__,
    "a norm after each expert": lambda m: getattr(m, "has_post_expert_norm", False),
    "expert parallelism": lambda m: getattr(m, "_is_expert_parallel", False),
}
_ACTIVATION_OF_CLASS = {type(ACT2FN[name]): fused for name, fused in FUSED_ACTIVATIONS.items()}


class _ForInference(torch.autograd.Function):
    """`y`, whose gradient cannot be asked for: without this, that of the experts would silently be nothing."""

    @staticmethod
    def forward(ctx, y: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx, *gradients):
        raise ValueError("the experts of tp_runtime have no backward pass; train with another experts implementation")


def experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts implementation "tp_runtime" of transformers: what `module.forward` gives, for inference.

    Args:
        module: a packed experts module of transformers.
        hidden_states, top_k_index, top_k_weights: as of `ParallelExperts.forward`.

    Raises:
        ValueError: experts of a kind that is not supported; a token that is routed to an expert that is not there.
    """
    act_fn = getattr(module, "act_fn", None)
    activation = _ACTIVATION_OF_CLASS.get(type(act_fn))
    found = [kind for kind, is_so in _UNSUPPORTED.items() if is_so(module)]
    if activation is None or found:
        found = found or [f"the activation {type(act_fn).__name__}"]
        raise ValueError(
            f"{type(module).__name__} has {' and '.join(found)}, which the experts implementation 'tp_runtime' does "
            "not support; call model.set_experts_implementation('grouped_mm')"
        )
    gate_up, down = module.gate_up_proj, module.down_proj
    with torch.no_grad():
        y = experts(hidden_states, top_k_index, top_k_weights, gate_up, down, activation, module.is_transposed)
    return _ForInference.apply(y, hidden_states, top_k_weights, gate_up, down) if torch.is_grad_enabled() else y


ALL_EXPERTS_FUNCTIONS.register("tp_runtime", experts_forward)

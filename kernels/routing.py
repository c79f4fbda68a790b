"""Which experts a token goes to, and the tokens of each expert side by side.

    route    logits [T, E] -> top_k_index [T, k], top_k_weights [T, k]; one launch
    sort     top_k_index   -> slots [T * k], offsets [E + 1];           one launch, within `experts`

What the families' routers compute, in transformers 5.17 as in 5.23 (`p` in float32, `top` the k largest of a row):

    family                        scoring          renormalise        weights in
    mixtral                       softmax          True               float32
    qwen2_moe, qwen3_moe, olmoe   softmax          norm_topk_prob     logits' dtype
    granitemoe                    softmax_top_k    -                  logits' dtype
    llama4                        sigmoid          -                  logits' dtype; they scale the experts' *input*

    softmax:        p = softmax(logits);  w = top(p);  renormalise: w / sum(w)
    softmax_top_k:  w = softmax(top(logits))
    sigmoid:        w = sigmoid(top(logits))

Slot s = t * k + j is choice j of token t. Nothing here waits for the device, so all of it can be captured in a CUDA
graph, and nothing depends on the order in which programs run: the same bits at every call.

A token that is given an expert that does not exist is lost: its row becomes NaN, and the host is told (see `lost`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .lost import NO_SUCH_EXPERT

SCORINGS = ("softmax", "softmax_top_k", "sigmoid")


def route(
    router_logits: torch.Tensor,
    top_k: int,
    scoring: str = "softmax",
    renormalise: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k experts of each token and their weights, the largest first.

    Args:
        router_logits: [T, E].
        top_k: k, 1 to E.
        scoring: softmax, softmax_top_k or sigmoid, as above.
        renormalise: whether the weights of a token sum to 1; softmax only.
        dtype: of the weights; None for the logits'.

    Returns:
        top_k_index [T, k] int64, top_k_weights [T, k]. A row of logits that holds a NaN gets NaN weights, and experts.

    Raises:
        ValueError: top_k is not one of 1 to E, or no such scoring.
    """
    if torch.compiler.is_compiling():
        return torch.ops.tp_runtime.route(router_logits, top_k, scoring, renormalise, dtype)
    _check(router_logits, top_k, scoring)
    if not router_logits.is_cuda:
        return route_ref(router_logits, top_k, scoring, renormalise, dtype)
    from .routing_kernels import run_route

    return run_route(router_logits, top_k, scoring, renormalise, dtype)


def route_ref(
    router_logits: torch.Tensor, top_k: int, scoring: str, renormalise: bool, dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, by torch."""
    logits = router_logits.float()
    weights, index = (logits.softmax(-1) if scoring == "softmax" else logits).topk(top_k, dim=-1)
    if scoring == "softmax_top_k":
        weights = weights.softmax(-1)
    elif scoring == "sigmoid":
        weights = weights.sigmoid()
    elif renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return index, weights.to(dtype or router_logits.dtype)


def _check(router_logits: torch.Tensor, top_k: int, scoring: str) -> None:
    num_experts = router_logits.shape[-1]
    if router_logits.dim() != 2 or not 1 <= top_k <= num_experts:
        shape = list(router_logits.shape)
        raise ValueError(f"top_k={top_k} of router logits {shape}: choose 1 to {num_experts} of logits [T, E]")
    if scoring not in SCORINGS:
        raise ValueError(f"scoring={scoring!r} is not one of {', '.join(SCORINGS)}")


def check_routing(top_k_index: torch.Tensor, top_k_weights: torch.Tensor, num_experts: int) -> None:
    """Whether every token goes to experts that exist, with weights that are numbers. Waits for the device.

    Raises:
        ValueError: names the first token for which this is not so, and the value.
    """
    outside = (top_k_index < 0) | (top_k_index >= num_experts)
    for wrong, values, of in (
        (outside, top_k_index, NO_SUCH_EXPERT),
        (top_k_weights.isnan(), top_k_weights, "the routing weight {value}: its router's input or weights hold NaN"),
    ):
        if wrong.any():
            token, choice = wrong.nonzero()[0].tolist()
            given = of.format(value=values[token, choice].item(), last=num_experts - 1)
            raise ValueError(f"token {token} is given {given}")


class Sorted(NamedTuple):
    """The slots of expert e are slots[offsets[e] : offsets[e + 1]], ascending.

    Args:
        slots: int32 [T * k]. Those whose expert does not exist stand last.
        offsets: int32 [E + 1].
    """

    slots: torch.Tensor
    offsets: torch.Tensor


def sort_by_expert_ref(top_k_index: torch.Tensor, num_experts: int) -> Sorted:
    """The slots of each expert, by torch; on CUDA it waits for the device as little as `run_sort` does.

    Args:
        top_k_index: [T, k], T at least 1, any integers.
    """
    chosen = top_k_index.flatten()
    expert, slots = torch.where((chosen >= 0) & (chosen < num_experts), chosen, num_experts).sort(stable=True)
    bounds = torch.arange(num_experts + 1, device=chosen.device, dtype=expert.dtype)
    return Sorted(slots.int(), torch.searchsorted(expert, bounds).int())


_library = torch.library.Library("tp_runtime", "FRAGMENT")
_library.define(
    "route(Tensor router_logits, int top_k, str scoring='softmax', bool renormalise=False, ScalarType? dtype=None)"
    " -> (Tensor, Tensor)"
)
_library.impl("route", route, "CPU")
_library.impl("route", route, "CUDA")


def _route_fake(router_logits, top_k, scoring="softmax", renormalise=False, dtype=None):
    _check(router_logits, top_k, scoring)
    shape = (router_logits.shape[0], top_k)
    index = router_logits.new_empty(shape, dtype=torch.int64)
    return index, router_logits.new_empty(shape, dtype=dtype or router_logits.dtype)


_library.impl("route", _route_fake, "Meta")

"""The experts of MoE layers: routing, and every kernel of `grouped_gemm`, on layers of models and on odd ones.

    exact       against float64, whatever the routing: even, skewed, all tokens to the same experts
    steady      equal bits again and again, and in CUDA graphs whose routing changes between replays: nothing may wait
                for the device to learn how many tokens an expert has
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.choice import label
from bench.gpu_section import Options, Row
from bench.kernel_shapes import model_shapes
from bench.on_gpu.calls import Call, Form, check_exact, check_steady, distinct_scores, seeded
from bench.on_gpu.cases import DTYPES
from bench.on_gpu.races import release
from tp_runtime.kernels import grouped_gemm, lost, routing, routing_kernels
from tp_runtime.kernels.tuned import TORCH

LAYERS = (("mixtral-8x7b", 8), ("qwen3-30b-a3b", 1), ("qwen3-30b-a3b", 8))  # model, tp_size
TOKENS = (1, 4, 16, 64, 256, 4096)
ROUTINGS = ("even", "skewed", "same")
# Experts, experts a token, H, I: widths of uneven cuts, of 16 bytes and not; one expert a token, as in Llama 4.
ODD_LAYERS = ((5, 3, 264, 400), (5, 3, 264, 389), (16, 1, 264, 40), (60, 4, 72, 768))
ODD_TOKENS = (1, 33, 300)
ROUTERS = ((8, 2), (60, 4), (64, 8), (128, 8))  # experts, experts a token
SCORINGS = (("softmax", False), ("softmax", True), ("softmax_top_k", False), ("sigmoid", False))


@dataclass(frozen=True)
class Case:
    """Some tokens through one layer, its weights stored and applied as some family has them."""

    name: str
    num_experts: int
    top_k: int
    hidden: int
    width: int
    tokens: int
    dtype: str
    routing: str = "even"
    is_transposed: bool = False
    weigh_input: bool = False
    activation: str = "silu"
    is_odd: bool = False

    @property
    def what(self) -> str:
        forms = [self.activation, "transposed" * self.is_transposed, "weighed input" * self.weigh_input]
        layer = f"{self.num_experts} experts of {self.width}x{self.hidden}, top {self.top_k}"
        rest = f"T={self.tokens}, {self.routing} routing, {self.dtype}, {', '.join(filter(None, forms))}"
        return f"experts {self.name}, {layer}, {rest}"

    @property
    def form(self) -> dict[str, Any]:
        return {"activation": self.activation, "is_transposed": self.is_transposed, "weigh_input": self.weigh_input}

    def weights(self, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """gate_up_proj and down_proj."""
        options = {"dtype": getattr(torch, self.dtype), "device": device}
        gate_up = torch.empty(self.num_experts, 2 * self.width, self.hidden, **options).normal_(std=self.hidden**-0.5)
        down = torch.empty(self.num_experts, self.hidden, self.width, **options).normal_(std=self.width**-0.5)
        return (gate_up.mT.contiguous(), down.mT.contiguous()) if self.is_transposed else (gate_up, down)

    def candidates(self, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> dict[str, tuple[str, Any]]:
        """Label -> kernel and configuration: all that may be chosen, torch's grouped GEMM where it can be captured."""
        found = grouped_gemm.candidates(self.tokens, self.width, self.hidden, x.dtype)
        # The kernels for few tokens read a token's row once for all of its experts.
        has_decode = not (self.weigh_input and self.top_k > 1)
        ours = {label(*c): c for c in found if has_decode or c[0] != "decode"}
        return ours | ({TORCH: (TORCH, None)} if x.is_cuda and grouped_gemm.has_grouped_mm(x, *weights) else {})


def routed(case: Case, device: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """top_k_index and top_k_weights [T, k], no expert twice for a token.

    "skewed": expert e as often as by its place in 1, 1/4, 1/9 ...; "same": every token takes the last k experts.
    """
    generator = seeded(seed, device)
    scores = torch.rand(case.tokens, case.num_experts, device=device, generator=generator)
    place = torch.arange(1, case.num_experts + 1, device=device)
    if case.routing == "skewed":
        scores = -2 * place.log() - (-scores.clamp_min(1e-30).log()).clamp_min(1e-30).log()  # Gumbel's trick
    elif case.routing == "same":
        scores = place.expand(case.tokens, -1).float()
    index = scores.topk(case.top_k).indices
    weights = torch.rand(case.tokens, case.top_k, device=device, generator=generator)
    return index, (weights + 0.1) / (weights + 0.1).sum(1, keepdim=True)


def model_cases() -> list[Case]:
    """Layers of models: all tokens and dtypes; one dtype for routings that are not even."""
    cases = []
    for (model, tp_size), dtype, t, kind in itertools.product(LAYERS, DTYPES, TOKENS, ROUTINGS):
        if kind == "even" or (dtype == "bfloat16" and t > 1):
            (s,) = (s for s in model_shapes(model, tp_size) if s.role == "experts_gate_up")
            cases.append(Case(f"{model} tp{tp_size}", s.num_experts, s.top_k, s.k, s.n // 2, t, dtype, kind))
    return cases


def odd_cases() -> list[Case]:
    """Off the grid in everything; of the first layer every form that a family has."""
    transposed = {"is_transposed": True}
    every = [{}, transposed, {"activation": "gelu"}, {"activation": "gelu_tanh", **transposed},
             {"weigh_input": True, **transposed}]  # fmt: skip
    return [
        Case("odd", *layer, t, dtype, is_odd=True, **form)
        for dtype, layer, t in itertools.product(DTYPES, ODD_LAYERS, ODD_TOKENS)
        for form in (every if layer == ODD_LAYERS[0] else every[:2])
        if dtype == "bfloat16" or not form
    ]


def exact(options: Options, device: str = "cuda", cases: Iterable[Case] | None = None) -> Iterator[Row]:
    if cases is None:
        yield from exact_routing(device)
    for case in [*odd_cases(), *model_cases()] if cases is None else cases:
        x = torch.randn(case.tokens, case.hidden, dtype=getattr(torch, case.dtype), device=device)
        weights = case.weights(device)
        ours = {
            name: functools.partial(grouped_gemm.run, **case.form, kernel=kernel, config=config)
            for name, (kernel, config) in case.candidates(x, weights).items()
        }
        torchs = functools.partial(grouped_gemm.experts_ref, **case.form)
        form = Form("", ours, torchs, (x, *routed(case, device, seed=0), *weights))
        yield check_exact(case.what, [form], device, may_refuse=case.is_odd)
        del weights, form
        release(device)


def exact_routing(
    device: str,
    run=routing_kernels.run_route,
    sort=routing_kernels.run_sort,
    lost_note=lost.lost_note,
    routers=ROUTERS,
    tokens=(1, 33, 4096),
    dtypes=DTYPES,
) -> Iterator[Row]:
    """The kernels that choose experts and sort tokens by them: integers equal to torch's."""
    for (num_experts, top_k), dtype in itertools.product(routers, dtypes):
        logits = distinct_scores(max(tokens), num_experts, device).to(getattr(torch, dtype))
        forms = []
        for (scoring, renormalise), t in itertools.product(SCORINGS, tokens):
            given = {"top_k": top_k, "scoring": scoring, "renormalise": renormalise}
            ours, torchs = functools.partial(run, **given, dtype=None), functools.partial(_routed, **given)
            name = f"{scoring}{' renormalised' * renormalise} T={t}"
            forms.append(Form(name, {"route": ours}, torchs, (logits[:t],)))
        yield check_exact(f"route, {num_experts} experts, top {top_k}, {dtype}", forms, device)
    for num_experts, top_k in routers:
        forms = []
        for kind, t in itertools.product(ROUTINGS, tokens):
            index = routed(Case("", num_experts, top_k, 0, 0, t, "float32", kind), device, seed=0)[0]
            index[t // 2, 0] = num_experts  # one that there is not
            noted = torch.tensor([t // 2 + 1, num_experts, num_experts])
            ours = functools.partial(_sorted_and_noted, sort, lost_note, num_experts)
            by_torch = routing.sort_by_expert_ref
            torchs = functools.partial(_sorted_and_noted, by_torch, lambda *_, noted=noted: noted.clone(), num_experts)
            forms.append(Form(f"{kind} T={t}", {"sort": ours}, torchs, (index,)))
        yield check_exact(f"sort by expert, {num_experts} experts, top {top_k}", forms, device)


def _routed(logits: torch.Tensor, top_k: int, scoring: str, renormalise: bool) -> list[torch.Tensor]:
    """`route_ref` that stays in float64 where it is given float64."""
    index, weights = routing.route_ref(logits, top_k, scoring, renormalise, None)
    if logits.dtype != torch.float64:
        return [index, weights]
    chosen = logits.gather(1, index)
    if scoring == "sigmoid":
        return [index, chosen.sigmoid()]
    over_chosen = renormalise or scoring == "softmax_top_k"
    return [index, chosen.softmax(-1) if over_chosen else logits.softmax(-1).gather(1, index)]


def _sorted_and_noted(sort, lost_note, num_experts: int, index: torch.Tensor) -> list[torch.Tensor]:
    """Slots and offsets, and what the host is told of the first token whose expert there is not, and then forgets."""
    found = sort(index, num_experts)
    if index.is_cuda:
        torch.cuda.synchronize(index.device)
    note = lost_note(index.device, "expert")
    told = note.clone()
    note.zero_()
    return [*found, told]


def steady_cases() -> list[Case]:
    kept = [c for c in model_cases() if c.dtype == "bfloat16" and c.tokens in (1, 16, 64, 4096)]
    kept = [c for c in kept if c.routing == "even" and "tp8" in c.name]
    odd = [c for c in odd_cases() if c.dtype == "bfloat16" and c.tokens in (33, 300) and c.is_transposed]
    return kept + [c for c in odd if c.width == 400]


def steady(options: Options, device: str = "cuda", cases: Iterable[Case] | None = None) -> Iterator[Row]:
    for case in steady_cases() if cases is None else cases:
        weights = case.weights(device)
        x = torch.empty(case.tokens, case.hidden, dtype=getattr(torch, case.dtype), device=device)
        makers = {
            name: functools.partial(_call, case, weights, kernel, config, device)
            for name, (kernel, config) in case.candidates(x, weights).items()
        }
        yield check_steady(f"{case.what}, routed anew", makers, device)


def _call(case: Case, weights: tuple[torch.Tensor, torch.Tensor], kernel: str, config: Any, device: str) -> Call:
    """From the router's logits to the experts' sum: each draw hits other experts, in other numbers."""
    dtype = getattr(torch, case.dtype)
    x = torch.empty(case.tokens, case.hidden, dtype=dtype, device=device)
    logits = torch.empty(case.tokens, case.num_experts, dtype=dtype, device=device)

    def draw(seed: int) -> None:
        generator = seeded(seed, device)
        x.normal_(generator=generator)
        logits.copy_(distinct_scores(case.tokens, case.num_experts, device, generator))
        if seed % 2:
            logits.copy_(logits[:1].clone().expand_as(logits))  # all tokens to the same experts

    def run() -> torch.Tensor:
        index, top_k_weights = routing.route(logits, case.top_k, "softmax", True, torch.float32)
        return grouped_gemm.run(x, index, top_k_weights, *weights, **case.form, kernel=kernel, config=config)

    return Call(draw, run)

"""Every candidate of every op as exact as torch, against float64: on the shapes of models and on odd ones.

Each result is written into a block of columns of a tensor full of NaN, so that what is not written, or written beside
it, shows. On odd shapes also bias, residual, activations, separate gate and up, and a limit on the multiprocessors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from bench.gpu_section import Options, Row
from bench.on_gpu.cases import (
    M_DECODE,
    M_PREFILL,
    Case,
    Faults,
    compiled_ahead,
    is_framed,
    model_cases,
    odd_cases,
    poisoned_block,
)
from bench.on_gpu.errors import against

NUM_SMS = 7


@dataclass(frozen=True)
class Form:
    """One way to call an op: operands beside x and w, and what torch makes of them.

    Attributes:
        torchs: (x, w) -> y, in the dtype of x: torch's own result, and in float64 the truth.
        halves: gate and up are passed one by one.
    """

    name: str
    torchs: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    operands: dict[str, Any] = field(default_factory=dict)
    halves: bool = False


def forms(case: Case, x: torch.Tensor) -> list[Form]:
    """The ways to call `case.op`; on a model's shape the plain one."""
    plain = Form("", case.op.torchs)
    if not case.is_odd:
        return [plain]
    bias = torch.randn(case.op.stacked * case.n, dtype=x.dtype, device=x.device)
    gelu_tanh = functools.partial(F.gelu, approximate="tanh")
    if case.op.name == "gated_gemm":
        silu = functools.partial(gated, bias=bias, act=F.silu)
        gelu = functools.partial(gated, bias=None, act=F.gelu)
        tanh = functools.partial(gated, bias=None, act=gelu_tanh)
        return [plain, Form(" bias", silu, {"bias": bias}, halves=True), Form(" gelu", gelu, {"activation": "gelu"}),
                Form(" gelu_tanh", tanh, {"activation": "gelu_tanh"})]  # fmt: skip
    residual = torch.randn(case.m, case.n, dtype=x.dtype, device=x.device)

    def activated(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return gelu_tanh(F.linear(x, w, bias.to(x.dtype))) + residual.to(x.dtype)

    every = {"bias": bias, "activation": "gelu_tanh", "residual": residual}
    return [
        plain,
        Form(" bias", lambda x, w: F.linear(x, w, bias.to(x.dtype)), {"bias": bias}),
        Form(" residual", lambda x, w: F.linear(x, w) + residual.to(x.dtype), {"residual": residual}),
        Form(" bias, gelu_tanh, residual", activated, every),
    ]


def gated(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, act: Callable) -> torch.Tensor:
    gate, up = F.linear(x, w, None if bias is None else bias.to(x.dtype)).chunk(2, -1)
    return act(gate) * up


@torch.inference_mode()
def check(case: Case, device: str) -> Row:
    """One row: the worst candidate's errors over torch's, and what is wrong with which."""
    x, w = case.operands(device)
    faults = Faults(device, may_refuse=case.is_odd)
    worst: dict[str, float] = {"max_ratio": 0.0, "rms_ratio": 0.0}
    candidates = compiled_ahead(case, x, w)
    for form in forms(case, x):
        torchs, want = form.torchs(x, w), form.torchs(x.double(), w.double())
        weights = w.chunk(2) if form.halves else (w,)
        for name, (kernel, config) in candidates.items():
            run = functools.partial(case.op.kernels.run, x, *weights, kernel=kernel, config=config, **form.operands)
            faults.check(name + form.name, functools.partial(fault, run, want, torchs, case.is_odd, worst))
    return faults.row(case.what, **worst)


def fault(run: Callable, want: torch.Tensor, torchs: torch.Tensor, is_limited: bool, worst: dict[str, float]) -> str:
    """What is wrong with one candidate's result; its errors go into `worst`."""
    wide, out = poisoned_block(*want.shape, like=torchs)
    run(out=out)
    error = against(want, out, torchs)
    for which in worst:
        worst[which] = max(worst[which], error[which] or 0.0)
    if not error["is_ok"]:
        ratios = (f"{error[which]:.3g}" if error[which] is not None else "inf" for which in worst)
        return "max and RMS error are {} and {} times torch's".format(*ratios)
    if not is_framed(wide):
        return "it writes beside its block of columns"
    if is_limited and not against(want, run(num_sms=NUM_SMS), torchs)["is_ok"]:
        return f"with num_sms={NUM_SMS} its error is more than twice torch's"
    return ""


def rows(options: Options, device: str = "cuda", cases: Iterable[Case] | None = None) -> Iterator[Row]:
    for case in [*odd_cases(), *model_cases(M_DECODE + M_PREFILL)] if cases is None else cases:
        yield check(case, device)
        if device == "cuda":
            torch.cuda.empty_cache()

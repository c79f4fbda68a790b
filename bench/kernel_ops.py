"""What bench/ knows of each op: its operands, torch's way to the same result, the kernels to choose from, its cost.

To add an op: one `Op` in `OPS`; a subclass, where its operands are others than those of a GEMM.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch

from bench.kernel_shapes import KernelShape
from bench.timing import copies, num_copies
from tp_runtime.estimate import Device


@dataclass(frozen=True)
class Op:
    """An op whose kernel is chosen by measurement: y[M, N] of x[M, K] and weights [stacked * N, K].

    Args:
        name: its name in the tables. `kernels/<name>.py` offers candidates(m, n, k, dtype), run(x, w, kernel=, config=)
            and <name>_ref(x, w).
        roles: the roles in `kernel_shapes` that the layers serve with it.
        stacked: how many rows of weights make one output feature.
        num_experts, top_k: of a MoE layer, and how many of them a token takes; 0 for a dense one.
    """

    name: str
    roles: tuple[str, ...]
    stacked: int = 1
    num_experts: int = 0
    top_k: int = 0

    @property
    def kernels(self) -> ModuleType:
        return importlib.import_module(f"tp_runtime.kernels.{self.name}")

    def on(self, shape: KernelShape) -> Op:
        """The op as the tables have it, where its name tells more of a shape than N and K do."""
        return self

    def size(self, shape: KernelShape) -> tuple[int, int]:
        """N and K, as the op looks them up."""
        return shape.n // self.stacked, shape.k

    def candidates(self, m: int, n: int, k: int, dtype: torch.dtype) -> list[tuple[str, Any]]:
        """(kernel, configuration) to measure."""
        return list(self.kernels.candidates(m, n, k, dtype))

    def operands(self, m: int, n: int, k: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, Any]:
        """Random x [m, k], and a sequence of weights to take in turn: [copies, stacked * n, k]."""
        x = torch.randn(m, k, dtype=dtype, device=device)
        return x, copies(self.stacked * n, k, like=x)

    def torchs(self, x: torch.Tensor, w: Any) -> torch.Tensor:
        """Torch's way: what runs where no kernel is chosen."""
        return getattr(self.kernels, f"{self.name}_ref")(x, w)

    def has_torch(self, x: torch.Tensor, w: Any) -> bool:
        """Whether torch's way can be recorded, and so compared."""
        return True

    def exact(self, x: torch.Tensor, w: Any) -> torch.Tensor:
        """The reference, in float64."""
        return self.torchs(x.double(), w.double())

    def ours(self, x: torch.Tensor, w: Any, kernel: str, config: Any) -> torch.Tensor:
        return self.kernels.run(x, w, kernel=kernel, config=config)

    def bytes(self, m: int, n: int, k: int, item: int) -> int:
        """The fewest that one call moves: each operand read once, y written once."""
        return item * (self.stacked * n * k + m * k + m * n)

    def flops(self, m: int, n: int, k: int) -> int:
        return 2 * m * self.stacked * n * k

    def limit_us(self, m: int, n: int, k: int, item: int, device: Device) -> float:
        """The time that neither the device's memory nor, in 16 bits, its tensor cores can beat, by its data sheet."""
        return max(
            self.bytes(m, n, k, item) / device.memory_gbps / 1e3, self.flops(m, n, k) / device.bf16_tflops / 1e6
        )


class Experts(NamedTuple):
    """The experts of a layer, and which of them the tokens take."""

    gate_up: torch.Tensor  # [E, 2 * n, k]
    down: torch.Tensor  # [E, k, n]
    index: torch.Tensor  # [m, top_k]
    weights: torch.Tensor  # [m, top_k]

    def call(self, function: Any, x: torch.Tensor, **chosen: Any) -> torch.Tensor:
        """`function` on the first tokens."""
        return function(x, self.index[: len(x)], self.weights[: len(x)], self.gate_up, self.down, **chosen)

    def double(self) -> Experts:
        return Experts(self.gate_up.double(), self.down.double(), self.index, self.weights)


@dataclass(frozen=True)
class ExpertsOp(Op):
    """The routed experts of a MoE layer: y[M, K] of x[M, K]; N is the width of an expert.

    In the tables its name holds the number of experts and how many a token takes: `experts_8_2`.
    """

    @property
    def kernels(self) -> ModuleType:
        return importlib.import_module("tp_runtime.kernels.grouped_gemm")

    def on(self, shape: KernelShape) -> ExpertsOp:
        name = self.kernels.op_name(shape.num_experts, shape.top_k)
        return replace(self, name=name, num_experts=shape.num_experts, top_k=shape.top_k)

    def operands(self, m: int, n: int, k: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, Any]:
        """Random x [m, k], and experts to take in turn, the tokens choosing others of each, evenly by chance."""
        x = torch.randn(m, k, dtype=dtype, device=device)
        ws = []
        for _ in range(num_copies(round(self._num_hit(1) * 3 * n * k) * dtype.itemsize, device)):
            gate_up = torch.empty(self.num_experts, 2 * n, k, dtype=dtype, device=device).normal_(std=k**-0.5)
            down = torch.empty(self.num_experts, k, n, dtype=dtype, device=device).normal_(std=n**-0.5)
            weights, index = torch.rand(m, self.num_experts, device=device).topk(self.top_k)
            ws.append(Experts(gate_up, down, index, weights / weights.sum(1, keepdim=True)))
        return x, ws

    def torchs(self, x: torch.Tensor, w: Experts) -> torch.Tensor:
        return w.call(self.kernels.experts_torch if self.has_torch(x, w) else self.kernels.experts_ref, x)

    def has_torch(self, x: torch.Tensor, w: Experts) -> bool:
        return not x.is_cuda or self.kernels.has_grouped_mm(x, w.gate_up, w.down)

    def exact(self, x: torch.Tensor, w: Experts) -> torch.Tensor:
        return w.double().call(self.kernels.experts_ref, x.double())

    def ours(self, x: torch.Tensor, w: Experts, kernel: str, config: Any) -> torch.Tensor:
        return w.call(self.kernels.run, x, kernel=kernel, config=config)

    def _num_hit(self, m: int) -> float:
        """Experts that m tokens take between them, on average."""
        return self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** m)

    def bytes(self, m: int, n: int, k: int, item: int) -> int:
        return round(item * (self._num_hit(m) * 3 * n * k + 2 * m * k))

    def flops(self, m: int, n: int, k: int) -> int:
        return 2 * m * self.top_k * 3 * n * k


class Held(NamedTuple):
    """The caches of m sequences, full but for the new token; the angles of its place."""

    keys: torch.Tensor  # [m, H_kv, n, k]
    values: torch.Tensor
    cos: torch.Tensor  # [1, 1, 1, k]
    signed_sin: torch.Tensor

    def call(self, function: Any, x: torch.Tensor, **chosen: Any) -> torch.Tensor:
        """`function` on the first sequences."""
        caches = self.keys[: len(x)], self.values[: len(x)]
        scale = self.keys.shape[3] ** -0.5
        return function(x, self.cos, self.signed_sin, *caches, self.keys.shape[2] - 1, scale, **chosen)

    def double(self) -> Held:
        return Held(*(tensor.double() for tensor in self))


@dataclass(frozen=True)
class AttentionOp(Op):
    """Decode attention with rope and the cache's new token: y[M, 1, H * K] of qkv [M, 1, (H + 2 * H_kv) * K]; N is how
    many tokens a cache has room for, K the head size.

    In the tables its name holds the query and the key/value heads: `attention_32_8`.
    """

    num_heads: int = 0
    num_kv_heads: int = 0

    @property
    def kernels(self) -> ModuleType:
        return importlib.import_module("tp_runtime.kernels.rope_decode_attention")

    def on(self, shape: KernelShape) -> AttentionOp:
        heads = {"num_heads": shape.num_heads, "num_kv_heads": shape.num_kv_heads}
        return replace(self, name=self.kernels.op_name(**heads), **heads)

    def candidates(self, m: int, n: int, k: int, dtype: torch.dtype) -> list[tuple[str, Any]]:
        kernels = importlib.import_module("tp_runtime.kernels.decode_attention_launch")
        return [("split", config) for config in kernels.CANDIDATES["split"]]

    def operands(self, m: int, n: int, k: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, Any]:
        x = torch.randn(m, 1, (self.num_heads + 2 * self.num_kv_heads) * k, dtype=dtype, device=device)
        angles = torch.randn(2, 1, 1, 1, k, dtype=dtype, device=device)
        item = self.bytes(m, n, k, dtype.itemsize)
        shape = m, self.num_kv_heads, n, k
        return x, [
            Held(*torch.randn(2, *shape, dtype=dtype, device=device), *angles) for _ in range(num_copies(item, device))
        ]

    def torchs(self, x: torch.Tensor, w: Held) -> torch.Tensor:
        return w.call(self.kernels.run, x, kernel="torch")

    def exact(self, x: torch.Tensor, w: Held) -> torch.Tensor:
        return w.double().call(self.kernels.rope_decode_attention_ref, x.double())

    def ours(self, x: torch.Tensor, w: Held, kernel: str, config: Any) -> torch.Tensor:
        return w.call(self.kernels.run, x, kernel=kernel, config=config)

    def bytes(self, m: int, n: int, k: int, item: int) -> int:
        return item * m * k * (2 * self.num_kv_heads * n + 2 * self.num_heads + 2 * self.num_kv_heads)

    def flops(self, m: int, n: int, k: int) -> int:
        return 4 * m * self.num_heads * n * k


@dataclass(frozen=True)
class TopKOp(Op):
    """The k largest of M rows of logits, in this order; N is a rank's part of the vocabulary, K is k.

    The logits are the same at each call: they come from lm_head, and lie in L2.
    """

    def candidates(self, m: int, n: int, k: int, dtype: torch.dtype) -> list[tuple[str, Any]]:
        kernels = importlib.import_module("tp_runtime.kernels.vocab_top_k_kernel")
        return [("top_k", config) for config in kernels.CANDIDATES["top_k"]]

    def operands(self, m: int, n: int, k: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, Any]:
        return torch.randn(m, n, dtype=dtype, device=device), [k]

    def torchs(self, x: torch.Tensor, w: int) -> torch.Tensor:
        return self.kernels.vocab_top_k_ref(x, w)[0]

    def exact(self, x: torch.Tensor, w: int) -> torch.Tensor:
        return x.double().topk(w).values

    def ours(self, x: torch.Tensor, w: int, kernel: str, config: Any) -> torch.Tensor:
        run = importlib.import_module("tp_runtime.kernels.vocab_top_k_kernel").run
        return run(x, w, config=config)[0]

    def bytes(self, m: int, n: int, k: int, item: int) -> int:
        return item * m * n + 12 * m * k  # a float32 and an int64 each

    def flops(self, m: int, n: int, k: int) -> int:
        return m * n


# The ops of dense layers: one matrix of weights.
OPS = {
    op.name: op
    for op in (
        Op("gemm", ("qkv", "o", "up", "down", "shared_down", "lm_head")),
        Op("gated_gemm", ("gate_up", "shared_gate_up"), stacked=2),
    )
}
TUNABLE = {
    **OPS,
    "attention": AttentionOp("attention", ("attention",)),
    "vocab_top_k": TopKOp("vocab_top_k", ("top_k",)),
    "experts": ExpertsOp("experts", ("experts_gate_up",), stacked=2),
}


def op_named(name: str) -> Op:
    """An op by its name in the tables, `experts_8_2`, `attention_32_8`, or by that of all its kind, `experts`.

    Raises:
        ValueError: there is none.
    """
    if found := re.fullmatch(r"experts_([1-9]\d{0,3})_([1-9]\d{0,3})", name):
        return replace(TUNABLE["experts"], name=name, num_experts=int(found[1]), top_k=int(found[2]))
    if found := re.fullmatch(r"attention_([1-9]\d{0,3})_([1-9]\d{0,3})", name):
        return replace(TUNABLE["attention"], name=name, num_heads=int(found[1]), num_kv_heads=int(found[2]))
    if name not in TUNABLE:
        raise ValueError(f"there is no op {name!r}; choose of {', '.join(TUNABLE)}")
    return TUNABLE[name]

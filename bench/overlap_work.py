"""What bench_overlap measures: the part of one rank in a computation that ends in an all-reduce, random weights.

    o, down          a row-parallel GEMM
    experts_down     the experts of a MoE layer, one module from their gate to their sum
    layers           decoder layers, a prompt through all of them: what lanes can cut

Each goes through tp_runtime's own modules, so that `overlap.mode` and `overlap.comm` decide what happens. And each
knows how its results are judged: against those of the sequential schedule on the same operands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch

from bench.kernel_shapes import KernelShape, kernel_shapes, scaled
from bench.on_gpu.end_to_end import BESIDE_SIZES, random_rank
from bench.on_gpu.errors import against
from bench.timing import num_copies
from tp_runtime.comm import Communicator
from tp_runtime.experts import ParallelExperts, ParallelMoE
from tp_runtime.kernels.grouped_gemm import experts_ref
from tp_runtime.layers import RowParallelLinear
from tp_runtime.overlap import Overlap
from tp_runtime.patching import patch_of
from tp_runtime.plan import make_plan

# Of such weights two in turn are enough: L2 holds a tenth. And of any on a CPU: its GEMMs are bound by arithmetic.
LARGE_BYTES = 1 << 29
_ADDENDS = 16  # of each rank, in an exact sum: of 8 ranks' no sum exceeds 128, and bfloat16 holds integers up to 256

Run = Callable[[], torch.Tensor]


class Work:
    """What is run with `M` tokens, again and again.

    Attributes:
        overlap: of all the modules within.
        copies: how many sets of weights are taken in turn.
    """

    def __init__(self, role: str, overlap: Overlap, copies: int):
        self.role, self.overlap, self.copies = role, overlap, copies

    def draw(self, m: int) -> None:
        """Another input, of m tokens."""
        raise NotImplementedError

    def __call__(self, i: int) -> torch.Tensor:
        """One pass with the i-th weights, as `overlap` says."""
        raise NotImplementedError

    def faults(self, runs: Mapping[str, Run]) -> list[str]:
        """What is wrong with the results of `runs`, passes with the first weights; the first of them is sequential."""
        raise NotImplementedError


class Linear(Work):
    """y = sum over ranks of x_shard_k @ w_shard_k.T."""

    def __init__(self, shape: KernelShape, in_features: int, dtype: torch.dtype, comm: Communicator):
        super().__init__(shape.role, Overlap(comm), _copies(shape.n * shape.k * dtype.itemsize, comm.device))
        self._like = torch.empty(0, dtype=dtype, device=comm.device)
        make = partial(RowParallelLinear, in_features, shape.k, shape.n, False, self._like, self.overlap)
        self._layers = [make() for _ in range(self.copies)]
        torch.manual_seed(comm.rank)
        for layer in self._layers:
            layer.weight.data.normal_(std=in_features**-0.5)

    def draw(self, m):
        self._x = torch.randn(m, self._layers[0].in_features_local, dtype=self._like.dtype, device=self._like.device)

    def __call__(self, i):
        return self._layers[i](self._x)

    def faults(self, runs):
        """Sums of few small integers have the same bits in every order."""
        x, weight = self._x, self._layers[0].weight.data
        kept = weight.clone()
        where = torch.randint(x.shape[1], (len(x), _ADDENDS), device=x.device)
        self._x = torch.zeros_like(x).scatter_(1, where, torch.ones_like(x[:, :1]).expand(where.shape))
        weight.copy_(torch.randint(-1, 2, weight.shape, device=x.device))
        mine = self._x.double() @ weight.double().T
        want = self.overlap.comm.all_reduce(mine.to(x.dtype))
        found = [
            f"{name}: has other bits than the exact sum" for name, run in runs.items() if not torch.equal(run(), want)
        ]
        weight.copy_(kept)
        self._x = x
        return found


class Experts(Work):
    """y = sum over ranks of experts(x)."""

    def __init__(self, shape: KernelShape, dtype: torch.dtype, comm: Communicator):
        num_bytes = 3 * shape.num_experts * shape.n * shape.k * dtype.itemsize
        super().__init__(shape.role, Overlap(comm), _copies(num_bytes, comm.device))
        self._shape, like = shape, torch.empty(0, dtype=dtype, device=comm.device)
        make = partial(ParallelExperts, shape.num_experts, shape.k, shape.n, "silu", like, self.overlap)
        self._layers = [make() for _ in range(self.copies)]
        for layer in self._layers:
            for weight in layer.parameters():
                weight.data.normal_(std=weight.shape[-1] ** -0.5)

    def draw(self, m):
        like, shape = self._layers[0].down_proj, self._shape
        generator = torch.Generator().manual_seed(m)  # every rank routes the same tokens
        self._x = torch.randn(m, shape.n, generator=generator).to(like)
        weights, index = torch.rand(m, shape.num_experts, generator=generator).topk(shape.top_k)
        self._index, self._weights = index.to(like.device), (weights / weights.sum(1, keepdim=True)).to(like)

    def __call__(self, i):
        return self._layers[i](self._x, self._index, self._weights)

    def faults(self, runs):
        wide = [t.double() for t in (self._layers[0].gate_up_proj, self._layers[0].down_proj)]
        mine = experts_ref(self._x.double(), self._index, self._weights.double(), *wide)
        return _inexact(runs, self.overlap.comm.all_reduce(mine))


class Layers(Work):
    """x through decoder layers, attention included, a prompt of M tokens."""

    def __init__(self, config: dict[str, Any], dtype: torch.dtype, comm: Communicator):
        self._config, self._model = config, random_rank(config, dtype, comm)
        _fix_routing(self._model)
        super().__init__("layers", patch_of(self._model).overlap, 1)

    def draw(self, m):
        like = next(self._model.parameters())
        generator = torch.Generator().manual_seed(m)
        x = torch.randn(1, m, self._config["hidden_size"], generator=generator)
        if num_experts := self._config.get("num_local_experts"):
            x[0, :, :num_experts] = 4 * torch.rand(m, num_experts, generator=generator).argsort(1)
        self._x = x.to(like)

    def __call__(self, i):
        return self._forward(self._model, self._x)

    @staticmethod
    def _forward(model, x: torch.Tensor) -> torch.Tensor:
        return model.model(inputs_embeds=x).last_hidden_state

    def faults(self, runs):
        """Against the same weights and input in a wider dtype: float64 for float32, else float32."""
        comm, dtype = self.overlap.comm, self._x.dtype
        wide = random_rank(self._config, torch.float32, comm)
        patch_of(wide).overlap.mode = "off"
        if dtype == torch.float32:
            wide = wide.double()
        for mine, given in zip(wide.parameters(), self._model.parameters(), strict=True):
            mine.data.copy_(given)
        return _inexact(runs, self._forward(wide, self._x.to(next(wide.parameters()).dtype)).double())


def _fix_routing(model: torch.nn.Module) -> None:
    """No rounding changes which experts a token takes: the first features say it, and no layer changes them."""
    modules = list(model.modules())
    for block in (module for module in modules if isinstance(module, ParallelMoE)):
        router, num_experts = block._modules[block.routing.router], block.experts.num_experts
        router.weight.data.zero_()[:, :num_experts].fill_diagonal_(1)
        block.experts.down_proj.data[:, :num_experts] = 0
        for module in modules:
            if isinstance(module, RowParallelLinear):
                module.weight.data[:num_experts] = 0


def _inexact(runs: Mapping[str, Run], want: torch.Tensor) -> list[str]:
    """Those whose error is more than twice that of the first."""
    results = {name: run().clone() for name, run in runs.items()}
    sequential = next(iter(results.values()))
    errors = {name: against(want, got, sequential) for name, got in results.items()}
    return [f"{name}: {error}" for name, error in errors.items() if not error["is_ok"]]


def _copies(num_bytes: int, device: torch.device) -> int:
    return 2 if device.type == "cpu" or num_bytes > LARGE_BYTES else num_copies(num_bytes, device)


def works(
    model: str, roles: Iterable[str], dtype: torch.dtype, comm: Communicator, scale: int = 1, num_layers: int = 2
) -> list[tuple[str, Callable[[], Work]]]:
    """(role, how it is built) of what the model has of `roles`, as this rank of `comm` holds it.

    Args:
        model: name in `kernel_shapes.MODELS`.
        scale: see `kernel_shapes.scaled`.
        num_layers: of `layers`.
    """
    config = {**scaled(model, scale, num_layers), **BESIDE_SIZES}
    name = str(dtype).removeprefix("torch.")
    mine, whole = (
        {s.role: s for s in kernel_shapes(model, make_plan(config, size, dtype=name), top_k) if s.rank <= comm.rank}
        for top_k in [config.get("num_experts_per_tok", 0)]
        for size in (comm.size, 1)
    )
    found: list[tuple[str, Callable[[], Work]]] = []
    for role in roles:
        if role == "layers":
            found.append((role, partial(Layers, config, dtype, comm)))
        elif role in mine and mine[role].num_experts:
            found.append((role, partial(Experts, mine[role], dtype, comm)))
        elif role in mine:
            found.append((role, partial(Linear, mine[role], whole[role].k, dtype, comm)))
    return found

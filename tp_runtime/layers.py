"""The modules that hold a rank's part of a layer, by Megatron's names.

    W = [W_0; W_1; ...]   cut along N: ColumnParallelLinear. x is whole on every rank, y is cut.
    W = [W_0, W_1, ...]   cut along K: RowParallelLinear. x is cut, y is summed over ranks: one all-reduce.

A column-parallel layer followed by a row-parallel one needs no communication between the two.

A module that replaces one or more Hugging Face modules says with `shards(name)` which part of it is which of their
parameters, by Hugging Face's names within the parent module: loading, patching and unpatching go through these views.
Any part may be empty: a rank may hold no vocabulary, and small models have fewer 16-byte units than ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .comm import Communicator
from .kernels.gated_gemm import gated_gemm
from .kernels.gemm import gemm
from .kernels.rms_norm import AddNorm, rms_norm
from .overlap import Overlap, all_reduce, few_elements, row_parallel
from .plan import Range


def _parameter(*shape: int, like: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=like.dtype, device=like.device), requires_grad=False)


class ColumnParallelLinear(nn.Module):
    """y_shard_n[..., N_r] = x[..., K] @ w_shard_n[N_r, K].T + bias[N_r]: several projections of one input in one GEMM.

    Args:
        parts: name -> local output features, in the order in which they are stacked.
        in_features: K.
        bias: whether there is one.
        like: a tensor of the wanted dtype and device.
    """

    def __init__(self, parts: Mapping[str, int], in_features: int, bias: bool, like: torch.Tensor):
        super().__init__()
        self.parts = dict(parts)
        self.out_features_local = sum(parts.values())
        self.in_features = in_features
        self.weight = _parameter(self.out_features_local, in_features, like=like)
        self.register_parameter("bias", _parameter(self.out_features_local, like=like) if bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = self._parameters  # nn.Module finds `self.weight` only after looking everywhere else
        return gemm(x, p["weight"], p["bias"])

    def activated(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """act(forward(x)), [..., N_r], in the same launch; see `gemm`."""
        p = self._parameters
        return gemm(x, p["weight"], p["bias"], activation=activation)

    def shards(self, name: str) -> dict[str, torch.Tensor]:
        names, sizes = list(self.parts), list(self.parts.values())
        views = {f"{n}.weight": w for n, w in zip(names, self.weight.detach().split(sizes), strict=True)}
        if self.bias is not None:
            views |= {f"{n}.bias": b for n, b in zip(names, self.bias.detach().split(sizes), strict=True)}
        return views

    def extra_repr(self) -> str:
        parts = " + ".join(f"{name} {size}" for name, size in self.parts.items())
        features = f"in_features={self.in_features}, out_features_local={self.out_features_local}"
        return f"{features} ({parts}), bias={self.bias is not None}"


class MergedColumnParallelLinear(ColumnParallelLinear):
    """gate and up, stacked in this order: [2 * I_r, H]."""

    def gated(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """act(x @ w_gate.T) * (x @ w_up.T), [..., I_r], in one pass over x; see `gated_gemm`."""
        p = self._parameters
        return gated_gemm(x, p["weight"], None, p["bias"], activation)


class QKVParallelLinear(ColumnParallelLinear):
    """q, k and v of a rank's heads, stacked in this order: [(H_q + 2 * H_kv) * D, H]."""


class RowParallelLinear(nn.Module):
    """y[..., N] = sum over ranks of x_shard_k[..., K_r] @ w_shard_k[N, K_r].T, + bias[N] once; same bits everywhere.

    Args:
        in_features: K, of all ranks.
        in_features_local: K_r.
        out_features: N.
        overlap: how GEMM and all-reduce are scheduled.
    """

    def __init__(
        self,
        in_features: int,
        in_features_local: int,
        out_features: int,
        bias: bool,
        like: torch.Tensor,
        overlap: Overlap,
    ):
        super().__init__()
        self.overlap, self.in_features = overlap, in_features
        self.in_features_local, self.out_features = in_features_local, out_features
        self._few = few_elements(overlap, in_features_local, out_features, like.itemsize)
        self.weight = _parameter(out_features, in_features_local, like=like)
        self.register_parameter("bias", _parameter(out_features, like=like) if bias else None)

    def forward(
        self, x_shard_k: torch.Tensor, then: AddNorm | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """y; or what `then`, which adds the bias as well, makes of it."""
        p = self._parameters
        return row_parallel(x_shard_k, p["weight"], p["bias"], self.overlap, self.in_features, self._few, then)

    def shards(self, name: str) -> dict[str, torch.Tensor]:
        views = {f"{name}.weight": self.weight.detach()}
        return views if self.bias is None else {**views, f"{name}.bias": self.bias.detach()}

    def extra_repr(self) -> str:
        features = f"in_features_local={self.in_features_local}, out_features={self.out_features}"
        return f"{features}, bias={self.bias is not None}"


def summed(
    linear: RowParallelLinear, x_shard_k: torch.Tensor, then: AddNorm | None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """linear(x), called so that hooks see it, or what `then` makes of it: then there are none."""
    return linear(x_shard_k) if then is None else linear.forward(x_shard_k, then)


class PartialLinear(RowParallelLinear):
    """This rank's part of that sum, [..., N], for who adds it to other parts and reduces all at once; `overlap` tells
    how. The first rank's part has the bias."""

    def forward(self, x_shard_k: torch.Tensor, then: AddNorm | None = None) -> torch.Tensor:
        assert then is None
        p = self._parameters
        return gemm(x_shard_k, p["weight"], p["bias"] if self.overlap.comm.rank == 0 else None)


class VocabParallelEmbedding(nn.Module):
    """y[..., H] = weight[ids], each rank holding rows [start, stop) of the table: one all-reduce, exact in any dtype.

    A rank looks up the tokens of other ranks in a row of zeros that it keeps before its first and after its last row,
    so that a lookup is a clamp and a gather. The first rank has none before and the last none after: there, an id
    outside the vocabulary is the IndexError that it is in `nn.Embedding`.

    Args:
        overlap: how the all-reduce is scheduled, where one launch can sum and norm.
        scale: what the looked-up rows are multiplied with, rounded to the table's dtype before (Gemma).
    """

    def __init__(
        self,
        vocab: Range,
        vocab_size: int,
        hidden_size: int,
        like: torch.Tensor,
        overlap: Overlap,
        scale: float = 1.0,
    ):
        super().__init__()
        self.vocab, self.vocab_size, self.overlap, self.comm = vocab, vocab_size, overlap, overlap.comm
        self.scale = torch.tensor(scale, dtype=like.dtype, device="cpu").item()
        start, stop = vocab
        self._before, self._after = int(start > 0), int(stop < vocab_size)
        self.weight = _parameter(self._before + stop - start + self._after, hidden_size, like=like)
        # The zeros, where there are some; else an index that `F.embedding` refuses.
        self._bounds = self._before - 1, len(self.weight) - self._after
        self.zero_other_rows()

    def zero_other_rows(self) -> None:
        """Call after the memory of `weight` was allocated anew (`to_empty`)."""
        if self._before:
            self.weight.data[0].zero_()
        if self._after:
            self.weight.data[-1].zero_()

    def rows(self) -> torch.Tensor:
        """This rank's rows of the table, [stop - start, H], a view."""
        return self.weight.detach()[self._before : len(self.weight) - self._after]

    def fuses_norm(self) -> bool:
        """Whether `forward` takes a `then`: the same on every rank."""
        return self.comm.fuses_norm and self.overlap.lanes is None

    def forward(self, ids: torch.Tensor, then: AddNorm | None = None):
        """[...] -> [..., H]; or what `then`, which scales as well, makes of that."""
        if self.comm.size == 1:
            rows = F.embedding(ids, self.weight)
        else:
            local = (ids - (self.vocab[0] - self._before)).clamp_(*self._bounds)
            rows = F.embedding(local, self.weight)
            rows = all_reduce(rows, self.overlap, then) if self.fuses_norm() else self.comm.all_reduce(rows)
        return rows if self.scale == 1 or then is not None else rows * self.scale

    def shards(self, name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": self.rows()}

    def extra_repr(self) -> str:
        return f"vocab=[{self.vocab[0]}, {self.vocab[1]}) of {self.vocab_size}, hidden_size={self.weight.shape[1]}"


class ParallelLMHead(nn.Module):
    """logits[..., V] = x[..., H] @ w[V, H].T, each rank computing its part of the vocabulary: one all-gather.

    Args:
        vocab: each rank's part of the vocabulary.
        tied: the embedding whose table this head shares, or None.
        logits_scaling: what Hugging Face's model divides this module's output by, to get its logits.
        logits_scale: what it multiplies it with.
        logits_softcap: what it then caps them with, cap * tanh(logits / cap).
    """

    def __init__(
        self,
        vocab: Sequence[Range],
        hidden_size: int,
        like: torch.Tensor,
        comm: Communicator,
        tied: VocabParallelEmbedding | None = None,
        logits_scaling: float = 1.0,
        logits_scale: float = 1.0,
        logits_softcap: float | None = None,
    ):
        super().__init__()
        self.comm, self.hidden_size = comm, hidden_size
        self.logits_scaling, self.logits_scale, self.logits_softcap = logits_scaling, logits_scale, logits_softcap
        self.lengths = [stop - start for start, stop in vocab]
        self.vocab = vocab[comm.rank]
        object.__setattr__(self, "tied", tied)  # not a child: the embedding stands in the module tree once
        if tied is None:
            self._weight = _parameter(self.lengths[comm.rank], hidden_size, like=like)

    @property
    def weight(self) -> torch.Tensor:
        """[V_r, H]."""
        return self._weight if self.tied is None else self.tied.rows()

    def logits_shard_v(self, x: torch.Tensor) -> torch.Tensor:
        """The model's logits of this rank's part of the vocabulary, [..., V_r]."""
        y = gemm(x, self.weight)
        if self.logits_scaling != 1:
            y = y / self.logits_scaling
        if self.logits_scale != 1:
            y = y * self.logits_scale
        return y if self.logits_softcap is None else torch.tanh(y / self.logits_softcap) * self.logits_softcap

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.comm.all_gather(gemm(x, self.weight), self.lengths)

    def shards(self, name: str) -> dict[str, torch.Tensor]:
        return {} if self.tied is not None else {f"{name}.weight": self.weight.detach()}

    def extra_repr(self) -> str:
        tied = ", tied to the embedding" if self.tied is not None else ""
        return f"in_features={self.hidden_size}, vocab=[{self.vocab[0]}, {self.vocab[1]}) of {sum(self.lengths)}{tied}"


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension; whole on every rank. One op, HF's takes eight."""

    unit_offset = centered = False

    def __init__(self, size: int, eps: float, like: torch.Tensor):
        super().__init__()
        self.weight, self.eps = _parameter(size, like=like), eps
        self._shape = (size,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self._parameters["weight"], self.eps, unit_offset=self.unit_offset, centered=self.centered)

    def shards(self, name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": self.weight.detach()}

    def extra_repr(self) -> str:
        return f"{self._shape}, eps={self.eps}"


class UnitOffsetRMSNorm(RMSNorm):
    """y = x / sqrt(mean(x^2) + eps) * (1 + weight), all in float32, rounded once (Gemma)."""

    unit_offset = True


class LayerNorm(RMSNorm):
    """y = (x - mean(x)) / sqrt(variance(x) + eps) * weight, all in float32, rounded once (Cohere)."""

    centered = True

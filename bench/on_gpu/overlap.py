"""How much communication each schedule hides: the rows of bench_overlap for the sizes of the targets, NCCL emulated.

One GPU is one rank of many; what its peers would send is `bench.emulated_nccl`'s, and every row says so.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator

from bench import overlap_rank
from bench.emulated_nccl import EMULATED, EmulatedCommunicator
from bench.gpu_section import Options, Row
from bench.on_gpu.speed import one_by_one

# model, tp_size: the most communication for its compute first.
MODELS = (("llama-3-70b", 8), ("llama-3-8b", 8), ("mixtral-8x7b", 8), ("llama-3-70b", 2), ("llama-3-8b", 2))
ROLES = ("layers", "o", "down", "experts_down")
M = (1, 64, 512, 1024, 2048, 8192)
REPEATS = 10


def rows(
    options: Options,
    device: str = "cuda",
    models: Iterable[tuple[str, int]] = MODELS,
    ms: Iterable[int] = M,
    repeats: int = REPEATS,
    **narrower,
) -> Iterator[Row]:
    """
    Args:
        narrower: dtype and sizes of `overlap_rank.rows`, where the models are too large.
    """
    group = functools.cache(lambda tp_size: EmulatedCommunicator(tp_size, device))  # each is calibrated once

    def measure(case: tuple[tuple[str, int], str]) -> Iterator[Row]:
        (model, tp_size), role = case
        return overlap_rank.rows([model], [role], ms, group(tp_size), EMULATED, repeats, **narrower)

    return one_by_one(itertools.product(models, ROLES), measure)

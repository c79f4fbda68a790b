"""Plan + device -> what a run should take: bytes, and the time that the memory system cannot beat. Pure arithmetic.

    decode step >= (weights read + key/value cache read) of the slowest rank / memory bandwidth

A communication term comes with measured links; until then the figure is the floor without communication.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .plan import ITEM_BYTES, Plan


@dataclass(frozen=True)
class Device:
    """Data-sheet figures of a GPU, by the name that its driver gives it: memory in GB/s, dense bf16 rate in TFLOP/s."""

    name: str
    memory_gbps: float
    bf16_tflops: float


# Only the boards that the figures belong to: an H100 PCIe has three fifths of that bandwidth, a GH200 other memory.
DEVICES = (
    Device("A100-SXM4-80GB", 2039, 312),
    Device("H100 80GB HBM3", 3350, 989),
    Device("H200", 4800, 989),
    Device("B200", 8000, 2250),
)


def find_device(name: str) -> Device | None:
    """The figures of the GPU of this driver name ("NVIDIA H200"); None where we have none (any CPU)."""
    return next((d for d in DEVICES if name.endswith(" " + d.name)), None)


def decode_read_bytes(plan: Plan, rank: int, batch: int, context: float, experts_per_token: int = 0) -> int:
    """Bytes that `rank` must read for one decode step: each weight once, embedding rows of the batch, the cache.

    Args:
        context: tokens that a sequence holds, on average.
        experts_per_token: top-k of a MoE model. Of E experts a batch of B hits E * (1 - (1 - k / E)^B) on average, if
            tokens choose evenly; where they choose alike, fewer.
    """
    elements = 0.0
    is_tied = not any(p.name == "lm_head.weight" for p in plan.parameters)
    for p in plan.parameters:
        shape = p.local_shape(rank)
        share = 1.0
        if p.style == "embedding_rowwise" and not is_tied:
            share = min(1.0, batch / max(1, shape[0]))
        elif ".experts." in p.name:
            share = 1 - (1 - experts_per_token / shape[0]) ** batch
        elements += share * p.count * math.prod(shape)
    return round(elements * ITEM_BYTES[plan.dtype] + batch * context * plan.kv_cache_bytes_per_token(rank))


def decode_floor_ms(plan: Plan, device: Device, batch: int, context: float, experts_per_token: int = 0) -> float:
    """Milliseconds that one decode step cannot beat on this device, communication left out."""
    reads = max(decode_read_bytes(plan, r, batch, context, experts_per_token) for r in range(plan.tp_size))
    return reads / (device.memory_gbps * 1e9) * 1e3

"""Copies, executed with torch, against the plan's ranges read literally: `whole[start:stop]` of each, put together."""

import random

import pytest
import torch

from tp_runtime.models.adapter import Source, adapter_for
from tp_runtime.plan import ParameterPlan, make_plan
from tp_runtime.shard import copies

CONFIG = {
    "vocab_size": 21, "hidden_size": 12, "intermediate_size": 19, "num_hidden_layers": 1, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 2, "torch_dtype": "float32", "num_experts_per_tok": 1,
}  # fmt: skip
MIXTRAL = {**CONFIG, "model_type": "mixtral", "num_local_experts": 3}
QWEN3_MOE = {**CONFIG, "model_type": "qwen3_moe", "num_experts": 2, "moe_intermediate_size": 11}
LLAMA = {**CONFIG, "model_type": "llama", "attention_bias": True, "mlp_bias": True}


def expected(parameter: ParameterPlan, rank: int, whole: torch.Tensor) -> torch.Tensor:
    dim = parameter.dim or 0
    return torch.cat([whole.narrow(dim, start, stop - start) for start, stop in parameter.ranges[rank]], dim)


def check(parameter: ParameterPlan, rank: int, whole: torch.Tensor, stored: dict[Source, torch.Tensor]) -> None:
    """Executes the copies from all stored tensors; each element must be written once, with the right value."""
    local = torch.full(parameter.local_shape(rank), -1.0)
    written = torch.zeros(local.shape, dtype=torch.int64)
    for source, tensor in stored.items():
        assert tuple(tensor.shape) == source.shape
        for copy in copies(parameter, rank, source):
            part = tensor[copy.stored_index]
            assert part.numel() > 0
            local[copy.local_index] = part.transpose(-1, -2) if copy.transposed else part
            written[copy.local_index] += 1
    assert torch.equal(local, expected(parameter, rank, whole))
    assert (written == 1).all()


def counted(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor whose elements are all different."""
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


@pytest.mark.parametrize("config", [LLAMA, MIXTRAL, QWEN3_MOE], ids=lambda c: c["model_type"])
@pytest.mark.parametrize("tp_size", [1, 2, 3, 5, 6])
def test_every_parameter_from_its_own_tensor(config, tp_size):
    """Catches a wrong slice or an unwritten element where a live model is cut: its tensors are the parameters."""
    plan = make_plan(config, tp_size)
    for name in plan.names():
        parameter = plan.parameter(name)
        whole = counted(parameter.shape)
        for rank in range(tp_size):
            check(parameter, rank, whole, {Source(name, parameter.shape): whole})


@pytest.mark.parametrize("config", [MIXTRAL, QWEN3_MOE], ids=lambda c: c["model_type"])
@pytest.mark.parametrize("tp_size", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("layout", ["one by one", "packed", "transposed"])
def test_experts_in_every_layout(config, tp_size, layout):
    """Catches gate and up exchanged, an expert in another's place, and the packed layout read with rows for columns."""
    plan, adapter = make_plan(config, tp_size), adapter_for(config["model_type"])
    for name in ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"):
        parameter = plan.parameter(name)
        whole = counted(parameter.shape)
        packed = whole.transpose(1, 2).contiguous() if layout == "transposed" else whole
        present = {} if layout == "one by one" else {name: tuple(packed.shape)}
        stored = {}
        for source in adapter.sources(name, parameter.shape, present):
            assert source.transposed == (layout == "transposed")
            if layout == "one by one":  # as the checkpoint's authors wrote them: the gate's rows, then up's
                stored[source] = whole[source.expert, source.row : source.row + source.shape[0]]
            else:
                stored[source] = packed
        assert len(stored) == (1 if present else len(whole) * (2 if name.endswith("gate_up_proj") else 1))
        for rank in range(tp_size):
            check(parameter, rank, whole, stored)


def test_square_experts_are_not_transposed():
    """Catches a layout guessed from a shape that both layouts have: then it is Hugging Face's, [E, N, K]."""
    name, shape = "model.layers.0.mlp.experts.down_proj", (3, 8, 8)
    (source,) = adapter_for("mixtral").sources(name, shape, {name: shape})
    assert not source.transposed


def test_random_ranges():
    """Catches a copy that is right for one range a rank only: seeded shapes, dimensions, ranges, layouts."""
    rng = random.Random(0)
    for _ in range(300):
        shape = tuple(rng.randint(1, 9) for _ in range(rng.randint(1, 3)))
        dim = rng.choice([None, *range(max(0, len(shape) - 2), len(shape))])
        size = shape[dim or 0]
        bounds = sorted(rng.choices(range(size + 1), k=2 * rng.randint(1, 3)))
        ranges = tuple(zip(bounds[::2], bounds[1::2])) if dim is not None else ((0, size),)
        parameter = ParameterPlan("p", "colwise", shape, (), dim, (ranges,))
        whole = counted(shape)
        sources = [Source("p", shape)]
        if len(shape) == 3:
            sources.append(Source("p", (shape[0], shape[2], shape[1]), transposed=True))
        for source in sources:
            check(parameter, 0, whole, {source: whole.transpose(-1, -2) if source.transposed else whole})
        if len(shape) == 3:
            cut = rng.randint(1, shape[1]) if shape[1] > 1 else 1
            boxes = [(0, cut)] + ([(cut, shape[1])] if cut < shape[1] else [])
            pieces = {
                Source(f"p.{e}.{row}", (end - row, shape[2]), expert=e, row=row): whole[e, row:end]
                for e in range(shape[0])
                for row, end in boxes
            }
            check(parameter, 0, whole, pieces)

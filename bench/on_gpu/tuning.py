"""Chooses, by measurement, the kernel of every shape that the report speaks of; the record holds the whole table.

On a machine that keeps nothing, the record is what stays: `python -m bench.report FILE --ship` writes its rows into the
tables of a checkout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from bench.choice import Task
from bench.gpu_section import Options, Row
from bench.kernel_ops import TUNABLE
from bench.kernel_shapes import SKINNY, KernelShape, attention_shapes, model_shapes, shape, top_k_shapes
from bench.on_gpu.speed import experts_cases
from bench.tune import measured, tasks
from tp_runtime.kernels import tuned

# The models of the report, beside the skinny target's shapes: those whose decode step or prefill is measured.
MODELS = (("llama-3-8b", 1), ("llama-3-70b", 8), ("llama-3-8b", 8))


def shapes() -> list[KernelShape]:
    """The shapes of the report. A gate_up stands there twice: the target for skinny GEMMs takes it as a plain one."""
    skinny = [shape(name) for name in SKINNY]
    plain = [replace(s, role="qkv", model=f"{s.model} {s.role} as") for s in skinny if s.role == "gate_up"]
    makers = model_shapes, attention_shapes, top_k_shapes
    return [*skinny, *plain, *(s for make in makers for model, tp_size in MODELS for s in make(model, tp_size))]


def experts_tasks() -> list[Task]:
    """The experts' kernels for every size that is timed."""
    cases = experts_cases()
    return tasks([case.shape for case in cases], [TUNABLE["experts"]], sorted({case.tokens for case in cases}))


def rows(options: Options) -> Iterator[Row]:
    return chosen(options, tasks(shapes()))


def experts(options: Options) -> Iterator[Row]:
    return chosen(options, experts_tasks())


def chosen(options: Options, todo: Sequence[Task]) -> Iterator[Row]:
    """The choice for each task, which is in a table by then."""
    name = tuned.device_name(0)
    file = tuned.shipped_file(name) if options.ship else tuned.user_file(name)
    if file is None:
        raise ValueError("there is no home folder to write to; set XDG_CACHE_HOME or give --ship")
    for task, row in measured(todo, file, name):
        yield {"what": f"{task.name}: {row['kernel']}", "device": name, "tuned": row}

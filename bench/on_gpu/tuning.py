"""Chooses, by measurement, the kernel of every shape that the report speaks of; the record holds the whole table.

On a machine that keeps nothing, the record is what stays: `python -m bench.report FILE --ship` writes its rows into the
tables of a checkout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bench.gpu_section import Options, Row
from bench.kernel_shapes import SKINNY, KernelShape, model_shapes, shape
from bench.tune import measured, tasks
from tp_runtime.kernels import tuned

# The models of the report, beside the skinny target's shapes: those whose decode step or prefill is measured.
MODELS = (("llama-3-8b", 1), ("llama-3-70b", 8), ("llama-3-8b", 8))


def shapes() -> list[KernelShape]:
    """The shapes of the report. A gate_up stands there twice: the target for skinny GEMMs takes it as a plain one."""
    skinny = [shape(name) for name in SKINNY]
    plain = [replace(s, role="qkv", model=f"{s.model} {s.role} as") for s in skinny if s.role == "gate_up"]
    return [*skinny, *plain, *(s for model, tp_size in MODELS for s in model_shapes(model, tp_size))]


def rows(options: Options) -> Iterator[Row]:
    name = tuned.device_name(0)
    file = tuned.shipped_file(name) if options.ship else tuned.user_file(name)
    if file is None:
        raise ValueError("there is no home folder to write to; set XDG_CACHE_HOME or give --ship")
    for task, row in measured(tasks(shapes()), file, name):
        yield {"what": f"{task.name}: {row['kernel']}", "device": name, "tuned": row}

"""The interpreter runs the programs of a grid one after the other; here, last first."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from triton.runtime import interpreter


@contextmanager
def reversed_programs() -> Iterator[None]:
    """Within, the last program of a grid runs first: whoever arrived last arrives first."""
    builder = interpreter.interpreter_builder
    set_grid_idx = builder.set_grid_idx

    def reverse(*program: int) -> None:
        set_grid_idx(*(size - 1 - i for size, i in zip(builder.grid_dim, program)))

    with mock.patch.object(builder, "set_grid_idx", reverse):
        yield

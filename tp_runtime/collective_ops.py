"""The collectives as ops that torch.compile can put into a graph.

    all_reduce_(Tensor(a!) x, int comm) -> ()                   x, summed over ranks in place
    all_gather(Tensor x, SymInt[] lengths, int comm) -> Tensor  every rank's x, along the last dimension

Dynamo can look neither into a process group nor into another thread, and a graph holds tensors and numbers only: a
communicator goes into it as its number. What an op does at run time is the communicator's own method; so eager code
calls that method, and these ops cost it nothing.

Ranks that are threads share dynamo's limit of graphs a function, eight: four of them with two graphs each, prompt and
decode, reach it. More want a larger `torch._dynamo.config.recompile_limit`, set in each thread.

Ranks compile on their own, and a compiler may move ops that do not depend on each other: in one graph, let each
collective depend on the one before it, as in a decoder, or ranks with parts of other sizes may meet in another order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch

_numbers = itertools.count()
_communicators: WeakValueDictionary[int, Any] = WeakValueDictionary()


def enter(comm) -> int:
    """The number by which graphs of this process know `comm`, for as long as it lives."""
    number = next(_numbers)
    _communicators[number] = comm
    return number


def all_reduce(x: torch.Tensor, number: int) -> torch.Tensor:
    """`Communicator.all_reduce` in a graph."""
    torch.ops.tp_runtime.all_reduce_(x, number)
    return x


def all_gather(x: torch.Tensor, lengths: Sequence[int], number: int) -> torch.Tensor:
    """`Communicator.all_gather` in a graph."""
    return torch.ops.tp_runtime.all_gather(x, lengths, number)


def _all_reduce_(x: torch.Tensor, number: int) -> None:
    _numbered(number).all_reduce(x)


def _all_gather(x: torch.Tensor, lengths: Sequence[int], number: int) -> torch.Tensor:
    return _numbered(number).all_gather(x, lengths)


def _numbered(number: int):
    if (comm := _communicators.get(number)) is None:
        raise ValueError(f"communicator {number} of this graph is gone; compile again with one that lives")
    return comm


_LIBRARY = torch.library.Library("tp_runtime", "FRAGMENT")
_LIBRARY.define("all_reduce_(Tensor(a!) x, int comm) -> ()")
_LIBRARY.define("all_gather(Tensor x, SymInt[] lengths, int comm) -> Tensor")
_LIBRARY.impl("all_reduce_", _all_reduce_, "CompositeExplicitAutograd")
_LIBRARY.impl("all_gather", _all_gather, "CompositeExplicitAutograd")
_LIBRARY.impl("all_reduce_", lambda x, comm: None, "Meta")
_LIBRARY.impl("all_gather", lambda x, lengths, comm: x.new_empty(*x.shape[:-1], sum(lengths)), "Meta")

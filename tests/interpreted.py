"""Kernel files a second time, interpreted, beside the ones that Triton compiles: all in one process.

    gemm = interpreted("gemm")      # kernels/gemm.py, executed anew with Triton's interpreter on
    gemm.run(x, w, ...)             # CPU tensors; float16 and float32 (bfloat16 is wrong in the interpreter)

`triton.jit` decides when it decorates whether a function is compiled or interpreted. So the folder `kernels/` is
imported under a second package name, with the decision turned: what a kernel file imports from its neighbours, at its
top or later, is an interpreted copy as well. A copy registers nothing with torch.library: the ops are those of the
first import.

Triton's own library (`tl.sum`, `tl.cdiv`, `tl.softmax`) was decorated when Triton was imported, to be compiled. While
an interpreted kernel runs, a call of such a function is interpreted, too.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch.library
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).resolve().parent.parent
KERNELS, BENCH = ROOT / "kernels", ROOT / "bench"
PACKAGE = "interpreted_kernels"


def interpreted(name: str) -> ModuleType:
    """The interpreted copy of kernels/`name`.py, or of bench/`name`.py: one for the whole process."""
    return importlib.import_module(f"{PACKAGE}.{name}")


@contextmanager
def interpreting() -> Iterator[None]:
    """What is decorated within is interpreted, and what Triton decorated at its own import can be called."""
    with triton.knobs.runtime.scope(), ExitStack() as patches:
        triton.knobs.runtime.interpret = True
        patches.enter_context(mock.patch.object(JITFunction, "__call__", _call))
        patches.enter_context(mock.patch.object(JITFunction, "__get__", _bind, create=True))
        yield


def _call(function: JITFunction, *args, **kwargs):
    return _rewritten(function.fn)(*args, **kwargs)


@functools.cache  # by the plain function: the hash of a JITFunction is that of its source and of all that it calls now
def _rewritten(fn):
    return interpreter.InterpretedFunction(fn).rewrite()


def _bind(function: JITFunction, tensor, owner):
    """`x.sum(0)` is a call of the class attribute `tensor.sum`."""
    return function if tensor is None else functools.partial(function, tensor)


class _Interpreted(interpreter.InterpretedFunction):
    """A kernel that carries the switches along: they are on while it runs, and off again for what is compiled next."""

    def run(self, *args, **kwargs):
        with interpreting():
            core = interpreter._patch_lang(tl.sum.fn)  # for Triton's own library, which says `core` where we say `tl`
            try:
                return super().run(*args, **kwargs)
            finally:
                core.restore()


class _Unregistered:
    """Takes the place of torch.library: any call and any decorator, to no effect."""

    def __getattr__(self, name: str) -> _Unregistered:
        return self

    def __call__(self, *args, **kwargs):
        return args[0] if len(args) == 1 and callable(args[0]) else self


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        with interpreting(), ExitStack() as patches:
            patches.enter_context(mock.patch.object(interpreter, "InterpretedFunction", _Interpreted))
            for name in torch.library.__all__:
                patches.enter_context(mock.patch.object(torch.library, name, _Unregistered()))
            super().exec_module(module)


class _Finder(MetaPathFinder):
    """Finds PACKAGE and the files of `kernels/` and `bench/` as its modules."""

    def find_spec(self, name: str, path=None, target=None):
        package, _, module = name.partition(".")
        if package != PACKAGE:
            return None
        if not module:
            return ModuleSpec(name, None, is_package=True)
        for file in (folder / f"{module}.py" for folder in (KERNELS, BENCH)):
            if file.exists():
                return spec_from_file_location(name, file, loader=_Loader(name, str(file)))
        return None


sys.meta_path.append(_Finder())

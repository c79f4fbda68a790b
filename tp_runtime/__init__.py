"""tp_runtime: tensor-parallel inference for Hugging Face causal language models.

    import tp_runtime
    tp_runtime.patch(model)                       # a live model, in place; every rank calls it
    model = tp_runtime.load("path-or-hub-id")     # each rank reads its slices only
    llm = tp_runtime.LLM("path-or-hub-id", tp_size=4)   # starts its own ranks

Names are resolved on first use: importing this package imports neither torch nor transformers.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "GenerationOptions": "config",
    "RuntimeConfig": "config",
    "Plan": "plan",
    "make_plan": "plan",
    "communicator": "comm",
    "run_local": "local",
    "PatchReport": "patching",
    "load": "loading",
    "load_weights": "loading",
    "patch": "patching",
    "unpatch": "patching",
    "Completion": "completion",
    "LLM": "llm",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__():
    return sorted(__all__)

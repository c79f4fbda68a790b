"""Settings of the whole suite: no network, and tests marked `gpu` skip where there is no CUDA."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub; child processes inherit it
os.environ.pop("PYTEST_XDIST_WORKER", None)  # child processes that run pytest are no workers
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny tensors, and ranks enough for every core


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))

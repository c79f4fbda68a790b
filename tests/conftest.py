"""Settings of the whole suite: no network, and tests marked `gpu` skip where there is no CUDA."""

import os
from collections import Counter

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub; child processes inherit it
os.environ.pop("PYTEST_XDIST_WORKER", None)  # child processes that run pytest are no workers
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny tensors, and ranks enough for every core


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    num_cases: Counter[tuple] = Counter()
    for item in items:
        if item.get_closest_marker("halved") and not item.get_closest_marker("slow"):
            test = item.path, item.originalname
            # The series of Thue and Morse has no period: each value of each parameter stays in about half of its cases.
            if num_cases[test].bit_count() % 2:
                item.add_marker(pytest.mark.slow)
            num_cases[test] += 1
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))

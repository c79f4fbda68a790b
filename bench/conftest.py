"""Stamps the JSON that pytest-benchmark writes (`--benchmark-json`) as every other record is stamped."""

import pytest

from tp_runtime import env


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["tp_runtime"] = env.describe()

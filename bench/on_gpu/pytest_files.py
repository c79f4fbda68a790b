"""`pytest -m gpu`, file by file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.gpu_section import Options, Row

TESTS = Path(__file__).resolve().parents[2] / "tests"
NO_TESTS = pytest.ExitCode.NO_TESTS_COLLECTED


class Outcomes:
    """A pytest plugin that keeps what became of each test."""

    def __init__(self):
        self.passed: list[str] = []
        self.failed: list[str] = []
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed or report.skipped:
            getattr(self, report.outcome).append(report.nodeid)

    def pytest_collectreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)


def files(folder: Path = TESTS) -> list[Path]:
    """The test files in which a test is marked `gpu`."""
    return [file for file in sorted(folder.glob("test_*.py")) if re.search(r"mark\.gpu\b", file.read_text())]


def rows(options: Options, folder: Path = TESTS) -> Iterator[Row]:
    for file in files(folder):
        outcomes = Outcomes()
        # Of pytest's own: one would write a cache into the checkout, the other would take over the guard against hangs.
        flags = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
        code = pytest.main([*flags, str(file)], plugins=[outcomes])
        yield {
            "what": f"{file.name}: {len(outcomes.passed)} passed, {len(outcomes.failed)} failed",
            "passed": len(outcomes.passed), "skipped": outcomes.skipped, "wrong": outcomes.failed,
            "is_ok": code in (0, NO_TESTS) and not outcomes.failed,
        }  # fmt: skip

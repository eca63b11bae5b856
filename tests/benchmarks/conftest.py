"""Benchmarks that tests start."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide from processes started here that tests may run side by side: pytest-benchmark measures nothing then."""
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)

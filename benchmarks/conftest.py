"""Options of the benchmarks, the allocator they run with, and the table at the end."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from memory import keep_heap
from tables import kernel_table
from workloads import SIZES

from semiseg.engine.atomic import write_json
from semiseg.engine.environment import environment

RECORD = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("semiseg benchmarks")
    group.addoption("--results", type=Path, metavar="FILE", help="write the rows as JSON")
    group.addoption(
        "--size", choices=tuple(SIZES), default="full", help="of the inputs; tiny only checks that all runs"
    )
    group.addoption(
        "--allocator",
        choices=("kept", "default"),
        default="kept",
        help="keep freed memory, or glibc's default, where every large tensor pays page faults anew",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORD] = []
    if config.getoption("--allocator") == "kept":
        keep_heap()


@pytest.fixture
def size(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--size")


@pytest.fixture
def allocator(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--allocator")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return request.config.stash[RECORD]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[RECORD]
    if not rows:
        return
    command = shlex.join(["pytest", *config.invocation_params.args])
    results = {
        "environment": environment() | {"threads": torch.get_num_threads()},
        "command": command,
        "rows": rows,
    }
    terminalreporter.section("C++ kernels against the reference")
    terminalreporter.write_line(kernel_table(results))
    if file := config.getoption("--results"):
        write_json(file, results)
        terminalreporter.write_line(f"written to {file}")

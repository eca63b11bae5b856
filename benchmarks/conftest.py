"""Options of the benchmarks, the allocator they run with, and the tables at the end."""

import functools
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_tables import convolutions_table, kernel_table, prompt_conv_table
from gpu_tables import gpu_table
from memory import keep_heap
from workloads import SIZES

from semiseg.atomic import write_json
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def size(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--size")


@pytest.fixture
def allocator(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--allocator")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """The rows so far; those a benchmark adds are in the results file even if the run is cut short."""
    yield request.config.stash[RECORD]
    if file := request.config.getoption("--results"):
        write_json(file, results(request.config))


def results(config: pytest.Config) -> dict[str, Any]:
    return {
        "environment": machine(),
        "command": shlex.join(["pytest", *config.invocation_params.args]),
        "rows": config.stash[RECORD],
    }


@functools.cache
def machine() -> dict[str, Any]:
    return environment() | {"threads": torch.get_num_threads()}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.stash[RECORD]:
        return
    all_results = results(config)
    convolutions = "convolution", "strided_convolution", "transposed_convolution"
    for kinds, title, table in (
        (("cpu",), "C++ kernels against the reference", kernel_table),
        (("gpu",), "Triton and CUDA kernels against the reference", gpu_table),
        (("prompt_conv",), "The prompt convolution, folded against concatenated", prompt_conv_table),
        (convolutions, "Convolutions against PyTorch's", convolutions_table),
    ):
        rows = [row for row in all_results["rows"] if row.get("device", row["operation"]) in kinds]
        if rows:
            terminalreporter.section(title)
            terminalreporter.write_line(table(all_results | {"rows": rows}))
    if file := config.getoption("--results"):
        terminalreporter.write_line(f"written to {file}")

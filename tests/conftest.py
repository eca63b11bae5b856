"""Small datasets on disk, and skips for the tests whose marker asks for something this machine lacks."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from h5_files import random_case, write_case, write_left_atrium, write_own

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
if "PYTEST_XDIST_WORKER_COUNT" in os.environ and "OMP_NUM_THREADS" not in os.environ:
    # Tests that run side by side share the cores: threads of one that wait would keep the other's from working.
    threads = max(1, len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that tests start
    torch.set_num_threads(threads)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in a script's background; training leaves it ignored
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels run on the CPU, without being compiled


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "no CUDA device"
    if "SEMISEG_DATA" not in os.environ:
        missing["data"] = "SEMISEG_DATA is not set"
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def convolution_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """The compiled functions that convolutions call, each with its arguments."""
    from semiseg_kernels import available_backends  # which looks for Triton
    from semiseg_kernels.native import convolution, strided_convolution

    if "cpu" not in available_backends():
        pytest.skip("backend 'cpu' is not available here")
    calls: list[tuple[str, dict[str, Any]]] = []
    launch = convolution.launch

    def recorded(backend: str, name: str, *arguments: Any, **options: Any) -> Any:
        calls.append((name, options))
        return launch(backend, name, *arguments, **options)

    for module in (convolution, strided_convolution):
        monkeypatch.setattr(module, "launch", recorded)
    return calls


@pytest.fixture
def left_atrium(tmp_path: Path) -> Path:
    return write_left_atrium(tmp_path)


@pytest.fixture
def acdc(tmp_path: Path) -> Path:
    """An ACDC folder of 3 training patients with 4, 2 and 6 slices, 1 validation and 1 test patient."""
    random = np.random.default_rng(0)
    slices = []
    for patient, count in (("patient030", 2), ("patient002", 1), ("patient011", 3)):
        for frame in ("frame01", "frame02"):
            slices += [f"{patient}_{frame}_slice_{number}" for number in range(count, 0, -1)]
    for name in slices:
        write_case(tmp_path / "data" / "slices" / f"{name}.h5", *random_case(random, (10, 8), 4))
    for name in ("patient005_frame01", "patient005_frame02", "patient007_frame01", "patient007_frame02"):
        write_case(tmp_path / "data" / f"{name}.h5", *random_case(random, (3, 10, 8), 4))
    (tmp_path / "train_slices.list").write_text("\n".join(slices) + "\n")
    (tmp_path / "val.list").write_text("patient005_frame01\npatient005_frame02\n")
    (tmp_path / "test.list").write_text("patient007_frame01\npatient007_frame02\n")
    return tmp_path


@pytest.fixture
def two_channels(tmp_path: Path) -> Path:
    """Volumes of own data with two channels."""
    return write_own(tmp_path / "two_channels", dimensions=3, channels=2)


@pytest.fixture
def slices_of_two_channels(tmp_path: Path) -> Path:
    return write_own(tmp_path / "slices_of_two_channels", dimensions=2, channels=2)

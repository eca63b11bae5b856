"""Backends to test, and memory that is never silently right."""

import zlib
from collections.abc import Callable, Iterator

import pytest
import torch
from emulation import emulated_cuda_module, missing_tools

from semiseg_kernels import backends, use_backend
from semiseg_kernels.backends import BACKENDS


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, or the largest integer: no unwritten output can pass."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend, forced; skips those that cannot run here."""
    yield from _forced(request.param)


@pytest.fixture(params=[name for name in BACKENDS if name != "reference"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that is compared with the reference, forced; skips those that cannot run here."""
    yield from _forced(request.param)


def _forced(name: str) -> Iterator[str]:
    """Force a backend, and create tensors where it computes."""
    if name == "cuda" and not torch.cuda.is_available() and missing_tools() is None:
        emulated_cuda_module()
    reason = backends.missing(name)
    if reason is not None:
        pytest.skip(f"backend {name!r} cannot run here: {reason}")
    device = "cpu" if name == "reference" else backends.device_type(name)
    with use_backend(name), torch.device(device):
        yield name

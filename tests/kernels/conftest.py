"""Backends to test, and memory that is never silently right."""

import functools
import importlib.util
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from emulation import emulated_cuda_module, missing_tools
from hypothesis import settings

from semiseg_kernels import backends, use_backend
from semiseg_kernels.backends import BACKENDS

# More voxels, classes or channels than an interpreter or an emulator gets through; a GPU runs them all.
LARGE = (
    "many chunks", "chunks across images", "four_million", "test_same_bits", "saved_for_backward", "512 classes",
    "many classes", "many channels",
)  # fmt: skip

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from triton.runtime import interpreter

    # Three quarters of the interpreter's time are of no use here: it patches triton.language anew in every function
    # that is called, and computes every integer once more, to find overflow.
    interpreter._patch_lang = functools.cache(interpreter._patch_lang)
    interpreter._LangPatchScope.restore = lambda scope: None
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

settings.register_profile("default", derandomize=True, deadline=None, max_examples=50)
settings.register_profile("thorough", deadline=None, max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU, leave out the tests that would take the GPU's backends minutes."""
    left_out = [item for item in items if _is_left_out(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def _is_left_out(item: pytest.Item) -> bool:
    parameters, name = _parameters(item), _backend(item)
    if name == "reference" and parameters.get("layout") == "channels_last" and "one_graph" in item.name:
        return True  # PyTorch's own operations
    if name not in ("cuda", "triton") or torch.cuda.is_available():
        return False
    opcheck, never_copied = "opcheck" in item.nodeid.lower(), "never_copied" in item.name
    if never_copied and name == "triton":
        return True  # Triton's interpreter itself copies what it is given
    operation = getattr(getattr(item, "module", None), "OPERATION", None)
    if operation is None or operation in backends.OPERATIONS["cpu"]:
        # Graphs and fakes are those of the operation on the CPU, the launches of CUDA too.
        if "one_graph" in item.name or "inductor" in item.name:
            return True
        if name == "cuda" and (opcheck or never_copied):
            return True
    # Triton's interpreter computes in numpy, where one narrow type stands for both; each in one memory format.
    narrow = (parameters.get("dtype"), parameters.get("layout"))
    left_out = {(torch.bfloat16, "contiguous"), (torch.float16, "channels_last")}
    path = parameters.get("case", parameters.get("path"))
    one_of_many = opcheck or path not in (None, "3d", "registers")
    fewer = name == "triton" and narrow[0] in ((torch.float16, torch.bfloat16) if one_of_many else (torch.float16,))
    return narrow in left_out or fewer or any(large in item.name for large in LARGE)


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})


def _backend(item: pytest.Item) -> str | None:
    """The backend that a test is about."""
    if "triton" in getattr(item, "fixturenames", ()):
        return "triton"
    return _parameters(item).get("kernel", _parameters(item).get("backend"))


@pytest.fixture(autouse=True)
def small_programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, the few voxels of a test fill several programs of Triton's, instead of a part of one."""
    if _backend(request.node) == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        monkeypatch.setattr("semiseg_kernels.triton.configurations.VOXELS_PER_PROGRAM", 64)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Iterator[None]:
    """Skip where Triton says that it takes fewer prototypes; test_triton.py knows how many."""
    try:
        return (yield)
    except ValueError as error:
        if "its tiles have no room for" in str(error):
            pytest.skip(str(error))
        raise


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


@pytest.fixture(params=["baseline", "v3", "v4"])
def level(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each x86-64 level of the CPU kernels that can run here."""
    module = pytest.importorskip("semiseg_kernels._C")
    if request.param not in module.levels():
        pytest.skip(f"level {request.param} cannot run here")
    module.use_level(request.param)
    yield
    module.use_level(module.levels()[-1])


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend, forced; skips those that cannot run here."""
    yield from _forced(request.param, getattr(request.module, "OPERATION", None))


@pytest.fixture(params=[name for name in BACKENDS if name != "reference"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that is compared with the reference, forced; skips those that cannot run here."""
    yield from _forced(request.param, getattr(request.module, "OPERATION", None))


def _forced(name: str, operation: str | None) -> Iterator[str]:
    """Force a backend that has the operation, and create tensors where it computes."""
    if operation is not None and operation not in backends.OPERATIONS.get(name, {operation}):
        pytest.skip(f"backend {name!r} does not have {operation}")
    if name == "cuda" and not torch.cuda.is_available() and missing_tools() is None:
        emulated_cuda_module()
    reason = backends.missing(name)
    if reason is not None:
        pytest.skip(f"backend {name!r} cannot run here: {reason}")
    device = "cpu" if name == "reference" else backends.device_type(name)
    # A default device stands in the way of torch.compile, which the CPU can be spared.
    with use_backend(name), nullcontext() if device == "cpu" else torch.device(device):
        yield name

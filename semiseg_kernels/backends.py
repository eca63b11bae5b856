"""Backends: the registration of raw operations, what each backend can run, and the choice between them."""

import functools
import importlib
import logging
import os
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checks import KERNEL_DTYPES
from .compilation import constant_while_compiling
from .native.extension import extension
from .triton.configurations import fits_tiles

logger = logging.getLogger(__name__)

BACKENDS = ("cpu", "cuda", "triton", "reference")
NAMES = ("auto", *BACKENDS)
PACKAGES = {"cpu": "native", "cuda": "native", "triton": "triton"}  # where a backend's launches stand
OPERATIONS = {
    backend: frozenset(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / package)]))
    for backend, package in PACKAGES.items()
}
# Of the two that share their launches, only one has these.
OPERATIONS["cuda"] -= {"convolution", "strided_convolution"}
OPERATIONS["cpu"] -= {"linear_upsampling"}
MAX_CLUSTERS = 512
MAX_WIDTH = {"cpu": 4096, "cuda": 1024, "triton": 1024}
MIN_CAPABILITY = (8, 0)
# From so many prototypes or classes on, "auto" prefers Triton's tensor cores to CUDA C++. The first three measured on an
# H200; of the others it is known only that CUDA C++ is quicker with 12 and fewer. Components are no product of anything.
TRITON_CLUSTERS = {
    "prompt_mix": 1,
    "masked_class_mean": 14,
    "linear_classifier": 14,
    "largest_components": MAX_CLUSTERS + 1,
}
OTHER_TRITON_CLUSTERS = 32


def _check_name(name: str, given_by: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{given_by} is {name!r}, accepted are {', '.join(map(repr, NAMES))}")
    return name


# Both are read once, at import, so that torch.compile sees constants.
_requested = _check_name(os.environ.get("SEMISEG_BACKEND", "auto"), "SEMISEG_BACKEND")
_interpret_triton = os.environ.get("TRITON_INTERPRET") == "1"
_missing_reasons: dict[str, str | None] = {"reference": None}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operation inside on the backend `name`: "auto", "cpu", "cuda", "triton" or "reference".

    A forced backend runs, or raises a ValueError with its reason; "auto" takes the first that can run the
    call. It holds for all threads of the process: those of several must not overlap. The environment variable
    SEMISEG_BACKEND, read at import, sets the same from the start.
    """
    global _requested
    previous, _requested = _requested, _check_name(name, "the backend")
    try:
        yield
    finally:
        _requested = previous


def is_automatic() -> bool:
    """Whether no backend is asked for by name."""
    return _requested == "auto"


def cpu_is_requested() -> bool:
    """Whether "cpu" is forced."""
    return _requested == "cpu"


def reference_is_requested() -> bool:
    """Whether "reference" is forced."""
    return _requested == "reference"


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine."""
    return tuple(backend for backend in BACKENDS if missing(backend) is None)


@constant_while_compiling
def missing(backend: str) -> str | None:
    """None if this machine has what the backend needs, else what it lacks."""
    if backend not in _missing_reasons:
        _missing_reasons[backend] = _find_missing(backend)
    return _missing_reasons[backend]


def _find_missing(backend: str) -> str | None:
    try:
        module = importlib.import_module("triton") if backend == "triton" else extension(backend)
    except ImportError as error:
        what = "Triton" if backend == "triton" else f"the compiled extension for {backend}"
        return f"{what} is missing ({error})"
    if device_type(backend) == "cpu":
        return None
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    return module.driver_problem() if backend == "cuda" else None


@constant_while_compiling
def device_type(backend: str) -> str:
    """Where a backend that is not missing computes; the GPU backends can be interpreted or emulated on the CPU."""
    if backend == "triton":
        return "cpu" if _interpret_triton else "cuda"
    return extension(backend).device_type


def has_gpu_kernels(device: torch.device) -> bool:
    """Whether operations on this GPU run kernels, and not the reference, which may wait for the GPU."""
    usable = (missing(backend) is None and device_type(backend) == "cuda" for backend in ("cuda", "triton"))
    if reference_is_requested() or not any(usable):
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return _capability(index) >= MIN_CAPABILITY


@constant_while_compiling
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def reason_against(
    backend: str,
    operation: str,
    x: Tensor,
    num_classes: int,
    per_class: int,
    width: int,
) -> str | None:
    """None if the backend can run on this input, else the reason why it cannot.

    `per_class` is K for the operations with prototypes and 1 for the others; `width` is the number of channels of a
    voxel, 1 of a label map.
    """
    if backend == "reference":
        return None
    reason = missing(backend)
    if reason is not None:
        return reason
    if operation not in OPERATIONS[backend]:
        return "it does not have this operation"
    if x.device.type != device_type(backend):
        return f"the tensors are on {x.device.type}"
    if x.device.type == "cuda" and _capability(x.device.index) < MIN_CAPABILITY:
        given, least = (".".join(map(str, pair)) for pair in (_capability(x.device.index), MIN_CAPABILITY))
        return f"it needs compute capability {least}, the GPU has {given}"
    if x.is_floating_point() and x.dtype not in KERNEL_DTYPES:
        return f"it takes {', '.join(map(str, KERNEL_DTYPES))}, the input is {x.dtype}"
    clusters = num_classes * per_class
    if clusters > MAX_CLUSTERS:
        return f"it keeps at most {MAX_CLUSTERS} prototypes or classes, the input has {clusters}"
    if backend == "triton" and not fits_tiles(operation, num_classes, per_class):
        return f"its tiles have no room for {num_classes} classes of {per_class} prototypes"
    if width > MAX_WIDTH[backend]:
        return f"it takes at most {MAX_WIDTH[backend]} channels, the input has {width}"
    return None


def preference(device: str, operation: str, clusters: int) -> tuple[str, ...]:
    """The backends that "auto" tries on a device, in order; the reference comes after them."""
    if device != "cuda":
        return ("cpu",)
    is_wide = clusters >= TRITON_CLUSTERS.get(operation, OTHER_TRITON_CLUSTERS)
    return ("triton", "cuda") if is_wide else ("cuda", "triton")


def select(
    operation: str,
    x: Tensor,
    num_classes: int,
    per_class: int,
    width: int,
) -> str:
    """The backend that runs this call; ValueError when the one that was asked for cannot."""
    if _requested != "auto":
        reason = reason_against(_requested, operation, x, num_classes, per_class, width)
        if reason is not None:
            raise ValueError(f"backend {_requested!r} cannot run {operation}: {reason}")
        return _requested
    for backend in preference(x.device.type, operation, num_classes * per_class):
        reason = reason_against(backend, operation, x, num_classes, per_class, width)
        if reason is None:
            return backend
        _report_fallback(operation, backend, reason)
    _warn_of_reference(x.device.type, operation)
    return "reference"


# These two run while tracing too, where neither a warning nor a log record could be part of the graph.
@constant_while_compiling
def _report_fallback(operation: str, backend: str, reason: str) -> None:
    logger.debug("backend %r cannot run %s: %s", backend, operation, reason)


@constant_while_compiling
def _warn_of_reference(device: str, operation: str) -> None:
    reasons = [missing(backend) for backend in preference(device, operation, clusters=1)]
    if None not in reasons:
        _warn_once("; ".join(map(str, reasons)))


@functools.cache
def _warn_once(reasons: str) -> None:
    warnings.warn(
        f"semiseg_kernels runs its pure PyTorch reference, which is slower and needs more memory: {reasons}",
        stacklevel=2,
    )


def as_kernel_input(values: Tensor | None) -> Tensor | None:
    """Contiguous, without gradient, and without bool, which the kernels read as uint8."""
    if values is None:
        return None
    return (values.view(torch.uint8) if values.dtype == torch.bool else values.detach()).contiguous()


_library = torch.library.Library("semiseg_kernels", "DEF")


def register(schema: str, fake: Callable[..., Any]) -> None:
    """Register a raw operation, `<operation>_<direction>(..., str backend) -> ...`, and its fake.

    It hands its arguments to the function <direction> of semiseg_kernels/<package>/<operation>.py; the package `native`
    serves two backends, and its functions are told which as their first argument. Raw operations have no autograd key
    and would drop gradients silently: only autograd functions call them.
    """
    name = schema.partition("(")[0]
    operation, _, direction = name.rpartition("_")

    def launch(*arguments: Any) -> Any:
        *rest, backend = arguments
        package = PACKAGES[backend]
        function = getattr(_module(package, operation), direction)
        return function(backend, *rest) if package == "native" else function(*rest)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, launch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"semiseg_kernels::{name}", fake, lib=_library)


@functools.cache
def _module(package: str, operation: str) -> Any:
    return importlib.import_module(f"semiseg_kernels.{package}.{operation}")

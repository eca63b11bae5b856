"""Backends: the registration of raw operations, what each backend can run, and the choice between them."""

import functools
import importlib
import logging
import os
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import cpu
from .checks import KERNEL_DTYPES

logger = logging.getLogger(__name__)

BACKENDS = ("cpu", "reference")  # in the order in which "auto" prefers them
NAMES = ("auto", *BACKENDS)
CPU_OPERATIONS = frozenset(module.name for module in pkgutil.iter_modules(cpu.__path__))
MAX_CLUSTERS = 512
MAX_WIDTH = 4096


def _check_name(name: str, given_by: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{given_by} is {name!r}, accepted are {', '.join(map(repr, NAMES))}")
    return name


def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        return str(error)
    return None


# Both are read once, at import, so that torch.compile sees constants.
_requested = _check_name(os.environ.get("SEMISEG_BACKEND", "auto"), "SEMISEG_BACKEND")
_extension_error = _import_error("semiseg_kernels._C")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operation inside on the backend `name`: "auto", "reference" or "cpu".

    A forced backend runs, or raises a ValueError with its reason; "auto" takes the first that can run the
    call. The environment variable SEMISEG_BACKEND, read at import, sets the same for the whole process.
    """
    global _requested
    previous, _requested = _requested, _check_name(name, "the backend")
    try:
        yield
    finally:
        _requested = previous


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine."""
    return BACKENDS if _extension_error is None else ("reference",)


def can_run(
    backend: str,
    operation: str,
    x: Tensor,
    clusters: int,
    width: int,
) -> str | None:
    """None if the backend can run on this input, else the reason why it cannot.

    `clusters` is C * K for the operations with prototypes and C for those on logits; `width` is the number of
    channels of a voxel.
    """
    if backend == "reference":
        return None
    if _extension_error is not None:
        return f"the compiled extension is missing ({_extension_error})"
    if operation not in CPU_OPERATIONS:
        return "it does not have this operation"
    if x.device.type != "cpu":
        return f"the tensors are on {x.device.type}"
    if x.dtype not in KERNEL_DTYPES:
        return f"it computes in float32, the input is {x.dtype}"
    if clusters > MAX_CLUSTERS:
        return f"it keeps at most {MAX_CLUSTERS} prototypes or classes, the input has {clusters}"
    if width > MAX_WIDTH:
        return f"it takes at most {MAX_WIDTH} channels, the input has {width}"
    return None


def select(
    operation: str,
    x: Tensor,
    clusters: int,
    width: int,
) -> str:
    """The backend that runs this call; ValueError when the one that was asked for cannot."""
    if _requested != "auto":
        reason = can_run(_requested, operation, x, clusters, width)
        if reason is not None:
            raise ValueError(f"backend {_requested!r} cannot run {operation}: {reason}")
        return _requested
    for backend in BACKENDS:
        reason = can_run(backend, operation, x, clusters, width)
        if reason is None:
            return backend
        _report_fallback(operation, backend, reason)
    raise AssertionError("the reference runs everything")


@torch.compiler.assume_constant_result
def _report_fallback(operation: str, backend: str, reason: str) -> None:
    # Runs while tracing too, where neither a warning nor a log record could be part of the graph.
    if _extension_error is not None:
        _warn_of_missing_extension()
    logger.debug("backend %r cannot run %s: %s", backend, operation, reason)


@functools.cache
def _warn_of_missing_extension() -> None:
    warnings.warn(
        f"semiseg_kernels runs its pure PyTorch reference, which is slower and needs more memory: "
        f"the compiled extension is missing ({_extension_error})",
        stacklevel=2,
    )


def as_kernel_input(values: Tensor | None) -> Tensor | None:
    """Contiguous, and without bool, which the kernels read as uint8."""
    if values is None:
        return None
    return (values.view(torch.uint8) if values.dtype == torch.bool else values).contiguous()


_library = torch.library.Library("semiseg_kernels", "DEF")


def register(schema: str, fake: Callable[..., Any]) -> None:
    """Register a raw operation, `<operation>_<direction>(..., str backend) -> ...`, and its fake.

    It hands its arguments to the function <direction> of semiseg_kernels/<backend>/<operation>.py. Raw
    operations have no autograd key and would drop gradients silently: only autograd functions call them.
    """
    name = schema.partition("(")[0]
    operation, _, direction = name.rpartition("_")

    def launch(*arguments: Any) -> Any:
        *rest, backend = arguments
        return getattr(_module(backend, operation), direction)(*rest)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, launch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"semiseg_kernels::{name}", fake, lib=_library)


@functools.cache
def _module(backend: str, operation: str) -> Any:
    return importlib.import_module(f"semiseg_kernels.{backend}.{operation}")

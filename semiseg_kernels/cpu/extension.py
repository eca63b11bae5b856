"""The compiled module. It is imported after torch, so that both share the OpenMP runtime torch brings."""

from functools import cache
from types import ModuleType

import torch  # noqa: F401


@cache
def extension() -> ModuleType:
    """The module `semiseg_kernels._C`; raises ImportError where it was not built."""
    from semiseg_kernels import _C  # type: ignore[attr-defined]

    return _C

"""Which algorithms PyTorch may choose: the quickest, or those that give the same numbers on every run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # read by cuBLAS when it starts


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """If enabled, only deterministic algorithms run inside; else cuDNN tries its algorithms for the quickest.

    On the CPU every run gives the same numbers either way. A RuntimeError of PyTorch names an operation that has no
    deterministic algorithm.
    """
    memory: Any = torch.utils.deterministic  # its setting is missing from the stubs
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        memory.fill_uninitialized_memory,
    )
    torch.backends.cudnn.benchmark = not enabled
    if enabled:
        os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False  # no operation here reads such memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
        memory.fill_uninitialized_memory = before[2]

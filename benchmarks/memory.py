"""Memory: the heap that the C library keeps on Linux, and the peak of what a call takes, there and on a GPU."""

import ctypes
import gc
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from semiseg.engine import allocator

libc = ctypes.CDLL("libc.so.6")


def keep_heap() -> None:
    """Keep freed memory in the process, as training does, and bring malloc's caches to their steady state."""
    if not allocator.keep_heap():
        raise OSError("the C library cannot be told to keep its heap")
    # Aligning a block cuts a sliver off, which malloc's thread cache keeps until its bins are full:
    # until then a freed block is too short for a request of its own size.
    for i in range(200):
        torch.empty((1 << 20) + 4 * i)  # of every remainder of the alignment


def host_extra_peak(function: Callable[[], Any]) -> tuple[int, Any]:
    """Peak resident bytes of a call beyond those before it, its result included; and that result."""
    gc.collect()
    libc.malloc_trim(0)  # what the heap keeps would hide what the call needs
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status("VmRSS")
    result = function()
    return max(_status("VmHWM") - before, 0), result


def device_extra_peak(function: Callable[[], Any]) -> tuple[int, Any]:
    """Peak bytes of the current GPU's tensors beyond those before a call, its result included; and that result."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")

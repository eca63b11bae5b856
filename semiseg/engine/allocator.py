"""glibc's allocator, set so that large temporaries stay in the process."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
NEVER_TRIM = -1
TOP_PAD = 256 * 2**20  # bytes


def keep_heap() -> bool:
    """Keep freed memory instead of handing it back to the kernel; True where that is possible (glibc).

    By default every large temporary of a training step is mapped and unmapped anew, and the page faults take as long
    as the arithmetic. Call before the first large allocation.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER_TRIM), (M_TOP_PAD, TOP_PAD))
    return all(libc.mallopt(parameter, value) == 1 for parameter, value in settings)

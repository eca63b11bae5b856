"""glibc's allocator, set so that large temporaries stay in the process."""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
NEVER_TRIM = -1
TOP_PAD = 256 * 2**20  # bytes
TIGHT = "glibc.malloc.tcache_count=0"
HUGE_PAGES = "glibc.malloc.hugetlb=1"  # from glibc 2.35 on, which others ignore


def keep_heap() -> bool:
    """Keep freed memory instead of handing it back to the kernel; True where that is possible (glibc).

    By default every large temporary of a training step is mapped and unmapped anew, and the page faults take as long
    as the arithmetic. Call before the first large allocation.
    """
    libc = _glibc()
    if libc is None:
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER_TRIM), (M_TOP_PAD, TOP_PAD))
    return all(libc.mallopt(parameter, value) == 1 for parameter, value in settings)


def restart_with_tuned_heap() -> None:
    """Restart this command with an allocator whose freed blocks can be reused, and whose memory is in huge pages.

    Does nothing if that is done or not possible. Call before anything is written.
    """
    environment = tuned_environment()
    if environment == dict(os.environ):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def tuned_environment() -> dict[str, str]:
    """This process's environment, and in it what tells glibc, when a process starts, how to manage the heap.

    To align a block glibc cuts slivers off its ends. They stay with the thread, and the hole that the block leaves is
    too short for another of the same size: of the heap's memory a third to a half is such holes. Without a cache of
    small blocks for every thread the slivers join the hole again.

    In pages of 4 KB a large tensor needs more of them than the processor remembers the addresses of. Where Linux gives
    huge ones to those who ask (`madvise`), glibc is told to ask.

    What the user says of either holds.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if _glibc() is None:
        return dict(os.environ)
    missing = [tunable for tunable in (TIGHT, HUGE_PAGES) if tunable.partition("=")[0] not in tunables]
    return os.environ | {"GLIBC_TUNABLES": ":".join(filter(None, [tunables, *missing]))}


def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is glibc."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None

"""How much memory there is."""

import math
import os
import re
from pathlib import Path

PROCESSES_HERE = "LOCAL_WORLD_SIZE"  # of the same training on this machine, as torchrun tells them
MEMORY_INFORMATION = Path("/proc/meminfo")
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container, in bytes


def machine_memory() -> float:
    """Bytes this machine has; infinity where the system does not say."""
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory() -> float:
    """Bytes that each process of a training can have without swapping; infinity where the system does not say."""
    there = [machine_memory()]
    if MEMORY_INFORMATION.is_file():
        # Not every system that has the file says it there.
        found = re.search(r"^MemAvailable: *(\d+) kB$", MEMORY_INFORMATION.read_text(), re.MULTILINE)
        there += [1024 * int(found[1])] if found else []
    limits = [path.read_text().strip() for path in map(Path, LIMITS) if path.is_file()]
    there += [int(limit) for limit in limits if limit.isdecimal()]
    return min(there) / int(os.environ.get(PROCESSES_HERE, "1"))

"""How much memory there is."""

import math
import os
from pathlib import Path

PROCESSES_HERE = "LOCAL_WORLD_SIZE"  # of the same training on this machine, as torchrun tells them
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container, in bytes


def machine_memory() -> float:
    """Bytes this machine has; infinity where the system does not say."""
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory() -> float:
    """Bytes that each process of a training can have without swapping; infinity where the system does not say."""
    there = [machine_memory()]
    if (information := Path("/proc/meminfo")).is_file():
        fields = dict(line.split(":", 1) for line in information.read_text().splitlines())
        there.append(1024 * int(fields["MemAvailable"].split()[0]))
    limits = [path.read_text().strip() for path in map(Path, LIMITS) if path.is_file()]
    there += [int(limit) for limit in limits if limit.isdecimal()]
    return min(there) / int(os.environ.get(PROCESSES_HERE, "1"))

"""The memory that this process may still take."""

import os
import resource
from pathlib import Path


def host_memory() -> float:
    """Bytes that this process may still take: of the machine, its control group, and its own limit."""
    free = [os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')]
    meminfo, group = Path('/proc/meminfo'), Path('/sys/fs/cgroup')
    if meminfo.exists():
        free += [1024 * int(line.split()[1]) for line in meminfo.read_text().splitlines()
                 if line.startswith('MemAvailable:')]
    try:
        free.append(int((group / 'memory.max').read_text()) - int((group / 'memory.current').read_text()))
    except (OSError, ValueError):  # no control group, or 'max'
        pass
    own, _ = resource.getrlimit(resource.RLIMIT_AS)
    if own != resource.RLIM_INFINITY:
        free.append(own - address_space())
    return float(max(min(free), 0))


def address_space() -> int:
    """Bytes of addresses that this process has taken, which RLIMIT_AS bounds; 0 where that is not known."""
    statm = Path('/proc/self/statm')
    pages = int(statm.read_text().split()[0]) if statm.exists() else 0
    return pages * os.sysconf('SC_PAGE_SIZE')

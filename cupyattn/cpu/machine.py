"""What this machine has for us: cores and memory."""

from __future__ import annotations

import math
import os
import sys
from contextlib import suppress
from functools import cache

_IMPORTED_IN = os.getpid()


def is_forked() -> bool:
    """This process is a copy of the one that imported us, whose other threads it does not have."""
    return os.getpid() != _IMPORTED_IN


def num_cores() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_crowded() -> bool:
    """Twice as many threads of other processes as the machine has cores, or more, want to run right now.

    False where the system does not say, and where this process has cores of its own, which may be idle meanwhile.
    """
    cores = os.cpu_count() or 1
    if num_cores() < cores:
        return False
    try:
        file = os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC)  # anew: who closes all files may not tell us
        try:
            running, _ = os.read(file, 80).split()[3].split(b"/")
        finally:
            os.close(file)
        own = _num_running() if "torch" in sys.modules and int(running) > 2 * cores else 1
        return int(running) - own >= 2 * cores
    except (OSError, AttributeError, IndexError, ValueError):
        return False


def _num_running() -> int:
    """Threads of this process that want to run: torch's wait for work in a loop, and crowd nobody out."""
    count = 0
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError), open(f"/proc/self/task/{thread}/stat", "rb") as file:
            count += file.read().rpartition(b")")[2].split()[0] == b"R"
    return count


@cache
def memory_of_machine() -> float:
    """Bytes that this process may have at most; inf where nobody says."""
    try:
        whole = float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on this system
        return math.inf
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        # not by pathlib, whose import would be a tenth of ours; no group, no limit: "max"
        with suppress(OSError, ValueError), open(limit) as file:
            whole = min(whole, float(file.read()))
    return whole

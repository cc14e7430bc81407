"""How much of the host's memory is free, within a container's limit too."""

import ctypes
import os
import sys
from pathlib import Path

import torch

_CGROUPS = Path("/sys/fs/cgroup")
# Limit, counters and the one of them that counts programs' own memory: version 2, version 1
_LIMITS = (("memory.max", "memory.stat", "anon"), ("memory/memory.limit_in_bytes", "memory/memory.stat", "total_rss"))


def free_host_memory() -> int | None:
    """Returns the bytes of RAM that are free without swapping, within a container's limit; None if that is unknown."""
    free = _available()
    limits = [limit for files in _LIMITS if (limit := _left_in_cgroup(*files)) is not None]
    return free if free is None else min(free, *limits, free)


def memory_beside(device: torch.device) -> int | None:
    """Returns the free bytes of RAM for a device's layers and K/V; None for devices that read the file just as fast."""
    return free_host_memory() if device.type in ("cuda", "cpu") else None


def _available() -> int | None:
    if sys.platform == "win32":
        status = _MemoryStatus(ctypes.sizeof(_MemoryStatus))
        return int(status.free) if ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)) else None
    try:  # Linux; what sysconf calls available leaves out the page cache, which mapped files fill.
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _left_in_cgroup(limit: str, stat: str, used: str) -> int | None:
    """Returns the bytes that a container may still take, files' pages not counted; None without a limit."""
    try:
        counts = dict(line.split() for line in (_CGROUPS / stat).read_text(encoding="ascii").splitlines())
        return max(0, int((_CGROUPS / limit).read_text(encoding="ascii")) - int(counts[used]))
    except (OSError, ValueError, KeyError):
        return None


class _MemoryStatus(ctypes.Structure):
    """Windows' MEMORYSTATUSEX."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        *((name, ctypes.c_ulonglong) for name in ("page_total", "page_free", "virtual_total", "virtual_free", "more")),
    )

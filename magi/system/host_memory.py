"""Free memory of the host, within a container's limit too, which psutil does not know."""

from pathlib import Path

import psutil
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
    try:
        return int(psutil.virtual_memory().available)
    except OSError:  # a sandbox without /proc
        return None


def _left_in_cgroup(limit: str, stat: str, used: str) -> int | None:
    """Returns the bytes that a container may still take, files' pages not counted; None without a limit."""
    try:
        counts = dict(line.split() for line in (_CGROUPS / stat).read_text(encoding="ascii").splitlines())
        return max(0, int((_CGROUPS / limit).read_text(encoding="ascii")) - int(counts[used]))
    except (OSError, ValueError, KeyError):
        return None

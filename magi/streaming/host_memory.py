"""The host's memory: how much of it is free, and locking some of it in place for a device."""

import ctypes
import os
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

Pin = Callable[[torch.Tensor], Callable[[], None]]  # locks a tensor's memory in place and gives what undoes that

_CGROUPS = Path("/sys/fs/cgroup")
# Limit, counters and the one of them that counts programs' own memory: version 2, version 1
_LIMITS = (("memory.max", "memory.stat", "anon"), ("memory/memory.limit_in_bytes", "memory/memory.stat", "total_rss"))


class PinningError(RuntimeError):
    """There is not enough page-locked host memory, or none at all."""


class LockedMemory:
    """Page-locked host memory, from which a device copies at the full speed of its bus; locked as long as this object lives."""

    def __init__(self, device: torch.device, pin: Pin | None = None) -> None:
        """`pin` locks memory in place; None: `page_lock` for CUDA and ROCm, while other devices lock none."""
        self._pin = pin or (partial(page_lock, device=device) if device.type == "cuda" else None)
        self._unlock: list[Callable[[], None]] = []
        # Not at exit: the device may be gone by then, and the memory goes anyway.
        weakref.finalize(self, _call_all, self._unlock).atexit = False

    @property
    def possible(self) -> bool:
        """Whether the device locks memory at all."""
        return self._pin is not None

    def take(self, nbytes: int) -> torch.Tensor:
        """(nbytes,) uint8, locked.

        Raises:
            PinningError: the system does not give or lock so much.
        """
        if self._pin is None:
            raise PinningError("this device locks no host memory")
        try:
            data = host_bytes(nbytes)
            self._unlock.append(self._pin(data))
        except (RuntimeError, MemoryError) as error:
            raise PinningError(str(error)) from error
        return data

    def take_or_else(self, nbytes: int) -> torch.Tensor:
        """(nbytes,) uint8, locked or, where that cannot be, ordinary memory."""
        try:
            return self.take(nbytes)
        except PinningError:
            return host_bytes(nbytes)

    def release(self) -> None:
        """Unlocks what was taken. It stays memory."""
        _call_all(self._unlock)


def host_bytes(nbytes: int) -> torch.Tensor:
    """(nbytes,) uint8 in ordinary memory."""
    with torch.inference_mode(False):  # else threads could not write to it
        return torch.empty(nbytes, dtype=torch.uint8)


def _call_all(calls: list[Callable[[], None]]) -> None:
    while calls:
        calls.pop()()


def page_lock(data: torch.Tensor, device: torch.device | None = None) -> Callable[[], None]:
    """Locks a host tensor's memory where it lies, for CUDA and ROCm; the result undoes it, once the device has done its work.

    torch's own pinned memory comes in powers of two, up to twice what is needed.

    Raises:
        RuntimeError: there is no such device, or it refuses.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("only CUDA and ROCm devices can lock host memory")
    runtime = torch.cuda.cudart()
    code = int(runtime.cudaHostRegister(data.data_ptr(), data.nbytes, 0))
    if code:
        with suppress(RuntimeError):  # the driver repeats the error at the next call, whatever that is
            torch.ones(1, device="cuda").add_(1).item()
        raise RuntimeError(f"the driver refused {data.nbytes / 1e9:.1f} GB more, error {code}")

    def unlock() -> None:
        torch.cuda.synchronize(device)
        runtime.cudaHostUnregister(data.data_ptr())

    return unlock


def free_host_memory() -> int | None:
    """Bytes of RAM that can be had without swapping, within a container's limit; None where the system does not tell."""
    free = _available()
    limits = [limit for files in _LIMITS if (limit := _left_in_cgroup(*files)) is not None]
    return free if free is None else min(free, *limits, free)


def memory_beside(device: torch.device) -> int | None:
    """Free host memory for what a device works with; None for devices that would read weights from the file just as fast."""
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
    """What a container may still take, files' pages not counted; None without a limit."""
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

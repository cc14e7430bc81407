"""Host memory locked in place, from which a device copies at the full speed of its bus."""

import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch

Pin = Callable[[torch.Tensor], Callable[[], None]]  # locks a tensor's memory in place and gives what undoes that


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
    with torch.cuda.device(device):  # memory is locked for the current card
        code = int(runtime.cudaHostRegister(data.data_ptr(), data.nbytes, 0))
        if code:
            with suppress(RuntimeError):  # the driver repeats the error at the next call, whatever that is
                torch.ones(1, device="cuda").add_(1).item()
            raise RuntimeError(f"the driver refused {data.nbytes / 1e9:.1f} GB more, error {code}")

    def unlock() -> None:
        with torch.cuda.device(device):
            torch.cuda.synchronize(device)
            runtime.cudaHostUnregister(data.data_ptr())

    return unlock

"""Page-locked host memory, from which a device copies at the full bandwidth of its PCIe link."""

import warnings
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

import torch

Pin = Callable[[torch.Tensor], Callable[[], None]]  # page-locks a tensor's memory, returns what undoes it


_UNSUPPORTED = "host memory cannot be page-locked for this device"


class PinningError(RuntimeError):
    """Page-locked host memory ran out, or the device supports none."""


class PinnedMemory:
    """Page-locks host memory, for the lifetime of this object or until `unpin_all`."""

    def __init__(self, device: torch.device, pin: Pin | None = None) -> None:
        """Chooses how to page-lock memory.

        Args:
            device: the device that the memory is copied to.
            pin: page-locks a tensor's memory; None uses `pin_memory` for CUDA and ROCm, and nothing for other devices.
        """
        self._pin = pin or (partial(pin_memory, device=device) if device.type == "cuda" else None)
        self._unpin: dict[int, tuple[int, Callable[[], None]]] = {}  # address -> bytes, what unpins them
        # Not at interpreter exit: the device may be gone by then, and the process returns its memory anyway.
        weakref.finalize(self, _unpin_all, self._unpin).atexit = False

    @property
    def supported(self) -> bool:
        """Returns True if memory can be page-locked for this device at all."""
        return self._pin is not None

    @property
    def nbytes(self) -> int:
        """Returns the bytes that are page-locked now."""
        return sum(nbytes for nbytes, _ in self._unpin.values())

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Allocates (nbytes,) uint8 in page-locked memory.

        Raises:
            PinningError: the system refuses to allocate or page-lock that much, or the device supports none.
        """
        if self._pin is None:  # before anything is allocated
            raise PinningError(_UNSUPPORTED)
        try:
            data = pageable_memory(nbytes)  # (nbytes,)
        except (RuntimeError, MemoryError) as error:
            raise PinningError(str(error)) from error
        self.pin(data)
        return data

    def allocate_or_pageable(self, nbytes: int) -> torch.Tensor:
        """Allocates (nbytes,) uint8 in page-locked memory, or in pageable memory if that fails."""
        try:
            return self.allocate(nbytes)
        except PinningError:
            return pageable_memory(nbytes)

    def pin(self, data: torch.Tensor) -> None:
        """Page-locks a host tensor's memory in place, unless it is page-locked here already.

        Raises:
            PinningError: the system refuses, or the device supports none.
        """
        if self._pin is None:
            raise PinningError(_UNSUPPORTED)
        if data.data_ptr() in self._unpin:
            return
        try:
            self._unpin[data.data_ptr()] = data.nbytes, self._pin(data)
        except (RuntimeError, MemoryError) as error:
            raise PinningError(str(error)) from error

    def pin_all(self, memory: Iterable[torch.Tensor]) -> None:
        """Page-locks tensors' memory in order, as far as the system lets it; the rest stays pageable, with a warning."""
        try:
            for data in memory if self.supported else ():
                self.pin(data)
        except PinningError as error:
            warnings.warn(f"Memory stays pageable ({error}): copies to the device are slower.", stacklevel=3)

    def unpin_all(self) -> None:
        """Unpins all memory. The tensors remain valid, as pageable memory."""
        _unpin_all(self._unpin)


def pageable_memory(nbytes: int) -> torch.Tensor:
    """Allocates (nbytes,) uint8 in ordinary host memory, uninitialised."""
    with torch.inference_mode(False):  # threads cannot write to inference tensors
        return torch.empty(nbytes, dtype=torch.uint8)


def _unpin_all(pinned: dict[int, tuple[int, Callable[[], None]]]) -> None:
    while pinned:
        _, (_, unpin) = pinned.popitem()
        with suppress(RuntimeError):  # the device failed, and with it the process: the others all the same
            unpin()


def pin_memory(data: torch.Tensor, device: torch.device | None = None) -> Callable[[], None]:
    """Page-locks a host tensor's memory in place, for CUDA and ROCm.

    torch's own pinned memory comes in powers of two, up to twice what is needed.

    Args:
        data: a host tensor of any shape and dtype.
        device: the device whose work `unpin` waits for; None waits for the current device.

    Returns:
        The function that unpins the memory after the device has completed its work.

    Raises:
        RuntimeError: there is no CUDA or ROCm device, or the driver refuses.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("only CUDA and ROCm devices can page-lock host memory")
    runtime = torch.cuda.cudart()
    with torch.cuda.device(device):  # memory is locked for the current card
        code = int(runtime.cudaHostRegister(data.data_ptr(), data.nbytes, 0))
        if code:
            with suppress(RuntimeError):  # the driver reports the error again at the next call, so make one
                torch.ones(1, device="cuda").add_(1).item()
            raise RuntimeError(f"the driver refused to page-lock {data.nbytes / 1e9:.1f} GB more, error {code}")

    def unpin() -> None:
        with torch.cuda.device(device):
            torch.cuda.synchronize(device)
            runtime.cudaHostUnregister(data.data_ptr())

    return unpin

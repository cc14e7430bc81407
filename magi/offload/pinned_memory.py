"""Page-locked host memory, from which a device copies at the full bandwidth of its PCIe link."""

import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch

Pin = Callable[[torch.Tensor], Callable[[], None]]  # page-locks a tensor's memory, returns what undoes it


class PinningError(RuntimeError):
    """Page-locked host memory ran out, or the device supports none."""


class PinnedMemory:
    """Allocates page-locked host memory, which stays page-locked for the lifetime of this object."""

    def __init__(self, device: torch.device, pin: Pin | None = None) -> None:
        """Chooses how to page-lock memory.

        Args:
            device: the device that the memory is copied to.
            pin: page-locks a tensor's memory; None uses `pin_memory` for CUDA and ROCm, and nothing for other devices.
        """
        self._pin = pin or (partial(pin_memory, device=device) if device.type == "cuda" else None)
        self._unpin: list[Callable[[], None]] = []
        # Not at interpreter exit: the device may be gone by then, and the process returns its memory anyway.
        weakref.finalize(self, _call_all, self._unpin).atexit = False

    @property
    def supported(self) -> bool:
        """Returns True if memory can be page-locked for this device at all."""
        return self._pin is not None

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Allocates (nbytes,) uint8 in page-locked memory.

        Raises:
            PinningError: the system refuses to allocate or page-lock that much, or the device supports none.
        """
        if self._pin is None:
            raise PinningError("host memory cannot be page-locked for this device")
        try:
            data = pageable_memory(nbytes)  # (nbytes,)
            self._unpin.append(self._pin(data))
        except (RuntimeError, MemoryError) as error:
            raise PinningError(str(error)) from error
        return data

    def allocate_or_pageable(self, nbytes: int) -> torch.Tensor:
        """Allocates (nbytes,) uint8 in page-locked memory, or in pageable memory if that fails."""
        try:
            return self.allocate(nbytes)
        except PinningError:
            return pageable_memory(nbytes)

    def unpin_all(self) -> None:
        """Unpins all memory allocated so far. The tensors remain valid, as pageable memory."""
        _call_all(self._unpin)


def pageable_memory(nbytes: int) -> torch.Tensor:
    """Allocates (nbytes,) uint8 in ordinary host memory, uninitialised."""
    with torch.inference_mode(False):  # threads cannot write to inference tensors
        return torch.empty(nbytes, dtype=torch.uint8)


def _call_all(functions: list[Callable[[], None]]) -> None:
    while functions:
        functions.pop()()


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

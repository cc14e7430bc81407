"""The way from the host's memory to a device's: copies that run beside the computing, and marks to order the two by."""

from typing import Any, Protocol

import torch

Mark = Any  # a place in the work given to a device; None is one that was reached long ago


class Bus(Protocol):
    """Copies to a device, each carried out after the one before it.

    What is said of the compute work means the calling thread's: threads do not share their current stream.

    """

    @property
    def device(self) -> torch.device:
        """Where the copies go."""
        ...

    @property
    def overlaps(self) -> bool:
        """Whether copies run beside the computing. If not there is nothing to be won by asking for them in a thread."""
        ...

    def upload(self, source: torch.Tensor, target: torch.Tensor, after: Mark = None) -> Mark:
        """Copies bytes as soon as the device has reached `after`; from any thread.

        Args:
            source: (bytes,) uint8 on the host, to be left alone until the result is reached. From memory that is not
                page-locked the copy may be over before this returns.
            target: (bytes,) uint8 on the device.
            after: mark from which on the target is free.
        """
        ...

    def mark(self) -> Mark:
        """The compute work given to the device so far."""
        ...

    def require(self, mark: Mark) -> None:
        """Has compute work that is given from now on wait for an upload; the host does not wait."""
        ...

    def reached(self, mark: Mark) -> bool:
        """Whether the device has got so far; does not wait."""
        ...


class PlainBus:
    """Copies in the order of everything else that the device does: MPS, CPU and whatever has no streams known here."""

    overlaps = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def upload(self, source: torch.Tensor, target: torch.Tensor, after: Mark = None) -> Mark:
        """Copies, and waits for it."""
        target.copy_(source)

    def mark(self) -> Mark:
        """Nothing: there is one order only."""

    def require(self, mark: Mark) -> None:
        """It is."""

    def reached(self, mark: Mark) -> bool:
        """It is."""
        return True


class StreamBus:
    """Copies in a stream of their own: CUDA, ROCm and XPU, whose modules in torch have the same names for that."""

    overlaps = True

    def __init__(self, device: torch.device) -> None:
        self._streams: Any = getattr(torch, device.type)
        # Other threads have another current device.
        index = self._streams.current_device() if device.index is None else device.index
        self.device = torch.device(device.type, index)
        self._copies = self._streams.Stream(device=self.device)

    def upload(self, source: torch.Tensor, target: torch.Tensor, after: Mark = None) -> Mark:
        """Copies in the stream; waits for it only where the source is not page-locked."""
        with self._streams.stream(self._copies):
            if after is not None:
                self._copies.wait_event(after)
            target.copy_(source, non_blocking=source.is_pinned())
            target.record_stream(self._copies)  # it may be freed before the copy has been made
            done = self._streams.Event()
            done.record(self._copies)
        return done

    def mark(self) -> Mark:
        """An event."""
        event = self._streams.Event()
        event.record(self._streams.current_stream(self.device))
        return event

    def require(self, mark: Mark) -> None:
        """The current stream waits."""
        if mark is not None:
            self._streams.current_stream(self.device).wait_event(mark)

    def reached(self, mark: Mark) -> bool:
        """Asks the event."""
        return mark is None or bool(mark.query())


def open_bus(device: torch.device) -> Bus:
    """The fastest that is known for the device."""
    return StreamBus(device) if device.type in ("cuda", "xpu") else PlainBus(device)

"""Copies from host memory to a device on a copy stream of their own, ordered with the compute work by events."""

from typing import Any, Protocol

import torch

Event = Any  # a point in the work submitted to a device; None stands for an event that has completed


class CopyEngine(Protocol):
    """Uploads bytes to a device, one upload after the other.

    "The compute stream" means the calling thread's current stream: threads do not share theirs.
    """

    @property
    def device(self) -> torch.device:
        """Returns the device that is copied to."""
        ...

    @property
    def overlaps(self) -> bool:
        """Returns True if copies overlap with compute work. If they do not, uploading from a thread gains nothing."""
        ...

    def upload(self, source: torch.Tensor, target: torch.Tensor, after: Event = None) -> Event:
        """Copies host bytes to the device once `after` has completed. May be called from any thread.

        Args:
            source: (bytes,) uint8 on the host, which must not change until the returned event has completed. A copy
                from pageable memory may block until it has completed.
            target: (bytes,) uint8 on the device.
            after: the event that the copy waits for, usually the last use of `target`.

        Returns:
            The event that completes with the copy.
        """
        ...

    def record_event(self) -> Event:
        """Returns an event that completes with the work submitted to the compute stream so far."""
        ...

    def wait_event(self, event: Event) -> None:
        """Makes compute work submitted from now on wait for an event. Does not block the host."""
        ...

    def query(self, event: Event) -> bool:
        """Returns True if the event has completed. Does not block."""
        ...


class InOrderCopies:
    """A `CopyEngine` that copies in order with the compute work: for MPS, CPU and other devices without streams."""

    overlaps = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def upload(self, source: torch.Tensor, target: torch.Tensor, after: Event = None) -> Event:
        """Copies (bytes,) uint8 and returns None, a completed event."""
        target.copy_(source)

    def record_event(self) -> Event:
        """Returns None: with a single order of work there is nothing to wait for."""

    def wait_event(self, event: Event) -> None:
        """Does nothing, because every upload has completed when `upload` returns."""

    def query(self, event: Event) -> bool:
        """Returns True, because every event has completed."""
        return True


class StreamCopies:
    """A `CopyEngine` with a copy stream: for CUDA, ROCm and XPU, whose torch modules name streams and events alike."""

    overlaps = True

    def __init__(self, device: torch.device) -> None:
        self._backend: Any = getattr(torch, device.type)  # torch.cuda or torch.xpu
        # The index is fixed here because the current device differs between threads.
        index = self._backend.current_device() if device.index is None else device.index
        self.device = torch.device(device.type, index)
        self._copy_stream = self._backend.Stream(device=self.device)

    def upload(self, source: torch.Tensor, target: torch.Tensor, after: Event = None) -> Event:
        """Enqueues a copy of (bytes,) uint8 on the copy stream. Blocks only if the source is not page-locked."""
        with self._backend.stream(self._copy_stream):
            if after is not None:
                self._copy_stream.wait_event(after)
            target.copy_(source, non_blocking=source.is_pinned())
            target.record_stream(self._copy_stream)  # the target may be freed before the copy has run
            copied = self._backend.Event()
            copied.record(self._copy_stream)
        return copied

    def record_event(self) -> Event:
        """Records an event on the current stream."""
        event = self._backend.Event()
        event.record(self._backend.current_stream(self.device))
        return event

    def wait_event(self, event: Event) -> None:
        """Makes the current stream wait for an event."""
        if event is not None:
            self._backend.current_stream(self.device).wait_event(event)

    def query(self, event: Event) -> bool:
        """Returns True if the event has completed."""
        return event is None or bool(event.query())


def open_copy_engine(device: torch.device) -> CopyEngine:
    """Returns the fastest copy engine for a device: `StreamCopies` for CUDA, ROCm and XPU, else `InOrderCopies`."""
    return StreamCopies(device) if device.type in ("cuda", "xpu") else InOrderCopies(device)

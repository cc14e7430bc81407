"""A ring buffer in device memory, into whose slots host bytes are uploaded ahead of their use."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .copy_engine import CopyEngine, Event
from .packing import aligned
from .prefetch import IterationThreads, Prefetcher


@dataclass(frozen=True)
class Upload:
    """The contents of one slot.

    Attributes:
        parts: host tensors, (bytes,) uint8 each, which are concatenated in the slot.
        on_enqueued: called when the copies are enqueued, with the event after which the parts may be overwritten.
    """

    parts: tuple[torch.Tensor, ...]
    on_enqueued: Callable[[Event], None] | None = None


@dataclass(eq=False)
class _Slot:
    """A contiguous range of bytes of the ring buffer; once it is `free`, `last_use` is the event of its last use."""

    start: int
    end: int
    free: bool = False
    last_use: Event = None


class _SlotAllocator:
    """Allocates slots of any size. They are contiguous, and are freed in the order in which they were allocated."""

    def __init__(self, nbytes: int, max_slots: int, last_use: Event) -> None:
        """Starts with all bytes free.

        Args:
            nbytes: of the ring buffer.
            max_slots: slots in use at a time.
            last_use: event after which the memory may be written to.
        """
        self._nbytes = nbytes
        self._max_slots = max_slots
        self._last_use = last_use  # of all bytes that no slot in `_slots` covers
        self._slots: deque[_Slot] = deque()  # oldest first
        self._head = 0

    def allocate(self, size: int) -> tuple[_Slot, Event] | None:
        """Allocates `size` contiguous bytes.

        Returns:
            The slot and the event after which it may be written to, or None while there is no room.
        """
        if sum(not slot.free for slot in self._slots) >= self._max_slots:
            return None
        start = self._head if self._head + size <= self._nbytes else 0
        while any(slot.start < start + size and start < slot.end for slot in self._slots):
            if not self._slots[0].free:
                return None
            self._last_use = self._slots.popleft().last_use
        self._head = start + size
        self._slots.append(_Slot(start, self._head))
        return self._slots[-1], self._last_use

    def free(self, slot: _Slot, last_use: Event) -> None:
        """Frees a slot that may be overwritten once `last_use` has completed."""
        slot.free, slot.last_use = True, last_use

    def free_all(self, record_event: Callable[[], Event]) -> None:
        """Frees the slots of an iteration that was left early. Records an event only if there are any."""
        in_use = [slot for slot in self._slots if not slot.free]
        last_use = record_event() if in_use else None
        for slot in in_use:
            self.free(slot, last_use)


class RingBuffer:
    """Device memory that is allocated once and reused in a ring. One `UploadIterator` at a time uses it."""

    def __init__(self, copy_engine: CopyEngine, nbytes: int, max_slots: int) -> None:
        """Allocates the memory.

        Args:
            copy_engine: uploads to the device.
            nbytes: of the ring buffer; the largest upload must fit.
            max_slots: uploads on the device at a time, the one in use included.
        """
        self.copy_engine = copy_engine
        with torch.inference_mode(False):  # threads cannot write to inference tensors
            self.data = torch.empty(nbytes, dtype=torch.uint8, device=copy_engine.device)
        # The caching allocator may have returned memory whose former owner's work is still running.
        self.allocator = _SlotAllocator(nbytes, max_slots, copy_engine.record_event())
        self._threads = IterationThreads()

    @property
    def nbytes(self) -> int:
        """Returns the bytes of device memory."""
        return self.data.nbytes

    def start_uploads(self, uploads: Callable[[IterationThreads], Iterator[Upload]]) -> "UploadIterator":
        """Starts to upload in order, after closing the previous iterator.

        Args:
            uploads: given the threads of the new iteration, returns its uploads.

        Returns:
            The iterator over the slots, which must be closed.
        """
        self.close()
        self.allocator.free_all(self.copy_engine.record_event)
        self._threads = IterationThreads()
        return UploadIterator(self, uploads(self._threads), self._threads)

    def close(self) -> None:
        """Closes the current iterator, if there is one, and joins its threads."""
        self._threads.close()


class UploadIterator(Iterator[torch.Tensor]):
    """Iterates over slots in order, while later ones are uploaded. Must be used and closed in one thread."""

    def __init__(self, ring: RingBuffer, uploads: Iterator[Upload], threads: IterationThreads) -> None:
        self._ring, self._threads = ring, threads
        self._in_use: _Slot | None = None
        copies = self._enqueue(uploads)
        self._copies = Prefetcher(copies, threads, "magi-copy") if ring.copy_engine.overlaps else copies

    def __next__(self) -> torch.Tensor:
        """Returns the next slot, (bytes,) uint8 on the device, for compute work that is submitted before `release`.

        Raises:
            ClosedError: this iterator was closed, or another one was started.
        """
        self._threads.raise_if_closed()
        self._in_use, copied = next(self._copies)
        self._ring.copy_engine.wait_event(copied)
        return self._ring.data[self._in_use.start : self._in_use.end]

    def release(self) -> None:
        """Frees the slot that `next` returned last: compute work submitted from now on must not use it."""
        assert self._in_use is not None  # noqa: S101 (called after `next`)
        with self._threads.lock_and_notify():
            self._ring.allocator.free(self._in_use, self._ring.copy_engine.record_event())

    def close(self) -> None:
        """Stops uploading and joins the threads."""
        self._threads.close()

    def _enqueue(self, uploads: Iterator[Upload]) -> Iterator[tuple[_Slot, Event]]:
        """Yields each upload's slot and the event that completes with its copies, which are enqueued."""
        copy_engine, allocator = self._ring.copy_engine, self._ring.allocator
        for upload in uploads:
            size = aligned(sum(part.nbytes for part in upload.parts))
            slot, last_use = self._threads.wait_for(lambda size=size: allocator.allocate(size))  # type: ignore[misc]
            start, copied = slot.start, None
            for part in upload.parts:
                copied = copy_engine.upload(part, self._ring.data[start : start + part.nbytes], last_use)
                start += part.nbytes
            if upload.on_enqueued:
                upload.on_enqueued(copied)
            yield slot, copied

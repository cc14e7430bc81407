"""Reads layers from the mapped file into two host buffers ahead of their upload."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..checkpoint.mapped_file import TensorInfo, TensorSource
from ..transformer.weights import WeightReader
from .copy_engine import CopyEngine, Event
from .packing import Layout
from .pinned_memory import Pin, PinnedMemory
from .prefetch import IterationThreads, Prefetcher
from .ring_buffer import Upload

_BUFFERS = 2  # one is read into while the other is copied from
_POLL_INTERVAL = 0.001  # seconds between two queries of a copy's event


@dataclass(eq=False)
class _Buffer:
    """Host memory for a layer: `full` until its copy is enqueued, reusable once the event `copied` has completed."""

    data: torch.Tensor  # (bytes,) uint8
    full: bool = False
    copied: Event = None


class FileReader:
    """Reads layers in the order of their use, in a thread. Reuses a buffer once the copy from it has completed."""

    def __init__(
        self,
        reader: WeightReader,
        layouts: Mapping[int, Layout],
        copy_engine: CopyEngine,
        pin: Pin | None = None,
    ) -> None:
        """Allocates the buffers, in page-locked memory if possible.

        Args:
            reader: reads layers for any device.
            layouts: layer -> its layout, for the layers to read; not empty.
            copy_engine: tells when a copy has completed.
            pin: page-locks host memory; see `PinnedMemory`.
        """
        self._pinned = PinnedMemory(reader.device, pin)
        self._reader = replace(reader, device=torch.device("cpu"))
        self._layouts = layouts
        self._copy_engine = copy_engine
        largest = max(layout.nbytes for layout in layouts.values())
        count = min(_BUFFERS, len(layouts))
        self._buffers = [_Buffer(self._pinned.allocate_or_pageable(largest)) for _ in range(count)]

    @property
    def nbytes(self) -> int:
        """Returns the bytes of host memory."""
        return sum(buffer.data.nbytes for buffer in self._buffers)

    @property
    def pinned_bytes(self) -> int:
        """Returns the bytes of host memory that are page-locked."""
        return self._pinned.nbytes

    def pin(self) -> None:
        """Page-locks the buffers again after `unpin`, as far as the system lets it."""
        self._pinned.pin_all(buffer.data for buffer in self._buffers)

    def unpin(self) -> None:
        """Makes the buffers pageable. No iteration may be running."""
        self._pinned.unpin_all()

    def prefetch(self, layers: Sequence[int], threads: IterationThreads) -> Iterator[Upload]:
        """Starts a thread that reads these layers in order. Only one iteration at a time may use the buffers.

        Args:
            layers: numbers of layers that have a layout.
            threads: the threads of the iteration; closing them ends the reading.

        Returns:
            One upload per layer.
        """
        for buffer in self._buffers:
            buffer.full = False
        return Prefetcher(self._read(layers, threads), threads, "magi-read")

    def _read(self, layers: Sequence[int], threads: IterationThreads) -> Iterator[Upload]:
        reader = replace(self._reader, source=_Interruptible(self._reader.source, threads.raise_if_closed))
        for turn, layer in enumerate(layers):
            buffer, layout = self._buffers[turn % len(self._buffers)], self._layouts[layer]
            self._wait_until_reusable(buffer, threads)
            data = buffer.data[: layout.nbytes]  # (layout.nbytes,)
            layout.pack_into(data, reader.block(layer), threads.raise_if_closed)
            buffer.full = True

            def on_enqueued(copied: Event, buffer: _Buffer = buffer) -> None:
                with threads.lock_and_notify():
                    buffer.full, buffer.copied = False, copied

            yield Upload((data,), on_enqueued)

    def _wait_until_reusable(self, buffer: _Buffer, threads: IterationThreads) -> None:
        threads.wait_for(lambda: not buffer.full or None)
        threads.wait_for(lambda: self._copy_engine.query(buffer.copied) or None, _POLL_INTERVAL)


class _Interruptible:
    """A `TensorSource` that calls `check` before it reads a tensor; an error that it raises ends the reading."""

    def __init__(self, source: TensorSource, check: Callable[[], None]) -> None:
        self._source, self._check = source, check

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._source.tensors

    def tensor(self, name: str) -> torch.Tensor:
        self._check()
        return self._source.tensor(name)

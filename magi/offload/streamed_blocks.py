"""Weights of a model that does not fit on the device: some layers stay there, the others are uploaded for each use."""

import warnings
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import replace

import torch

from ..system.progress import OnProgress
from ..transformer.float8 import StoredFp8
from ..transformer.weights import BlockWeights, WeightReader
from .copy_engine import CopyEngine, open_copy_engine
from .file_reader import FileReader
from .packing import block_layouts
from .pinned_memory import Pin, PinnedMemory, PinningError, pageable_memory
from .prefetch import IterationThreads
from .ring_buffer import RingBuffer, Upload


def ring_bytes(sizes: Sequence[int], slots: int) -> int:
    """Returns the bytes of the ring buffer in device memory that layers are uploaded to.

    Args:
        sizes: bytes of each layer that does not stay on the device, see `packing.packed_bytes`.
        slots: layers in the ring buffer at a time, the one in use included.
    """
    if not sizes:
        return 0
    counts = Counter(sizes)
    common = max(counts, key=lambda size: (counts[size], size))
    return min(sum(sizes), max(*sizes, slots * common))


class StreamedBlocks:
    """A `BlockSource` whose layers stay on the device, wait on the host, or are read from the file at every use.

    A layer that does not stay is uploaded in one copy while earlier layers compute, and is never copied back. On a CPU
    nothing is uploaded: layers that do not stay are read at every use, which costs nothing if they are used in their
    stored form.
    """

    def __init__(
        self,
        reader: WeightReader,
        on_device: Collection[int],
        on_host: Collection[int],
        slots: int,
        progress: OnProgress | None = None,
        *,
        copy_engine: CopyEngine | None = None,
        pin: Pin | None = None,
    ) -> None:
        """Reads the layers that stay on the device or wait on the host, and allocates all memory.

        Args:
            reader: reads layers for the device.
            on_device: layers that stay on the device.
            on_host: layers that wait in page-locked host memory, in the form they are used in. If page-locking fails
                they are read from the file instead. Layers that are quantised to float8 always wait on the host, in
                pageable memory if need be.
            slots: layers in the ring buffer at a time, the one in use included; at least 1.
            progress: called with (layers placed, layers to place); an error that it raises frees everything.
            copy_engine: uploads to the device; None opens one.
            pin: page-locks host memory; see `PinnedMemory`.

        Raises:
            ValueError: `slots` is less than 1.
        """
        if slots < 1:
            raise ValueError(f"slots is {slots}: at least one layer must be on the device")
        self._reader = reader
        self._slots = slots
        self._in_place = copy_engine is None and reader.device.type in ("cpu", "meta")  # used from where they are read
        self._copy_engine = copy_engine or open_copy_engine(reader.device)
        self._pin = pin
        self._layouts = block_layouts(reader)
        self._pinned = PinnedMemory(reader.device, pin)
        self._can_pin = self._pinned.supported
        self._on_device: dict[int, BlockWeights] = {}
        self._on_host: dict[int, torch.Tensor] = {}  # layer -> (bytes,) uint8
        self._ring: RingBuffer | None = None
        self._file_reader: FileReader | None = None
        try:
            with torch.inference_mode(False):  # inference tensors could not be used outside of inference mode
                self._place(on_device, on_host, progress)
            self._allocate_buffers()
        except BaseException:
            self._on_device.clear()
            self._on_host.clear()
            self._pinned.unpin_all()
            raise

    def __len__(self) -> int:
        return len(self._layouts)

    @property
    def on_device(self) -> frozenset[int]:
        """Returns the layers that stay on the device."""
        return frozenset(self._on_device)

    @property
    def nbytes(self) -> int:
        """Returns the bytes of device memory."""
        resident = sum(self._packed_bytes(layer) for layer in self._on_device)
        return resident + (self._ring.nbytes if self._ring else 0)

    @property
    def host_bytes(self) -> int:
        """Returns the bytes of host memory, without the file's pages in the system's page cache."""
        waiting = sum(data.nbytes for data in self._on_host.values())
        return waiting + (self._file_reader.nbytes if self._file_reader else 0)

    @property
    def pinned_bytes(self) -> int:
        """Returns the bytes of host memory that are page-locked."""
        return self._pinned.nbytes + (self._file_reader.pinned_bytes if self._file_reader else 0)

    def pin(self) -> None:
        """Page-locks host memory again after `unpin`; what the system refuses is copied from pageable memory, slower."""
        self._pinned.pin_all(self._on_host.values())
        if self._file_reader:
            self._file_reader.pin()

    def unpin(self) -> None:
        """Makes all host memory pageable between two runs, for others to page-lock theirs. Nothing is read again."""
        self._pinned.unpin_all()
        if self._file_reader:
            self._file_reader.unpin()

    def __iter__(self) -> Generator[BlockWeights, None, None]:
        """Yields the layers in order. Only one iteration can run at a time: starting another closes it."""
        if self._in_place or len(self._on_device) == len(self):
            for layer in range(len(self)):
                if self._in_place:
                    self._reader.check_unchanged()
                yield self._on_device[layer] if layer in self._on_device else self._reader.block(layer)
            return
        if self._ring is None:
            self._allocate_buffers()  # `keep_on_device` failed to allocate them
        assert self._ring is not None  # noqa: S101 (allocated just above)
        uploads = self._ring.start_uploads(self._uploads)
        try:
            for layer, layout in enumerate(self._layouts):
                if layer in self._on_device:
                    yield self._on_device[layer]
                else:
                    yield layout.unpack(next(uploads))
                    uploads.release()
        finally:
            uploads.close()

    def keep_on_device(self, layers: Collection[int]) -> None:
        """Frees the layers on the device that are not among `layers`. From now on they are uploaded at every use."""
        if self._ring:
            self._ring.close()
        for layer in self._on_device.keys() - set(layers):
            if self._is_stored_fp8(layer):
                if self._in_place:
                    continue
                data = self._allocate_on_host(layer)
                assert data is not None  # noqa: S101 (quantised layers are never read from the file again)
                self._layouts[layer].pack_into(data, self._on_device[layer])
                self._on_host[layer] = data
            del self._on_device[layer]
        self._allocate_buffers()

    # -- placement and memory ----------------------------------------------------------------------------------------

    def _place(self, on_device: Collection[int], on_host: Collection[int], progress: OnProgress | None) -> None:
        stored = {layer for layer in range(len(self)) if self._is_stored_fp8(layer)}
        staying = set(on_device) | (stored if self._in_place else set())
        waiting = set() if self._in_place else (stored | set(on_host)) - staying
        # Quantising on the device takes a fraction of the CPU's time. Without it, layers are read into host memory.
        by_device = self._in_place or self._reader.store_fp8
        reader = self._reader if by_device else replace(self._reader, device=torch.device("cpu"))
        for placed, layer in enumerate(sorted(staying | waiting), 1):
            layout = self._layouts[layer]
            if self._in_place:
                self._on_device[layer] = reader.block(layer)
            elif layer in staying:
                data = torch.empty(layout.nbytes, dtype=torch.uint8, device=self._reader.device)
                layout.pack_into(data, reader.block(layer))
                self._on_device[layer] = layout.unpack(data)
            elif (data_on_host := self._allocate_on_host(layer)) is not None:
                layout.pack_into(data_on_host, reader.block(layer))
                self._on_host[layer] = data_on_host
            if progress:
                progress(placed, len(staying | waiting))

    def _allocate_on_host(self, layer: int) -> torch.Tensor | None:
        """Allocates host memory for a layer.

        Returns:
            (bytes,) uint8 in page-locked memory. If page-locking fails: pageable memory for a layer that is quantised
            here, and None for a layer that can be read from the file at every use.
        """
        size, stored = self._layouts[layer].nbytes, self._is_stored_fp8(layer)
        if self._can_pin:
            try:
                return self._pinned.allocate(size)
            except PinningError as error:
                self._can_pin = False
                rest = "ordinary memory" if stored else "the file"
                warnings.warn(
                    f"The weights cannot be kept in page-locked host memory ({error}). "
                    f"They are copied from {rest} at every use, which is slower.",
                    stacklevel=2,
                )
        return pageable_memory(size) if stored else None

    def _allocate_buffers(self) -> None:
        """Allocates the ring buffer on the device, and the host buffers for layers that are read from the file."""
        streamed = self._streamed_layers()
        needed = ring_bytes([self._packed_bytes(layer) for layer in streamed], self._slots)
        if needed > (self._ring.nbytes if self._ring else 0):
            self._ring = None  # frees the old one before the new one is allocated
            self._ring = RingBuffer(self._copy_engine, needed, self._slots)
        from_file = {layer: self._layouts[layer] for layer in streamed if layer not in self._on_host}
        if from_file:
            self._file_reader = None
            self._file_reader = FileReader(self._reader, from_file, self._copy_engine, self._pin)

    def _uploads(self, threads: IterationThreads) -> Iterator[Upload]:
        streamed = self._streamed_layers()
        from_file = [layer for layer in streamed if layer not in self._on_host]
        read = self._file_reader.prefetch(from_file, threads) if self._file_reader else iter(())
        return (Upload((self._on_host[layer],)) if layer in self._on_host else next(read) for layer in streamed)

    def _streamed_layers(self) -> list[int]:
        """Returns the layers that are uploaded at every use, in order."""
        return [] if self._in_place else [layer for layer in range(len(self)) if layer not in self._on_device]

    def _packed_bytes(self, layer: int) -> int:
        return self._layouts[layer].nbytes

    def _is_stored_fp8(self, layer: int) -> bool:
        """Returns True if a layer is quantised here, which takes too long to repeat at every use."""
        return any(isinstance(part, StoredFp8) for part in vars(self._layouts[layer].like).values())

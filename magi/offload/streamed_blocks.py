"""Layers that do not all fit on the device: some stay there, the others are brought ahead of their turn and dropped after it."""

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import replace

import torch

from ..transformer.float8 import StoredFp8
from ..transformer.weights import BlockWeights, WeightReader
from .copy_engine import Bus, open_bus
from .file_reader import Staging
from .packing import block_layouts
from .pinned_memory import LockedMemory, Pin, PinningError, host_bytes
from .prefetch import Session
from .ring_buffer import Feed, Load

Progress = Callable[[int, int], None]


def arena_bytes(sizes: Sequence[int], slots: int) -> int:
    """Bytes of device memory that layers pass through which do not stay there.

    Args:
        sizes: of each of these layers, see `packing.packed_bytes`.
        slots: layers that are there at a time, the one in use included.
    """
    if not sizes:
        return 0
    counts = Counter(sizes)
    common = max(counts, key=lambda size: (counts[size], size))
    return min(sum(sizes), max(*sizes, slots * common))


class StreamedBlocks:
    """A `BlockSource` of layers of which any may stay on the device, wait on the host, or be read from the file at every use.

    What does not stay goes one way, in one copy a layer, while earlier layers compute. On a CPU there is nothing to bring:
    layers that do not stay are read at every use, which costs nothing where they are used as they are stored.
    """

    def __init__(
        self,
        reader: WeightReader,
        on_device: Collection[int],
        on_host: Collection[int],
        slots: int,
        progress: Progress | None = None,
        *,
        bus: Bus | None = None,
        pin: Pin | None = None,
    ) -> None:
        """Reads what stays or waits, and allocates all memory.

        Args:
            reader: reads them for the device.
            on_device: layers that stay there.
            on_host: layers that wait in page-locked host memory, in the form they are used in. Where none can be locked they are
                taken from the file instead. Layers that are to be stored in float8 always wait, if need be in ordinary memory.
            slots: layers that are on the device at a time beside those that stay, the one in use included; at least 1.
            progress: called with (layers placed, layers to place); what it raises ends that, and nothing is kept.
            bus: to the device; None opens one.
            pin: locks host memory; None: `page_lock` for CUDA and ROCm, others lock none.
        """
        if slots < 1:
            raise ValueError(f"slots is {slots}: one layer at least must be on the device")
        self._reader = reader
        self._slots = slots
        self._in_place = bus is None and reader.device.type in ("cpu", "meta")  # used where they are read
        self._bus = bus or open_bus(reader.device)
        self._pin = pin
        self._layouts = block_layouts(reader)
        self._locked = LockedMemory(reader.device, pin)
        self._locks = self._locked.possible
        self._on_device: dict[int, BlockWeights] = {}
        self._on_host: dict[int, torch.Tensor] = {}
        self._feed: Feed | None = None
        self._staging: Staging | None = None
        try:
            with torch.inference_mode(False):  # what is made here is also used outside of it
                self._place(on_device, on_host, progress)
            self._make_room()
        except BaseException:
            self._on_device.clear()
            self._on_host.clear()
            self._locked.release()
            raise

    def __len__(self) -> int:
        return len(self._layouts)

    @property
    def on_device(self) -> frozenset[int]:
        """Layers that stay on the device."""
        return frozenset(self._on_device)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        resident = sum(self._size(layer) for layer in self._on_device)
        return resident + (self._feed.nbytes if self._feed else 0)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory, beside what the system keeps of the file."""
        waiting = sum(data.nbytes for data in self._on_host.values())
        return waiting + (self._staging.nbytes if self._staging else 0)

    def __iter__(self) -> Generator[BlockWeights, None, None]:
        """The layers in order. It also ends an iteration that was given up; only one can be under way at a time."""
        if self._in_place or len(self._on_device) == len(self):
            for layer in range(len(self)):
                yield self._on_device[layer] if layer in self._on_device else self._reader.block(layer)
            return
        if self._feed is None:
            self._make_room()  # there was none when layers had to leave
        assert self._feed is not None  # noqa: S101 (made a line before)
        arriving = self._feed.send(self._loads)
        try:
            for layer, layout in enumerate(self._layouts):
                if layer in self._on_device:
                    yield self._on_device[layer]
                else:
                    yield layout.block(next(arriving))
                    arriving.release()
        finally:
            arriving.close()

    def keep_on_device(self, layers: Collection[int]) -> None:
        """Frees what stays on the device but is not among `layers`; it is brought anew at each turn from now on."""
        if self._feed:
            self._feed.close()
        for layer in self._on_device.keys() - set(layers):
            if self._is_stored_fp8(layer):
                if self._in_place:
                    continue
                data = self._host_memory(layer)
                assert data is not None  # noqa: S101 (these are not left to the file)
                self._layouts[layer].fill(data, self._on_device[layer])
                self._on_host[layer] = data
            del self._on_device[layer]
        self._make_room()

    # -- where they lie ----------------------------------------------------------------------------------------------

    def _place(self, on_device: Collection[int], on_host: Collection[int], progress: Progress | None) -> None:
        stored = {layer for layer in range(len(self)) if self._is_stored_fp8(layer)}
        staying = set(on_device) | (stored if self._in_place else set())
        waiting = set() if self._in_place else (stored | set(on_host)) - staying
        # Only what is to be quantised goes by way of the device, which does it in a fraction of the time.
        by_device = self._in_place or self._reader.store_fp8
        reader = self._reader if by_device else replace(self._reader, device=torch.device("cpu"))
        for placed, layer in enumerate(sorted(staying | waiting), 1):
            layout = self._layouts[layer]
            if self._in_place:
                self._on_device[layer] = reader.block(layer)
            elif layer in staying:
                data = torch.empty(layout.nbytes, dtype=torch.uint8, device=self._reader.device)
                layout.fill(data, reader.block(layer))
                self._on_device[layer] = layout.block(data)
            elif (room := self._host_memory(layer)) is not None:
                layout.fill(room, reader.block(layer))
                self._on_host[layer] = room
            if progress:
                progress(placed, len(staying | waiting))

    def _host_memory(self, layer: int) -> torch.Tensor | None:
        """Where a layer may wait: in locked memory; else in ordinary memory, or nowhere if the file will do."""
        size, stored = self._layouts[layer].nbytes, self._is_stored_fp8(layer)
        if self._locks:
            try:
                return self._locked.take(size)
            except PinningError as error:
                self._locks = False
                rest = "ordinary memory" if stored else "the file"
                warnings.warn(
                    f"The weights cannot be kept in page-locked host memory ({error}). They are taken from {rest} each time, "
                    "which is slower.",
                    stacklevel=2,
                )
        return host_bytes(size) if stored else None

    def _make_room(self) -> None:
        """Memory for what passes through: on the device, and on the host for what comes from the file."""
        passing = [] if self._in_place else [layer for layer in range(len(self)) if layer not in self._on_device]
        needed = arena_bytes([self._size(layer) for layer in passing], self._slots)
        if needed > (self._feed.nbytes if self._feed else 0):
            self._feed = None
            self._feed = Feed(self._bus, needed, self._slots)
        from_file = {layer: self._layouts[layer] for layer in passing if layer not in self._on_host}
        if from_file:
            self._staging = None
            self._staging = Staging(self._reader, from_file, self._bus, self._pin)

    def _loads(self, session: Session) -> Iterator[Load]:
        passing = [layer for layer in range(len(self)) if layer not in self._on_device]
        from_file = [layer for layer in passing if layer not in self._on_host]
        read = self._staging.read(from_file, session) if self._staging else iter(())
        return (Load((self._on_host[layer],)) if layer in self._on_host else next(read) for layer in passing)

    def _size(self, layer: int) -> int:
        return self._layouts[layer].nbytes

    def _is_stored_fp8(self, layer: int) -> bool:
        """Whether a layer is quantised here, which is too much to do at every use."""
        return any(isinstance(part, StoredFp8) for part in vars(self._layouts[layer].like).values())

"""Layers that wait in host memory and are copied to the device in their turn."""

import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from .host_memory import free_host_memory, page_lock
from .weights import BlockSource, BlockWeights, MappedBlocks, WeightReader, map_tensors, tensors_in

_ALIGNMENT = 256  # bytes: what matrix kernels like best, and a multiple of every element
_ROOM = 1.25  # free host memory, as a multiple of what is locked there

Progress = Callable[[int, int], None]
Pin = Callable[[torch.Tensor], Callable[[], None]]


@dataclass(frozen=True)
class _Packed:
    """A block as one run of bytes, and what lies in it: the same dataclass with tensors on the meta device."""

    data: torch.Tensor  # (bytes,) uint8
    layout: BlockWeights

    @classmethod
    def empty(cls, layout: BlockWeights) -> "_Packed":
        """Host memory for a block laid out so."""
        size = sum(_aligned(like.nbytes) for like in tensors_in(layout))
        return cls(torch.empty(size, dtype=torch.uint8), layout)

    def block(self) -> BlockWeights:
        """The block, its tensors views of the data."""
        start = 0

        def take(like: torch.Tensor) -> torch.Tensor:
            nonlocal start
            part = self.data[start : start + like.nbytes]
            start += _aligned(like.nbytes)
            return part.view(like.dtype).view(like.shape)

        return map_tensors(self.layout, take)

    def fill(self, block: BlockWeights) -> None:
        """Copies a block's tensors, from any device, into the data."""
        for target, tensor in zip(tensors_in(self.block()), tensors_in(block), strict=True):
            target.copy_(tensor)


class HostBlocks:
    """Blocks in host memory in the form they are used in: what is converted on the way is converted once, not at every fetch.

    Each block is one run of bytes and reaches the device in one copy.
    """

    def __init__(self, blocks: BlockSource, device: torch.device, progress: Progress | None = None) -> None:
        """Reads all of `blocks`, on whatever device they come, for use on `device`. `progress` is told (blocks kept, blocks)."""
        self._device = device
        self._kept: list[_Packed] = []
        for block in blocks:
            packed = self._room_for(map_tensors(block, lambda t: t.to("meta")))
            packed.fill(block)
            self._kept.append(packed)
            if progress:
                progress(len(self._kept), len(blocks))

    def _room_for(self, layout: BlockWeights) -> _Packed:
        return _Packed.empty(layout)

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        return sum(packed.data.nbytes for packed in self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[BlockWeights]:
        for packed in self._kept:
            data = packed.data.to(self._device, non_blocking=self._device.type == "cuda")
            yield replace(packed, data=data).block()


class PinningError(RuntimeError):
    """There is not enough page-locked host memory."""


class PinnedBlocks(HostBlocks):
    """Blocks in page-locked host memory, from which a device copies at the full speed of its bus."""

    def __init__(
        self, blocks: BlockSource, device: torch.device, progress: Progress | None = None, pin: Pin | None = None
    ) -> None:
        """As `HostBlocks`; `pin` locks memory in place and returns what undoes that.

        Raises:
            PinningError: the system does not give or lock so much. Nothing is kept then.
        """
        self._pin = pin or page_lock
        self._unlock: list[Callable[[], None]] = []
        # Also when reading is cancelled. Not at exit: the device may be gone by then, and the memory goes anyway.
        weakref.finalize(self, _call_all, self._unlock).atexit = False
        super().__init__(blocks, device, progress)

    def _room_for(self, layout: BlockWeights) -> _Packed:
        try:
            packed = super()._room_for(layout)
            self._unlock.append(self._pin(packed.data))
        except (RuntimeError, MemoryError) as error:
            raise PinningError(str(error)) from error
        return packed


def block_source(
    reader: WeightReader,
    offload: bool,
    pinned: bool | None = None,
    nbytes: int = 0,
    progress: Progress | None = None,
    pin: Pin | None = None,
) -> BlockSource:
    """A model's layers, from where they are to lie between two uses.

    Args:
        reader: reads them for the device.
        offload: not on the device. Then they lie, in this order, in page-locked host memory where `pinned` allows; in ordinary
            host memory if they are to be stored in float8, which would else be done again at every fetch; or in the mapped file.
        pinned: page-lock the host memory; None: if the device is CUDA (or ROCm) and the host has memory to spare. Means
            nothing on the CPU.
        nbytes: of all layers together, as they are used.
        progress: called with (layers placed, layers).
        pin: see `PinnedBlocks`.
    """
    mapped = MappedBlocks(reader)
    if not offload:
        return _resident(mapped, progress)
    if pinned is None:
        pinned = reader.device.type == "cuda" and (free_host_memory() or 0) >= _ROOM * nbytes
    # Only what is to be quantised goes by way of the device, which does it in a fraction of the time.
    source = mapped if reader.store_fp8 else MappedBlocks(replace(reader, device=torch.device("cpu")))
    if pinned and reader.device.type != "cpu":
        try:
            return PinnedBlocks(source, reader.device, progress, pin)
        except PinningError as error:
            rest = "ordinary memory" if reader.store_fp8 else "the file"
            warnings.warn(
                f"The weights cannot be kept in page-locked host memory ({error}). They are taken from {rest} each time, which "
                "is slower.",
                stacklevel=2,
            )
    return HostBlocks(mapped, reader.device, progress) if reader.store_fp8 else mapped


def _resident(blocks: BlockSource, progress: Progress | None) -> list[BlockWeights]:
    kept = []
    for block in blocks:
        kept.append(block)
        if progress:
            progress(len(kept), len(blocks))
    return kept


def packed_bytes(block: BlockWeights) -> int:
    return sum(_aligned(t.nbytes) for t in tensors_in(block))


def arena_bytes(sizes, slots):
    from collections import Counter

    if not sizes:
        return 0
    return max(max(sizes), slots * Counter(sizes).most_common(1)[0][0])


def _aligned(nbytes: int) -> int:
    return math.ceil(nbytes / _ALIGNMENT) * _ALIGNMENT


def _call_all(calls: list[Callable[[], None]]) -> None:
    while calls:
        calls.pop()()


class StreamedBlocks:
    def __init__(self, reader, on_device, on_host, slots, progress=None):
        self._reader = reader
        self._kept = {}
        for i in range(len(self)):
            if i in on_device:
                self._kept[i] = reader.block(i)
            if progress:
                progress(i + 1, len(self))

    def __len__(self):
        return self._reader.config.num_layers

    def __iter__(self):
        return ((self._kept[i] if i in self._kept else self._reader.block(i)) for i in range(len(self)))

    def keep_on_device(self, layers):
        self._kept = {i: b for i, b in self._kept.items() if i in layers}

"""Layers on their way from the mapped file: read ahead into two host buffers, from which they go on to the device."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..checkpoint.mapped_file import TensorInfo, TensorSource
from ..transformer.weights import WeightReader
from .copy_engine import Bus, Mark
from .packing import Layout
from .pinned_memory import LockedMemory, Pin
from .prefetch import Ahead, Session
from .ring_buffer import Load

_BUFFERS = 2  # one is filled while the other is copied from
_POLL = 0.001  # seconds between looks at whether a copy has been made


@dataclass(eq=False)
class _Buffer:
    """Host memory; `full` until the copying from it has begun, and in use until `copied` is reached."""

    data: torch.Tensor
    full: bool = False
    copied: Mark = None


class Staging:
    """Reads layers as they are used, in a thread, and waits before a buffer is filled anew until it has been copied from."""

    def __init__(
        self,
        reader: WeightReader,
        layouts: Mapping[int, Layout],
        bus: Bus,
        pin: Pin | None = None,
    ) -> None:
        """Allocates the buffers, page-locked where that can be.

        Args:
            reader: reads layers, whatever device they are for.
            layouts: of the layers that may be asked for, at least one.
            bus: tells when a copy has been made.
            pin: as for `LockedMemory`.
        """
        self._locked = LockedMemory(reader.device, pin)
        self._reader = replace(reader, device=torch.device("cpu"))
        self._layouts = layouts
        self._bus = bus
        largest = max(layout.nbytes for layout in layouts.values())
        self._buffers = [_Buffer(self._locked.take_or_else(largest)) for _ in range(min(_BUFFERS, len(layouts)))]

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        return sum(buffer.data.nbytes for buffer in self._buffers)

    def read(self, layers: Sequence[int], session: Session) -> Iterator[Load]:
        """The layers in this order, read from now on; one call at a time."""
        for buffer in self._buffers:
            buffer.full = False
        return Ahead(self._read(layers, session), session, "magi-read")

    def _read(self, layers: Sequence[int], session: Session) -> Iterator[Load]:
        reader = replace(self._reader, source=_Interruptible(self._reader.source, session.check))
        for turn, layer in enumerate(layers):
            buffer, layout = self._buffers[turn % len(self._buffers)], self._layouts[layer]
            self._wait_for(buffer, session)
            data = buffer.data[: layout.nbytes]
            layout.fill(data, reader.block(layer), session.check)
            buffer.full = True

            def sent(mark: Mark, buffer: _Buffer = buffer) -> None:
                with session.changing():
                    buffer.full, buffer.copied = False, mark

            yield Load((data,), sent)

    def _wait_for(self, buffer: _Buffer, session: Session) -> None:
        session.wait(lambda: not buffer.full or None)
        session.wait(lambda: self._bus.reached(buffer.copied) or None, _POLL)


class _Interruptible:
    """A `TensorSource` that asks before each tensor whether it is still wanted."""

    def __init__(self, source: TensorSource, check: Callable[[], None]) -> None:
        self._source, self._check = source, check

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._source.tensors

    def tensor(self, name: str) -> torch.Tensor:
        self._check()
        return self._source.tensor(name)

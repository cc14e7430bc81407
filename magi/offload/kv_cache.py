"""Keys and values of finished chunks: a ring with room for as many chunks as any later one looks back."""

from collections.abc import Generator, Iterator, Mapping, Sequence

import torch

from ..transformer.model import Transformer
from .copy_engine import Bus, open_bus
from .packing import aligned
from .pinned_memory import LockedMemory, Pin
from .prefetch import Session
from .ring_buffer import Feed, Load

_LAYERS_AT_A_TIME = 2  # on their way from the host: the one in use and the next


class KVCache:
    """Clean keys and values by layer and chunk. Chunk c lives in slot c % slots and is overwritten by chunk c + slots.

    On the host they wait in page-locked memory where there is such, and are brought to the device a layer ahead of their use.
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        groups: int,
        tokens: int,
        head_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        on_host: bool = False,
        bus: Bus | None = None,
        pin: Pin | None = None,
    ) -> None:
        """Allocates the whole ring at once, so that a run that starts has the memory to finish.

        Args:
            layers: transformer layers.
            slots: chunks kept.
            groups: key heads.
            tokens: tokens of a chunk.
            head_size: size of one head.
            dtype: of the keys and values.
            device: where they are used.
            on_host: keep them on the host instead; means nothing on a CPU.
            bus: to the device; None opens one when it is needed.
            pin: locks host memory; see `LockedMemory`.
        """
        self._shape = (layers, slots, 2, groups, tokens, head_size)
        self._dtype = dtype
        self._device = torch.device(device)
        self._bus = bus
        self._locked = LockedMemory(self._device, pin)
        self._feed: Feed | None = None
        self._held: dict[tuple[int, int], int] = {}  # (layer, slot) -> chunk
        self._on_host = on_host and self._may_leave()
        self._ring = self._allocate(self._on_host)

    @classmethod
    def for_run(cls, model: Transformer, slots: int, height: int, width: int) -> "KVCache":
        """Makes an empty cache for a model's `slots` chunks of latents of this height and width, where the model wants it."""
        c = model.shape
        tokens = model.config.runtime.chunk_width * (height // c.patch_size) * (width // c.patch_size)
        return cls(
            c.num_layers,
            slots,
            c.num_query_groups,
            tokens,
            c.kv_channels,
            dtype=model.dtype,
            device=model.device,
            on_host=model.cache_device == "host",
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the ring."""
        return self._ring.nbytes

    @property
    def device_bytes(self) -> int:
        """Bytes on the device: the ring, or what its layers pass through."""
        if self._on_host:
            return self._feed.nbytes if self._feed else 0
        return self.nbytes

    def store(self, layer: int, chunk: int, kv: torch.Tensor) -> None:
        """Keeps a chunk's keys and values, (2, groups, tokens, head_size) on any device: they may be overwritten afterwards.

        They take the place of chunk - slots: a view of that from `stream` must not be in use any more.
        """
        slots = self._shape[1]
        if slots:
            self._ring[layer, chunk % slots].copy_(kv)
            self._held[layer, chunk % slots] = chunk

    def stream(self, chunks: Sequence[int]) -> Generator[Mapping[int, torch.Tensor], None, None]:
        """Keys and values of these chunks, layer by layer: to be iterated over once, and closed if it is left early.

        Returns:
            Per layer chunk -> (2, groups, tokens, head_size) on the device, valid until the next layer is asked for.

        Raises:
            LookupError: a chunk is not kept in every layer, found before anything is brought.
        """
        layers, slots = self._shape[:2]
        wanted = tuple(dict.fromkeys(chunks))
        for chunk in wanted:
            for layer in range(layers):
                if not slots or self._held.get((layer, chunk % slots)) != chunk:
                    raise LookupError(f"chunk {chunk} is not in the cache of layer {layer}")
        return self._from_host(wanted) if self._on_host and wanted else self._views(wanted)

    def move_to_host(self) -> None:
        """Makes room on the device. What is kept stays so, and goes on to be used as before."""
        if not self._on_host and self._may_leave():
            self._ring = self._allocate(on_host=True).copy_(self._ring)
            self._on_host = True

    # -- where they lie ----------------------------------------------------------------------------------------------

    def _may_leave(self) -> bool:
        return self._bus is not None or self._device.type not in ("cpu", "meta")

    def _allocate(self, on_host: bool) -> torch.Tensor:
        nbytes = torch.empty(self._shape, dtype=self._dtype, device="meta").nbytes
        with torch.inference_mode(False):  # it may be used outside of it
            if on_host and nbytes:
                return self._locked.take_or_else(nbytes).view(self._dtype).view(self._shape)
            return torch.empty(self._shape, dtype=self._dtype, device=self._device)

    def _views(self, chunks: Sequence[int]) -> Generator[Mapping[int, torch.Tensor], None, None]:
        layers, slots = self._shape[:2]
        return ({chunk: self._ring[layer, chunk % slots] for chunk in chunks} for layer in range(layers))

    def _from_host(self, chunks: Sequence[int]) -> Generator[Mapping[int, torch.Tensor], None, None]:
        def loads(session: Session) -> Iterator[Load]:
            return (Load(tuple(kv.view(-1).view(torch.uint8) for kv in kept.values())) for kept in self._views(chunks))

        layers, item = self._shape[0], self._ring[0, 0]
        arriving = self._room_for(len(chunks) * item.nbytes).send(loads)
        try:
            for _ in range(layers):
                parts = next(arriving)[: len(chunks) * item.nbytes].split(item.nbytes)
                yield {c: part.view(self._dtype).view(item.shape) for c, part in zip(chunks, parts, strict=True)}
                arriving.release()
        finally:
            arriving.close()

    def _room_for(self, nbytes: int) -> Feed:
        """Device memory through which layers of so many bytes may pass; it is kept."""
        needed = _LAYERS_AT_A_TIME * aligned(nbytes)
        if self._feed is None or self._feed.nbytes < needed:
            self._bus = self._bus or open_bus(self._device)
            if self._feed:
                self._feed.close()
            self._feed = None
            self._feed = Feed(self._bus, needed, _LAYERS_AT_A_TIME)
        return self._feed

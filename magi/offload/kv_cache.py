"""K/V cache of finished chunks: a ring with one slot for each chunk that a later chunk may attend to."""

from collections.abc import Generator, Iterator, Mapping, Sequence

import torch

from ..transformer.model import Transformer
from .copy_engine import CopyEngine, open_copy_engine
from .packing import aligned
from .pinned_memory import Pin, PinnedMemory
from .prefetch import IterationThreads
from .ring_buffer import RingBuffer, Upload

_LAYERS_ON_DEVICE = 2  # of a cache on the host: the layer in use and the next one


class KVCache:
    """Caches clean K/V by layer and chunk. Chunk c is in slot c % slots, which chunk c + slots overwrites.

    A cache on the host is in page-locked memory if possible. Each layer is uploaded while the layer before it computes.
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
        copy_engine: CopyEngine | None = None,
        pin: Pin | None = None,
    ) -> None:
        """Allocates all slots at once, so that a run that starts has the memory to finish.

        Args:
            layers: transformer layers L.
            slots: chunks to keep.
            groups: K/V heads G.
            tokens: tokens S of a chunk.
            head_size: size d of a head.
            dtype: of K/V.
            device: where K/V are used.
            on_host: keeps K/V on the host; ignored on a CPU.
            copy_engine: uploads to the device; None opens one on first use.
            pin: page-locks host memory; see `PinnedMemory`.
        """
        self._shape = (layers, slots, 2, groups, tokens, head_size)
        self._dtype = dtype
        self._device = torch.device(device)
        self._copy_engine = copy_engine
        self._pinned = PinnedMemory(self._device, pin)
        self._upload_ring: RingBuffer | None = None
        self._cached_chunk: dict[tuple[int, int], int] = {}  # (layer, slot) -> chunk
        self._on_host = on_host and self._has_separate_host()
        self._kv = self._allocate(self._on_host)  # (L, slots, 2, G, S, d)

    @classmethod
    def for_run(cls, model: Transformer, slots: int, height: int, width: int) -> "KVCache":
        """Creates an empty cache for a model, where the model wants it.

        Args:
            model: gives layers, heads, dtype, and the place of the cache.
            slots: chunks to keep.
            height: of the latents.
            width: of the latents.
        """
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
            pin=model.pin,
        )

    @property
    def nbytes(self) -> int:
        """Returns the bytes of all slots, wherever they are."""
        return self._kv.nbytes

    @property
    def device_bytes(self) -> int:
        """Returns the bytes of device memory: of all slots, or of the ring buffer for uploads."""
        if self._on_host:
            return self._upload_ring.nbytes if self._upload_ring else 0
        return self.nbytes

    def store(self, layer: int, chunk: int, kv: torch.Tensor) -> None:
        """Copies a chunk's K/V into its slot, which held chunk - slots. Views of that from `stream` must not be in use.

        Args:
            layer: number of the layer.
            chunk: number of the chunk.
            kv: (2, G, S, d) on any device, keys before values.
        """
        slots = self._shape[1]
        if slots:
            self._kv[layer, chunk % slots].copy_(kv)
            self._cached_chunk[layer, chunk % slots] = chunk

    def stream(self, chunks: Sequence[int]) -> Generator[Mapping[int, torch.Tensor], None, None]:
        """Returns an iterator over the layers' K/V of these chunks. Close it if it is left early.

        Returns:
            For each layer chunk -> (2, G, S, d) on the device, valid until the next layer is requested.

        Raises:
            LookupError: a chunk is not in the cache of every layer. Raised by the call, before any upload.
        """
        layers, slots = self._shape[:2]
        wanted = tuple(dict.fromkeys(chunks))
        for chunk in wanted:
            for layer in range(layers):
                if not slots or self._cached_chunk.get((layer, chunk % slots)) != chunk:
                    raise LookupError(f"chunk {chunk} is not in the cache of layer {layer}")
        return self._uploaded(wanted) if self._on_host and wanted else self._views(wanted)

    def move_to_host(self) -> None:
        """Moves the cache to the host to free device memory. Its contents and its use do not change."""
        if not self._on_host and self._has_separate_host():
            self._kv = self._allocate(on_host=True).copy_(self._kv)
            self._on_host = True

    # -- storage and uploads -----------------------------------------------------------------------------------------

    def _has_separate_host(self) -> bool:
        return self._copy_engine is not None or self._device.type not in ("cpu", "meta")

    def _allocate(self, on_host: bool) -> torch.Tensor:
        """Allocates (L, slots, 2, G, S, d), uninitialised."""
        nbytes = torch.empty(self._shape, dtype=self._dtype, device="meta").nbytes
        with torch.inference_mode(False):  # inference tensors could not be written to outside of inference mode
            if on_host and nbytes:
                return self._pinned.allocate_or_pageable(nbytes).view(self._dtype).view(self._shape)
            return torch.empty(self._shape, dtype=self._dtype, device=self._device)

    def _views(self, chunks: Sequence[int]) -> Generator[Mapping[int, torch.Tensor], None, None]:
        layers, slots = self._shape[:2]
        return ({chunk: self._kv[layer, chunk % slots] for chunk in chunks} for layer in range(layers))  # (2, G, S, d)

    def _uploaded(self, chunks: Sequence[int]) -> Generator[Mapping[int, torch.Tensor], None, None]:
        def layer_uploads(threads: IterationThreads) -> Iterator[Upload]:
            for views in self._views(chunks):
                yield Upload(tuple(kv.view(-1).view(torch.uint8) for kv in views.values()))  # (slot.nbytes,) each

        layers, slot = self._shape[0], self._kv[0, 0]  # slot: (2, G, S, d)
        uploads = self._ring_for(len(chunks) * slot.nbytes).start_uploads(layer_uploads)
        try:
            for _ in range(layers):
                parts = next(uploads)[: len(chunks) * slot.nbytes].split(slot.nbytes)  # (slot.nbytes,) uint8 each
                kv = (part.view(self._dtype).view(slot.shape) for part in parts)  # (2, G, S, d) each
                yield dict(zip(chunks, kv, strict=True))
                uploads.release()
        finally:
            uploads.close()

    def _ring_for(self, layer_bytes: int) -> RingBuffer:
        """Returns a ring buffer for two layers of `layer_bytes`. It is kept until a larger one is needed."""
        needed = _LAYERS_ON_DEVICE * aligned(layer_bytes)
        if self._upload_ring is None or self._upload_ring.nbytes < needed:
            self._copy_engine = self._copy_engine or open_copy_engine(self._device)
            if self._upload_ring:
                self._upload_ring.close()
            self._upload_ring = None  # frees the old one before the new one is allocated
            self._upload_ring = RingBuffer(self._copy_engine, needed, _LAYERS_ON_DEVICE)
        return self._upload_ring

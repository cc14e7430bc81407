"""Keys and values of finished chunks: a ring with room for as many chunks as any later one looks back."""

import torch


class KVCache:
    """Clean keys and values by layer and chunk. Chunk c lives in slot c % slots and is overwritten by chunk c + slots."""

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
    ) -> None:
        """Allocates everything at once, so that a run that starts has the memory to finish.

        Args:
            layers: transformer layers.
            slots: chunks kept.
            groups: key heads.
            tokens: tokens of a chunk.
            head_size: size of one head.
            dtype: of the keys and values.
            device: where they are kept; need not be where they are used.
        """
        where = "cpu" if on_host else device
        self._ring = torch.empty(layers, slots, 2, groups, tokens, head_size, dtype=dtype, device=where)
        self._held: dict[tuple[int, int], int] = {}  # (layer, slot) -> chunk

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._ring.numel() * self._ring.element_size()

    def store(self, layer: int, chunk: int, kv: torch.Tensor) -> None:
        """Keeps a chunk's keys and values, (2, groups, tokens, head_size) on any device: they may be overwritten afterwards."""
        slots = self._ring.shape[1]
        if slots:
            self._ring[layer, chunk % slots].copy_(kv)
            self._held[layer, chunk % slots] = chunk

    def stream(self, chunks):
        for layer in range(self._ring.shape[0]):
            found = {}
            for chunk in chunks:
                found[chunk] = torch.empty_like(self._ring[layer, 0])
                self.load(layer, chunk, found[chunk])
            yield found

    def load(self, layer: int, chunk: int, out: torch.Tensor) -> None:
        """Copies a chunk's keys and values into `out`, (2, groups, tokens, head_size) on any device."""
        slot = chunk % self._ring.shape[1] if self._ring.shape[1] else -1
        if self._held.get((layer, slot)) != chunk:
            raise LookupError(f"chunk {chunk} is not in the cache of layer {layer}")
        # Elsewhere than on CUDA a copy that is not waited for may read what is stored next.
        out.copy_(self._ring[layer, slot], non_blocking=out.device.type == "cuda")

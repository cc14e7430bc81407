"""The inputs of a forward call of the transformer: passes of chunks, and the K/V cache it reads."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

CacheDevice = Literal["device", "host"]  # where the K/V cache lies
TOKEN_BLOCK = 4096  # tokens per layer call; fewer if memory is short
CPU_TOKEN_BLOCK = 256  # as fast there, and short enough to be cancelled between two


@dataclass(frozen=True)
class EncodedCaption:
    """A projected caption for cross attention: (tokens, D) in the compute dtype."""

    states: torch.Tensor


@dataclass(frozen=True)
class ChunkInput:
    """One chunk in one pass.

    Attributes:
        chunk: index in the video, which sets its positions and names its K/V.
        latents: (1, 16, W, h, w) float32.
        timestep: 0 (noise) .. 1 (clean).
        caption: input of its cross attention.
        first_kv_chunk: first chunk whose K/V it sees; the last one is itself.
        store: whether its K/V go into the cache, because the chunk is clean.
        wanted: whether its velocity is returned.
    """

    chunk: int
    latents: torch.Tensor
    timestep: float
    caption: EncodedCaption
    first_kv_chunk: int
    store: bool = False
    wanted: bool = True


@dataclass(frozen=True)
class Pass:
    """Chunks that see each other's K/V, in ascending order, and the kind of condition vector they share."""

    chunks: tuple[ChunkInput, ...]
    conditional: bool


class Cache(Protocol):
    """K/V cache of finished chunks; `offload.kv_cache.KVCache` implements it."""

    def store(self, layer: int, chunk: int, kv: torch.Tensor) -> None:
        """Copies the K/V of a chunk, (2, G, S, d), into the cache."""
        ...

    def stream(self, chunks: Sequence[int]) -> Generator[Mapping[int, torch.Tensor], None, None]:
        """Yields a mapping per layer: chunk -> its K/V, (2, G, S, d), on the device."""
        ...

"""What a forward call of the transformer is asked for: passes of chunks."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

CacheDevice = Literal["device", "host"]  # where the K/V cache lies
TOKEN_BLOCK = 4096  # tokens that are taken through a layer at a time, unless memory asks for fewer


@dataclass(frozen=True)
class EncodedCaption:
    """A caption as cross attention takes it: (tokens, D) in the compute dtype."""

    states: torch.Tensor


@dataclass(frozen=True)
class ChunkInput:
    """One chunk in one pass.

    Attributes:
        chunk: its place in the video, for positions and for keys.
        latents: (1, 16, W, h, w) float32.
        timestep: 0 (noise) .. 1 (clean).
        caption: what its tokens cross-attend to.
        first_key: first chunk whose keys it sees; the last one is itself.
        store: its keys and values go into the cache: the chunk is clean.
        wanted: its velocity is asked for.
    """

    chunk: int
    latents: torch.Tensor
    timestep: float
    caption: EncodedCaption
    first_key: int
    store: bool = False
    wanted: bool = True


@dataclass(frozen=True)
class Pass:
    """Chunks that see each other's keys, in ascending order, and the kind of condition vector they all take."""

    chunks: tuple[ChunkInput, ...]
    conditional: bool


class Cache(Protocol):
    """Keys and values of finished chunks; `offload.kv_cache.KVCache` is one."""

    def store(self, layer: int, chunk: int, kv: torch.Tensor) -> None:
        """Keeps a chunk's keys and values, (2, groups, tokens, head_size)."""
        ...

    def stream(self, chunks: Sequence[int]) -> Generator[Mapping[int, torch.Tensor], None, None]:
        """Yields chunk -> (2, groups, tokens, head_size) on the device, layer by layer."""
        ...

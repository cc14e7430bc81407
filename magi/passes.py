"""What a forward call of the transformer is asked for: passes of chunks."""

from dataclasses import dataclass

import torch


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

"""What a run is made of: its saveable state, its noise, and what it reports."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Chunk:
    """A finished chunk: index from the first generated one, latents (1, 16, t, h, w) float32 without given frames."""

    index: int
    latents: torch.Tensor


@dataclass(frozen=True)
class ProgressEvent:
    """What happened in a forward iteration, for progress bars and previews (latents + (1 - t) * velocity).

    Attributes:
        iteration: iterations done, this one included.
        total: iterations of the run.
        first_chunk: index of the first active chunk, from the first generated one.
        timesteps: of each active chunk, before the step.
        latents: (1, 16, n * W, h, w), the n active chunks before the step.
        velocity: like latents, guided.
    """

    iteration: int
    total: int
    first_chunk: int
    timesteps: tuple[float, ...]
    latents: torch.Tensor
    velocity: torch.Tensor


Progress = Callable[[ProgressEvent], None]


@dataclass
class SamplerState:
    """Everything a run needs beside its settings to go on.

    Attributes:
        iteration: forward iterations done.
        window: active chunks' latents by chunk, (1, 16, W, h, w) float32.
        clean: the last finished (or given) chunks as the model is to see them, by chunk.
    """

    iteration: int = 0
    window: dict[int, torch.Tensor] = field(default_factory=dict)
    clean: dict[int, torch.Tensor] = field(default_factory=dict)

    def copy(self) -> "SamplerState":
        """An independent state; tensors are replaced, never written to, and may be shared."""
        return SamplerState(self.iteration, dict(self.window), dict(self.clean))

    @property
    def nbytes(self) -> int:
        """Bytes of all latents held."""
        return sum(x.numel() * x.element_size() for x in (*self.window.values(), *self.clean.values()))


class Noise:
    """Initial latents, chunk by chunk: given whole, or drawn from (seed, chunk) so that a video's start does not depend on its length."""

    def __init__(self, shape: tuple[int, ...], seed: int, given: torch.Tensor | None = None) -> None:
        """`shape` is a chunk's, (1, 16, W, h, w); `given` all chunks' side by side."""
        self.shape = shape
        self._seed = seed
        self._given = given

    def chunk(self, index: int) -> torch.Tensor:
        """Noise of one chunk, float32 on the CPU."""
        width = self.shape[2]
        if self._given is not None:
            return self._given[:, :, index * width : (index + 1) * width].float().clone()
        digest = hashlib.sha256(f"{self._seed}/{index}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randn(self.shape, generator=generator)

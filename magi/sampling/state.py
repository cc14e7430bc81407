"""What a run is made of: its saveable state, its noise, and what it reports."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from ..errors import MagiError
from .schedule import Schedule


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
        iteration: forward iterations done; from `done` on if the window was made smaller.
        window: active chunks' latents by chunk, (1, 16, W, h, w) float32.
        clean: the last finished (or given) chunks as the model is to see them, by chunk.
        window_size: chunks denoised at a time, if memory asked for fewer than the settings; else None.
        done: chunks that were there when it did, given ones included.
    """

    iteration: int = 0
    window: dict[int, torch.Tensor] = field(default_factory=dict)
    clean: dict[int, torch.Tensor] = field(default_factory=dict)
    window_size: int | None = None
    done: int = 0

    def copy(self) -> "SamplerState":
        """An independent state; tensors are replaced, never written to, and may be shared."""
        return replace(self, window=dict(self.window), clean=dict(self.clean))

    def schedule(self, of_settings: Schedule) -> Schedule:
        """The schedule it stands in, of the one that the settings ask for."""
        return of_settings if self.window_size is None else of_settings.narrowed(self.window_size, self.done)

    def to(self, device: torch.device) -> "SamplerState":
        """An independent state with its latents on a device, float32."""
        window, clean = (
            {c: x.to(device, torch.float32) for c, x in held.items()} for held in (self.window, self.clean)
        )
        return replace(self, window=window, clean=clean)

    @property
    def nbytes(self) -> int:
        """Bytes of all latents held."""
        return sum(x.numel() * x.element_size() for x in (*self.window.values(), *self.clean.values()))


def check_state(state: SamplerState, schedule: Schedule, shape: tuple[int, ...]) -> None:
    """Refuses a state that no run of this schedule (that of the settings), with chunks of this shape, (1, 16, W, h, w), can have been in.

    Raises:
        MagiError: it names what does not fit.
    """
    remedy = "Give a state of a run with these very settings, or none to begin anew."
    if state.window_size is not None and not (
        0 < state.window_size < schedule.window
        and schedule.num_steps % state.window_size == 0
        and schedule.prefix_chunks <= state.done < schedule.chunks
    ):
        raise MagiError(f"A window of {state.window_size} from chunk {state.done} on is none of this run's. {remedy}")
    schedule = state.schedule(schedule)
    if not 0 <= state.iteration <= len(schedule):
        raise MagiError(
            f"The state stands after {state.iteration} iterations, but the run has {len(schedule)}. {remedy}"
        )
    for name, held, wanted in zip(
        ("in the window", "clean"), (state.window, state.clean), _chunks_at(schedule, state.iteration), strict=True
    ):
        if sorted(held) != wanted:
            raise MagiError(
                f"After {state.iteration} iterations the chunks {name} are {wanted}, but the state has {sorted(held)}. {remedy}"
            )
        for chunk, latents in held.items():
            if tuple(latents.shape) != shape:
                raise MagiError(
                    f"The latents of chunk {chunk} in the state have the shape {tuple(latents.shape)}, the run's {shape}. {remedy}"
                )


def _chunks_at(schedule: Schedule, iteration: int) -> tuple[list[int], list[int]]:
    """Which chunks are in the window and which clean ones are kept after so many iterations."""
    given, stages = schedule.prefix_chunks, iteration // schedule.steps_per_stage
    finished = given + max(0, stages - schedule.window + 1)  # the first chunk that is not
    entered = min(schedule.chunks, given + -(-iteration // schedule.steps_per_stage))
    return list(range(finished, entered)), list(range(max(0, finished - schedule.kept_chunks), finished))


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

"""The data of a run: its resumable state, its noise, and its progress events."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from ..errors import MagiError
from .schedule import Schedule


@dataclass(frozen=True)
class Chunk:
    """A finished chunk: index from the first generated one, latents (1, 16, t, h, w) float32 without prefix frames."""

    index: int
    latents: torch.Tensor


@dataclass(frozen=True)
class ProgressEvent:
    """The result of a forward iteration, for progress bars and previews (latents + (1 - t) * velocity).

    Attributes:
        iteration: iterations done, this one included.
        total: iterations of the run.
        first_chunk: index of the first active chunk, from the first generated one.
        timesteps: time of each active chunk before the step, 0 (noise) .. 1 (clean).
        latents: (1, 16, n * W, h, w) float32, the n active chunks before the step.
        velocity: guided velocity, with the shape of `latents`.
    """

    iteration: int
    total: int
    first_chunk: int
    timesteps: tuple[float, ...]
    latents: torch.Tensor
    velocity: torch.Tensor


OnIteration = Callable[[ProgressEvent], None]


@dataclass
class SamplerState:
    """Everything a run needs beside its settings to resume.

    Attributes:
        iteration: forward iterations done; counted from chunk `done` on if the window was made smaller.
        window: latents per active chunk, (1, 16, W, h, w) float32.
        clean: latents per last finished or prefix chunk, prefix frames included, (1, 16, W, h, w) float32.
        window_size: chunks denoised at a time if a memory shortage made the window smaller; else None.
        done: chunks finished at that moment, prefix included.
    """

    iteration: int = 0
    window: dict[int, torch.Tensor] = field(default_factory=dict)
    clean: dict[int, torch.Tensor] = field(default_factory=dict)
    window_size: int | None = None
    done: int = 0

    def copy(self) -> "SamplerState":
        """Returns an independent state; it shares the tensors, which are replaced and never written to."""
        return replace(self, window=dict(self.window), clean=dict(self.clean))

    def schedule(self, full: Schedule) -> Schedule:
        """Returns the schedule that `iteration` counts in, given the full one of the settings."""
        return full if self.window_size is None else full.with_window(self.window_size, self.done)

    def to(self, device: torch.device) -> "SamplerState":
        """Returns an independent state with its latents on a device, float32."""
        window, clean = (
            {c: x.to(device, torch.float32) for c, x in held.items()} for held in (self.window, self.clean)
        )
        return replace(self, window=window, clean=clean)

    @property
    def nbytes(self) -> int:
        """Returns the bytes of all latents of the state."""
        return sum(x.numel() * x.element_size() for x in (*self.window.values(), *self.clean.values()))


def check_state(state: SamplerState, schedule: Schedule, shape: tuple[int, ...]) -> None:
    """Checks that a run of this full schedule, with chunks of shape (1, 16, W, h, w), can have been in a state.

    Raises:
        MagiError: it cannot; the message names the mismatch.
    """
    remedy = "Give a state of a run with exactly these settings, or none to start over."
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
    """Returns the chunks in the window and the clean ones that are kept after `iteration` iterations."""
    prefix, stages = schedule.prefix_chunks, iteration // schedule.steps_per_stage
    finished = prefix + max(0, stages - schedule.window + 1)  # the first unfinished chunk
    entered = min(schedule.chunks, prefix + -(-iteration // schedule.steps_per_stage))
    return list(range(finished, entered)), list(range(max(0, finished - schedule.kept_chunks), finished))


class Noise:
    """Initial latents per chunk: supplied, or drawn from (seed, chunk), whatever the length of the video."""

    def __init__(self, shape: tuple[int, ...], seed: int, latents: torch.Tensor | None = None) -> None:
        """Takes the shape of a chunk, (1, 16, W, h, w), and optionally all chunks' latents, (1, 16, K * W, h, w)."""
        self.shape = shape
        self._seed = seed
        self._latents = latents

    def chunk(self, index: int) -> torch.Tensor:
        """Returns the noise of one chunk, (1, 16, W, h, w) float32; drawn noise is on the CPU."""
        width = self.shape[2]
        if self._latents is not None:
            return self._latents[:, :, index * width : (index + 1) * width].float().clone()  # (1, 16, W, h, w)
        digest = hashlib.sha256(f"{self._seed}/{index}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randn(self.shape, generator=generator)

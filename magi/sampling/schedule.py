"""The schedule: when each chunk is denoised, at which times, and what it sees. Pure functions on ints and floats.

A window slides over a video of `chunks` chunks, the first `prefix_chunks` of which are the prefix. Every stage takes
each chunk in the window through one of `window` segments of the time grid; then the oldest chunk leaves clean and a new
one enters as noise (arXiv 2505.13211, section 2.3).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch

from ..config import RuntimeConfig
from ..errors import MagiError

_UNLIMITED_CLEAN_RANGE = 8  # chunks that a prefix chunk sees where no range is set
_MOST_STEPS = 1000  # four times what any model was published with
SHORTCUT_STEPS = 12  # with this many steps, distilled models use uneven ones
# Mode -> (entries of the quarter grid that start a step, step lengths as multiples of the shortest)
_SHORTCUTS = {"8,16,16": ((0, 2, 3), (2, 1, 1)), "16,16,8": ((0, 1, 2), (1, 1, 2))}


def time_grid(num_steps: int, shortcut_mode: str = "8,16,16") -> torch.Tensor:
    """Returns the times, 0 (noise) .. 1 (clean), that a chunk steps through: (num_steps + 1,) float32."""
    if num_steps == SHORTCUT_STEPS:
        quarter = torch.linspace(0, 1, 5) / 4  # (5,)
        starts = quarter[list(_SHORTCUTS[shortcut_mode][0])]  # (3,)
        u = torch.cat([starts + offset for offset in (0, 0.25, 0.5, 0.75, 1)])[: num_steps + 1]
    else:
        u = torch.linspace(0, 1, num_steps + 1)
    squared = u**2
    shift = 1 / 3
    return shift * squared / (1 + (shift - 1) * squared)


def step_size_signal(num_steps: int, step: int, shortcut_mode: str = "8,16,16") -> float:
    """Returns the step size that distilled models embed beside the time; it grows as steps get shorter.

    Args:
        num_steps: steps per chunk.
        step: index within the stage.
        shortcut_mode: pattern of the 12-step schedule.
    """
    if num_steps == SHORTCUT_STEPS:
        return 8 / _SHORTCUTS[shortcut_mode][1][step % 3]
    return num_steps / 2


@dataclass(frozen=True)
class Iteration:
    """One forward iteration: the active chunks and the position of each on the time grid."""

    index: int
    step: int  # within the stage
    chunks: range  # active, oldest first
    grid: tuple[int, ...]  # per active chunk: steps done; it steps from time_grid[g] to time_grid[g + 1]
    refresh: int | None  # the chunk that has just become clean, run once more for its K/V
    finishes: int | None  # the chunk that is clean after this iteration


@dataclass(frozen=True)
class Schedule:
    """All iterations of a run.

    Attributes:
        chunks: number of chunks, prefix included.
        prefix_chunks: whole chunks of the prefix.
        num_steps: steps per chunk.
        window: chunks denoised at a time.
        kv_ranges: chunks seen (the chunk itself included) per equal part of the steps; empty: all.
        clean_kv_range: chunks that a clean chunk sees, itself included.

    Raises:
        MagiError: the steps do not divide evenly, see `check_steps`.
    """

    chunks: int
    prefix_chunks: int
    num_steps: int
    window: int
    kv_ranges: tuple[int, ...] = (5, 4, 3, 2)
    clean_kv_range: int = 1

    def __post_init__(self) -> None:
        check_steps(self.num_steps, self.window, self.kv_ranges)

    @classmethod
    def of(cls, runtime: RuntimeConfig, chunks: int, prefix_chunks: int) -> "Schedule":
        """Builds the schedule of `runtime` for a video of `chunks` chunks."""
        return cls(
            chunks,
            prefix_chunks,
            runtime.num_steps,
            runtime.window_size,
            runtime.noise2clean_kvrange,
            _clean_kv_range(runtime),
        )

    @classmethod
    def of_run(cls, runtime: RuntimeConfig, prefix_frames: int = 0) -> "Schedule":
        """Returns the schedule of a run of the runtime's length after so many latent frames of a prefix."""
        chunks = chunks_in(runtime, runtime.num_frames, prefix_frames)
        return cls.of(runtime, chunks, prefix_frames // runtime.chunk_width)

    @property
    def steps_per_stage(self) -> int:
        """Returns the number of forward iterations per stage."""
        return self.num_steps // self.window

    def __len__(self) -> int:
        return self.steps_per_stage * (self.chunks + self.window - 1 - self.prefix_chunks)

    def __getitem__(self, index: int) -> Iteration:
        if not 0 <= index < len(self):
            raise IndexError(index)
        stage, step = divmod(index, self.steps_per_stage)
        stage += self.prefix_chunks
        chunks = range(max(self.prefix_chunks, stage - self.window + 1), min(self.chunks, stage + 1))
        # Chunk c entered in stage c, so it is now in segment stage - c: the oldest is in the highest.
        grid = tuple((stage - c) * self.steps_per_stage + step for c in chunks)
        return Iteration(
            index,
            step,
            chunks,
            grid,
            refresh=chunks[0] - 1 if step == 0 and chunks[0] > self.prefix_chunks else None,
            finishes=chunks[0] if grid[0] == self.num_steps - 1 else None,
        )

    def __iter__(self) -> Iterator[Iteration]:
        return (self[i] for i in range(len(self)))

    def first_kv_chunk(self, chunk: int, steps_done: int) -> int:
        """Returns the first chunk whose K/V `chunk` sees in its step `steps_done` (0-based)."""
        if not self.kv_ranges:
            return 0
        part = steps_done // (self.num_steps // len(self.kv_ranges))
        return max(0, chunk + 1 - self.kv_ranges[part])

    def first_clean_kv_chunk(self, chunk: int) -> int:
        """Returns the first chunk whose K/V a clean `chunk` sees.

        Without `kv_ranges`, generated chunks see all earlier ones, but prefix chunks only `clean_kv_range`.
        """
        if not self.kv_ranges and chunk >= self.prefix_chunks:
            return 0
        return max(0, chunk + 1 - self.clean_kv_range)

    @property
    def cached_chunks(self) -> int:
        """Returns the most finished chunks whose K/V any iteration needs: the size of the cache ring.

        It is the same for all videos longer than the window, unless chunks see everything.
        """
        if not self.kv_ranges:
            return self.chunks
        # The pattern repeats once the window slides, so the first stages contain the maximum.
        reach = self.clean_kv_range - 1
        for it in islice(self, self.steps_per_stage * 3 * (self.window + max(self.kv_ranges))):
            reach = max(
                reach, *(it.chunks[0] - self.first_kv_chunk(c, g) for c, g in zip(it.chunks, it.grid, strict=True))
            )
        return min(reach, self.chunks)

    @property
    def kept_chunks(self) -> int:
        """Returns how many finished chunks a run keeps: enough to refill the cache, even for a smaller window."""
        return max(1, self.replayed_chunks, *(n - 1 for n in self.kv_ranges))

    def with_window(self, window: int, done: int) -> "Schedule":
        """Returns the schedule of the chunks after the first `done` ones, prefix included, with a smaller window."""
        return replace(self, window=window, prefix_chunks=done)

    @property
    def replayed_chunks(self) -> int:
        """Returns how many finished chunks the model must run again to refill the cache.

        If clean chunks see only themselves, these are the cached ones; otherwise each depends on all before it.
        """
        return self.cached_chunks if self.clean_kv_range == 1 else self.chunks


def chunks_in(runtime: RuntimeConfig, num_frames: int, prefix_frames: int = 0) -> int:
    """Returns the chunks of a prefix of latent frames and `num_frames` video frames after it, the last chunk made whole."""
    return -(-(num_frames // runtime.temporal_downsample_factor + prefix_frames) // runtime.chunk_width)


def _clean_kv_range(runtime: RuntimeConfig) -> int:
    if runtime.clean_chunk_kvrange != -1:
        return runtime.clean_chunk_kvrange
    return runtime.noise2clean_kvrange[-1] if runtime.noise2clean_kvrange else _UNLIMITED_CLEAN_RANGE


def smaller_windows(num_steps: int, window: int) -> list[int]:
    """Returns the windows below `window` that divide the steps, largest first."""
    return [n for n in reversed(range(1, window)) if num_steps % n == 0]


def check_steps(num_steps: int, window: int, kv_ranges: Sequence[int]) -> None:
    """Raises MagiError, with the nearest valid counts, unless the window and the K/V ranges divide the steps evenly."""
    if not 1 <= window <= _MOST_STEPS:
        raise MagiError(f"The window is {window} chunks; it must be from 1 to {_MOST_STEPS}.")
    if not 1 <= num_steps <= _MOST_STEPS:
        raise MagiError(f"The number of steps is {num_steps}; it must be from 1 to {_MOST_STEPS}.")
    parts = len(kv_ranges) or 1
    if num_steps % window or num_steps % parts:
        good = [n for n in range(1, num_steps + window * parts + 1) if not (n % window or n % parts)]
        below, above = max((n for n in good if n < num_steps), default=None), min(n for n in good if n > num_steps)
        nearest = f"{below} or {above}" if below else f"{above}"
        raise MagiError(
            f"{num_steps} steps cannot be split evenly over the window of {window} chunks and the {parts} K/V range stages. "
            f"Use {nearest} steps."
        )

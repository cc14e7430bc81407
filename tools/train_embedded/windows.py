"""Training windows as the sampler will have them: which chunks are there, at which time, and what each sees.

A `Window` describes what one pass of one forward iteration holds, clean chunks whose K/V would come from the cache included.
`window_at` makes the window of a given iteration, `WindowDrawer` draws iterations at random, `collate` makes a batch of
windows.

Shapes: B windows, n chunks of the longest one, W latent frames of a chunk.
"""

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import Literal, TypeVar

import torch

from magi.config import MagiConfig
from magi.sampling.guidance import guidance_weights, is_nearly_clean
from magi.sampling.schedule import Iteration, Schedule, step_size_signal, time_grid

from .components import USED

PassKind = Literal["text", "prev", "independent"]
T = TypeVar("T", bound="Tensors")


@dataclass(frozen=True)
class WindowChunk:
    """One chunk of a window.

    Attributes:
        chunk: index in the video that its latents and caption come from.
        position: index that sets its rotary positions.
        time: 0 (noise) .. 1 (clean).
        clean: whether it is there for its K/V only, with the clean latents; nothing is learned from its velocity.
        captioned: whether it has its own caption; the null caption otherwise.
        conditional: which of the two learned condition vectors it gets.
        first_seen: index within the window of the first chunk that it sees; the last one is itself.
        prefix_frames: latent frames at its start that the prefix gives: clean, and nothing is learned from them.
        used: whether guidance gives its velocity a weight.
        step_size: second time signal of distilled models.
    """

    chunk: int
    position: int
    time: float
    clean: bool
    captioned: bool
    conditional: bool
    first_seen: int
    prefix_frames: int = 0
    used: bool = False
    step_size: float | None = None


Window = tuple[WindowChunk, ...]


def window_at(
    it: Iteration, schedule: Schedule, config: MagiConfig, kind: PassKind, prefix_frames: int = 0, shift: float = 0.0
) -> Window:
    """Returns the window of the pass "text" or "prev" of an iteration: all its active chunks and the clean ones they see.

    Args:
        it: iteration of `schedule`.
        schedule: of a video with as many chunks.
        config: settings; for a distilled model its only pass over all chunks is "text".
        kind: of the pass; for "independent" there is `window_alone`.
        prefix_frames: latent frames of the prefix; those of whole chunks are in `schedule` too.
        shift: how far all times are moved towards those of the next step, 0 .. 1.
    """
    distilled, text = config.engine.distill, kind == "text"
    active = _active_chunks(it, schedule, config, kind, prefix_frames, shift)
    firsts = {chunk: schedule.first_kv_chunk(chunk, g) for chunk, g in zip(it.chunks, it.grid, strict=True)}
    # Clean chunks see clean ones: those before the first one found are found on the way down.
    for chunk in reversed(range(it.chunks[0])):
        if any(first <= chunk for first in firsts.values()):
            firsts[chunk] = schedule.first_clean_kv_chunk(chunk)
    begin = min(firsts)
    signal = step_size_signal(schedule.num_steps, 0, config.engine.shortcut_mode) if distilled else None
    clean = [
        WindowChunk(
            chunk=chunk,
            position=chunk,
            time=config.runtime.clean_t,
            clean=True,
            captioned=False,
            # The cache holds K/V of the unconditional pass, but a chunk that has just become clean runs in both.
            conditional=distilled or (text and chunk == it.refresh),
            first_seen=firsts[chunk] - begin,
            step_size=signal,
        )
        for chunk in range(begin, it.chunks[0])
    ]
    return (*clean, *(dataclasses.replace(c, first_seen=firsts[c.chunk] - begin) for c in active))


def window_alone(
    it: Iteration, schedule: Schedule, config: MagiConfig, prefix_frames: int = 0, shift: float = 0.0
) -> Window:
    """Returns the active chunks that run alone in an iteration, one beside the other; none see each other.

    For base models these are the chunks with an independent pass, at position 0; for distilled ones the oldest one, once
    it is nearly clean. There may be none. The arguments are those of `window_at`.
    """
    chunks = [c for c in _active_chunks(it, schedule, config, "independent", prefix_frames, shift) if c.used]
    positions = [c.chunk if config.engine.distill else 0 for c in chunks]
    return tuple(
        dataclasses.replace(c, position=p, first_seen=i) for i, (c, p) in enumerate(zip(chunks, positions, strict=True))
    )


def _active_chunks(
    it: Iteration, schedule: Schedule, config: MagiConfig, kind: PassKind, prefix_frames: int, shift: float
) -> list[WindowChunk]:
    """Describes the active chunks of an iteration but for what they see."""
    runtime, engine = config.runtime, config.engine
    grid = [float(t) for t in time_grid(schedule.num_steps, engine.shortcut_mode)]
    conditional = engine.distill or kind == "text"
    chunks = []
    for chunk, g in zip(it.chunks, it.grid, strict=True):
        if not engine.distill:
            used = getattr(guidance_weights(grid[g], runtime), kind) != 0
        elif kind == "independent":
            used = chunk == it.chunks[0] and is_nearly_clean(grid[g], engine.distill_nearly_clean_chunk_threshold)
        else:
            used = True
        step = step_size_signal(schedule.num_steps, it.step, engine.shortcut_mode) if engine.distill else None
        chunks.append(
            WindowChunk(
                chunk=chunk,
                position=chunk,
                time=grid[g] + shift * (grid[g + 1] - grid[g]),
                clean=False,
                captioned=conditional,
                conditional=conditional,
                first_seen=0,
                prefix_frames=min(runtime.chunk_width, max(0, prefix_frames - chunk * runtime.chunk_width)),
                used=used,
                step_size=step,
            )
        )
    return chunks


@dataclass(frozen=True)
class WindowDrawer:
    """Draws windows for videos of any length.

    Attributes:
        config: settings of the runs to train for: steps, K/V ranges, guidance scales, base or distilled.
        windows: window sizes to draw from; they must divide the steps.
        passes: relative frequency of each pass. Where an iteration has no chunk that runs alone, "text" is taken instead.
        no_prefix: how often a video has no prefix; otherwise it has any number of latent frames that leaves something to make.
        whole_prefix: how often a prefix ends with a chunk.
        jitter: whether times lie anywhere between a step's two ends, instead of at its start.
        late: how much more often a long step is drawn than a short one: its length to this power. Two thirds of all steps
            are at times below 0.2, where little can be known of the video yet, so little is learned from most of them.
    """

    config: MagiConfig
    windows: Sequence[int] = (4,)
    passes: Mapping[PassKind, float] = field(default_factory=lambda: {"text": 0.7, "prev": 0.15, "independent": 0.15})
    no_prefix: float = 0.6
    whole_prefix: float = 0.3
    jitter: bool = True
    late: float = 0.5

    def draw(self, chunks: int, rng: random.Random, picture: bool = False) -> Window:
        """Draws a window of a video with so many chunks; one that begins with a picture has this as its prefix."""
        prefix_frames = 1 if picture else self._prefix_frames(chunks, rng)
        runtime = self.config.with_runtime(window_size=rng.choice(self.windows)).runtime
        schedule = Schedule.of(runtime, chunks, prefix_frames // runtime.chunk_width)
        it = schedule[rng.choices(range(len(schedule)), cum_weights=_weights(schedule, self.late))[0]]
        shift = rng.random() if self.jitter else 0.0
        kind = rng.choices(list(self.passes), list(self.passes.values()))[0]
        alone = window_alone(it, schedule, self.config, prefix_frames, shift) if kind == "independent" else ()
        if alone:
            return alone
        kind = "text" if kind == "independent" else kind
        return window_at(it, schedule, self.config, kind, prefix_frames, shift)

    def _prefix_frames(self, chunks: int, rng: random.Random) -> int:
        if rng.random() < self.no_prefix:
            return 0
        width = self.config.runtime.chunk_width
        if chunks > 1 and rng.random() < self.whole_prefix:
            return width * rng.randrange(1, chunks)
        return rng.randrange(1, chunks * width)


@cache
def _weights(schedule: Schedule, late: float) -> list[float]:
    """Returns the cumulative weights with which a schedule's iterations are drawn."""
    grid = time_grid(schedule.num_steps)
    lengths = ((grid[1:] - grid[:-1]) ** late).tolist()
    return list(accumulate(sum(lengths[g] for g in it.grid) / len(it.grid) for it in schedule))


class Tensors:
    """A dataclass of tensors and of others of its kind, which moves as one."""

    def each(self: T, change: Callable[[torch.Tensor], torch.Tensor]) -> T:
        """Returns it with every tensor changed; None stays."""

        def changed(value: "torch.Tensor | Tensors | None") -> "torch.Tensor | Tensors | None":
            return value.each(change) if isinstance(value, Tensors) else value if value is None else change(value)

        return dataclasses.replace(self, **{f.name: changed(getattr(self, f.name)) for f in dataclasses.fields(self)})

    def to(self: T, device: torch.device | str) -> T:
        """Returns it on a device."""
        return self.each(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self: T) -> T:
        """Returns it in page-locked memory; torch's loader asks for it by this name."""
        return self.each(torch.Tensor.pin_memory)


@dataclass(frozen=True)
class Batch(Tensors):
    """Windows side by side, padded to the longest; a padding chunk sees itself and nothing is learned from it.

    Attributes:
        chunks: index in the video of each chunk, (B, n).
        times: (B, n) float32.
        positions: (B, n).
        conditional: (B, n) bool.
        captioned: whether a chunk has its own caption, (B, n) bool; it needs a length of 0 otherwise.
        sees: whether chunk i sees chunk j, (B, n, n) bool.
        clean_frames: frames whose latents are the clean ones, (B, n, W) bool.
        learned: frames whose velocity is learned, (B, n, W) bool.
        used: whether guidance gives a chunk's velocity a weight, (B, n) bool.
        step_sizes: (B, n) float32; None for base models.
    """

    chunks: torch.Tensor
    times: torch.Tensor
    positions: torch.Tensor
    conditional: torch.Tensor
    captioned: torch.Tensor
    sees: torch.Tensor
    clean_frames: torch.Tensor
    learned: torch.Tensor
    used: torch.Tensor
    step_sizes: torch.Tensor | None

    def of_videos(self, values: torch.Tensor) -> torch.Tensor:
        """Takes from values per chunk of B videos, (B, K, ...), those of the windows' chunks: (B, n, ...)."""
        return values[torch.arange(len(values), device=values.device)[:, None], self.chunks]

    def lengths(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns caption lengths for the forward from those of B videos, (B, K): (B, n), 0 for the null caption."""
        return self.of_videos(tokens) * self.captioned

    def latents(self, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Mixes clean latents and noise, (B, n, 16, W, h, w) each, at the times of the chunks and puts in the prefix."""
        t = self.times[..., None, None, None, None]
        return torch.where(self.clean_frames[:, :, None, :, None, None], clean, t * clean + (1 - t) * noise)

    def loss(self, velocity: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Returns the mean squared error of velocities, (B, n, 16, W, h, w), over the learned frames and channels in use.

        From time 0.5 on an error counts less and less: what it does to the latents is small there, as little is left to go.
        """
        error = (velocity.float() - (clean - noise))[:, :, :USED].square().mean(dim=(2, 4, 5))  # (B, n, W)
        weight = (2 - 2 * self.times).clamp(max=1)[..., None]  # (B, n, 1)
        return (weight * error * self.learned).sum() / self.learned.sum()

    def inputs(self) -> dict[str, torch.Tensor | None]:
        """Returns the arguments of `TrainingTransformer.forward` that do not depend on the videos."""
        names = ("times", "conditional", "positions", "sees", "step_sizes")
        return {name: getattr(self, name) for name in names}


def equal_lengths(windows: Sequence[Window]) -> list[list[int]]:
    """Returns the indices of windows by their lengths, so that a batch of each group has no padding."""
    groups: dict[int, list[int]] = {}
    for i, window in enumerate(windows):
        groups.setdefault(len(window), []).append(i)
    return list(groups.values())


def collate(windows: Sequence[Window], chunk_width: int) -> Batch:
    """Makes a batch of windows; windows of equal length waste nothing."""
    n = max(map(len, windows))

    def per_chunk(name: str, dtype: torch.dtype) -> torch.Tensor:
        padded = [[getattr(c, name) for c in window] + [0] * (n - len(window)) for window in windows]
        return torch.tensor(padded, dtype=dtype)  # (B, n)

    # A padding chunk sees from itself to itself, all others from the first chunk to themselves.
    first = torch.tensor([[c.first_seen for c in w] + list(range(len(w), n)) for w in windows])  # (B, n)
    seen, seeing = torch.arange(n), torch.arange(n)[:, None]
    frames = torch.arange(chunk_width)
    clean = per_chunk("clean", torch.bool)[..., None] | (frames < per_chunk("prefix_frames", torch.long)[..., None])
    real = torch.tensor([[i < len(window) for i in range(n)] for window in windows])
    distilled = windows[0][0].step_size is not None
    return Batch(
        chunks=per_chunk("chunk", torch.long),
        times=per_chunk("time", torch.float32),
        positions=per_chunk("position", torch.long),
        conditional=per_chunk("conditional", torch.bool),
        captioned=per_chunk("captioned", torch.bool),
        sees=(first[..., None] <= seen) & (seen <= seeing),
        clean_frames=clean,
        learned=real[..., None] & ~clean,
        used=per_chunk("used", torch.bool),
        step_sizes=per_chunk("step_size", torch.float32) if distilled else None,
    )

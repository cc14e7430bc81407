"""Batches as tensors, made beside the training: workers draw videos and windows, the training takes what is ready."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .components import CHUNK_FRAMES, Components
from .text import LONGEST, PREFIX
from .videos import Pool, Video, padded, prefix_rows, windows
from .windows import Batch, Tensors, Window, WindowDrawer, collate

T = TypeVar("T", bound=Tensors)
_SEEDS = 10**8  # of the videos of one worker


@dataclass(frozen=True)
class Examples(Tensors):
    """A batch of B windows of n chunks each, and what is known of them.

    Attributes:
        windows: which chunks there are, at which time, and what each sees.
        latents: of the videos, clean, (B, n, 16, W, h, w) float16.
        tokens: of the captions, (B * n, LONGEST).
        rows: of the special tokens before them, (B * n, PREFIX), padded at the end with -1.
        numbers: what the scenes are in numbers (`hints.py`), (B * n, W, 7).
        labels: and in names, (B * n, 7).
    """

    windows: Batch
    latents: torch.Tensor
    tokens: torch.Tensor
    rows: torch.Tensor
    numbers: torch.Tensor
    labels: torch.Tensor


def examples(clips: Sequence[Video], chosen: Sequence[Window], rng: random.Random) -> Examples:
    """Makes a batch of windows of equal length and the videos they are of."""
    pairs = [(v, [c.chunk for c in w]) for v, w in zip(clips, chosen, strict=True)]
    return Examples(
        windows=collate(chosen, CHUNK_FRAMES),
        latents=torch.stack([v.latents[chunks] for v, chunks in pairs]),
        tokens=padded([v.tokens[i] for v, chunks in pairs for i in chunks], LONGEST),
        rows=padded([row for w in chosen for row in prefix_rows(w, rng)], PREFIX, -1),
        numbers=torch.cat([v.numbers[chunks] for v, chunks in pairs]),
        labels=torch.cat([v.labels[chunks] for v, chunks in pairs]),
    )


class Stream(IterableDataset[T]):
    """Batches without end. Every worker has videos of its own."""

    def __init__(
        self,
        components: Components,
        sources: Sequence[tuple[WindowDrawer, Callable[[Sequence[Video], Sequence[Window], random.Random], T]]],
        chunks: Mapping[int, float],
        size: int,
        uses: int,
        part: tuple[int, int],
        first: int,
    ) -> None:
        """Takes what batches are made of.

        Args:
            components: of the world.
            sources: what draws windows, and what makes a batch of them; every batch is of one pair.
            chunks: lengths of the videos, and how often each is drawn.
            size: chunks of a batch, about.
            uses: how many windows are drawn for each new video.
            part: the number of this process, and of how many.
            first: how far from the beginning of its seeds each worker begins.
        """
        self.components, self.sources, self.chunks, self.size = components, sources, chunks, size
        self.uses, self.part, self.first = uses, part, first

    def __iter__(self) -> Iterator[T]:
        """Yields batches."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        number = self.part[0] * workers + worker
        seed = number * _SEEDS + self.first
        rng = random.Random(seed)  # noqa: S311
        pool = Pool(self.components, max(self.chunks), seed, self.uses)
        drawn = [(windows(pool, drawer, self.chunks, self.size, rng), made) for drawer, made in self.sources]
        while True:
            chosen, made = rng.choice(drawn)
            yield made(*next(chosen), rng)


def loader(stream: IterableDataset[T], workers: int, device: str) -> Iterator[T]:
    """Yields the batches of a stream on a device; with 0 workers they are made in between."""
    cuda = torch.device(device).type == "cuda"
    for batch in DataLoader(stream, batch_size=None, num_workers=workers, pin_memory=cuda):
        yield batch.to(device)

"""Training videos as latents, kept in a pool and drawn many times with other noise, times and windows."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from magi.config import LATENT_CHANNELS, SPATIAL_DOWNSAMPLE
from magi.sampling.special_tokens import STYLES, SpecialTokens

from . import world
from .captions import captions
from .components import CHUNK_FRAMES, PATCH, Components
from .hints import LABELS, NUMBERS, labels, numbers
from .text import PAD, SPECIAL_ROWS, UNKNOWN, tokenize
from .windows import Window, WindowDrawer

POOL = 4096  # videos that a pool has room for
FIRST = 512  # videos that it begins with
_SIDE = world.SIZE // SPATIAL_DOWNSAMPLE
_PICTURES = 0.15  # share of the videos that begin with a picture
_LOST_WORDS = 0.02  # share of the words that are replaced by the unknown one
_NO_DURATION, _HQ, _OTHER_STYLE = 0.3, 0.7, 0.1  # shares of the captions
# Its rows are their own numbers: so the tokens before a caption are found as inference does.
_ROWS = SpecialTokens(torch.zeros(1, 1), torch.zeros(1, 1), torch.arange(float(SPECIAL_ROWS))[:, None])


@dataclass(frozen=True)
class Video:
    """A training video.

    Attributes:
        latents: (chunks, 16, 6, 8, 8) float16.
        tokens: token ids of each chunk's caption.
        picture: whether its first latent frame is a picture: its four frames are the same.
        numbers: what the scene is in numbers (`hints.py`), (chunks, 6, 7).
        labels: and in names, (chunks, 7).
    """

    latents: torch.Tensor
    tokens: list[list[int]]
    picture: bool
    numbers: torch.Tensor
    labels: torch.Tensor


def make(components: Components, seed: int, chunks: int) -> Video:
    """Returns the training video of a seed."""
    rng = random.Random(seed)  # noqa: S311
    scene = world.draw(seed, chunks)
    frames = world.frames(scene)
    if picture := rng.random() < _PICTURES:
        frames[: PATCH[0] - 1] = frames[PATCH[0] - 1]  # the last of the four, from which the motion goes on
    latents = components.latents(frames).unflatten(1, (chunks, CHUNK_FRAMES)).transpose(0, 1)
    tokens = [
        [UNKNOWN if rng.random() < _LOST_WORDS else token for token in caption[:-1]] + caption[-1:]
        for caption in tokenize(captions(scene, seed))
    ]
    return Video(latents.to(torch.float16), tokens, picture, numbers(scene), labels(scene))


class Pool:
    """Videos that are drawn many times: it grows by one for every `uses` that are drawn, and then loses its oldest ones.

    All tensors lie in a few blocks of memory: thousands of small ones that stay would each keep the hole that the large temporary
    ones beside it leave, gigabytes in all.
    """

    def __init__(self, components: Components, chunks: int, first_seed: int, uses: int) -> None:
        """Makes the first videos, of as many chunks, of the seeds from `first_seed` on."""
        self.components, self.chunks, self.first_seed, self.uses = components, chunks, first_seed, uses
        self.made = self._drawn = 0
        self._latents = torch.empty(POOL, chunks, *latent_shape(), dtype=torch.float16)
        self._numbers = torch.empty(POOL, chunks, CHUNK_FRAMES, NUMBERS)
        self._labels = torch.empty(POOL, chunks, LABELS, dtype=torch.long)
        self._others: list[tuple[list[list[int]], bool]] = [([], False)] * POOL  # tokens, picture
        self.add(min(FIRST, POOL))

    def add(self, count: int) -> None:
        """Adds new videos, in place of the oldest ones where it is full."""
        for _ in range(count):
            place = self.made % POOL
            video = make(self.components, self.first_seed + self.made, self.chunks)
            self._latents[place], self._numbers[place], self._labels[place] = video.latents, video.numbers, video.labels
            self._others[place] = video.tokens, video.picture
            self.made += 1

    def draw(self, rng: random.Random, chunks: int) -> Video:
        """Returns the first chunks of one of the videos; what is added later does not change it."""
        place = rng.randrange(min(self.made, POOL))
        tokens, picture = self._others[place]
        blocks = self._latents, self._numbers, self._labels
        latents, numbers, labels = (block[place, :chunks].clone() for block in blocks)
        self._drawn += 1
        if self._drawn % self.uses == 0:
            self.add(1)
        return Video(latents, tokens[:chunks], picture, numbers, labels)


def windows(
    pool: Pool, drawer: WindowDrawer, chunks: Mapping[int, float], tokens: int, rng: random.Random
) -> Iterator[tuple[list[Video], list[Window]]]:
    """Yields batches of windows of equal length, so that nothing is padded.

    Args:
        pool: whose videos are cut to their first chunks.
        drawer: of windows.
        chunks: relative frequency of videos of each length.
        tokens: how many chunks a batch has, about.
        rng: random numbers.
    """
    waiting: dict[int, tuple[list[Video], list[Window]]] = {}
    lengths, weights = list(chunks), list(chunks.values())
    while True:
        length = rng.choices(lengths, weights)[0]
        video = pool.draw(rng, length)
        window = drawer.draw(length, rng, video.picture)
        batch = waiting.setdefault(len(window), ([], []))
        batch[0].append(video)
        batch[1].append(window)
        if len(batch[0]) * len(window) >= tokens:
            yield waiting.pop(len(window))


def prefix_rows(window: Window, rng: random.Random) -> list[list[int]]:
    """Returns the rows of the special tokens before each chunk's caption: any style, and any number of chunks to come.

    A video may go on beyond the window, and no style means anything in this world, so nothing is to be learned from them.
    """
    durations, later = rng.random() >= _NO_DURATION, rng.randrange(9)
    styles = [name for name in STYLES if rng.random() < (_HQ if name == "hq" else _OTHER_STYLE)]
    last = window[-1].chunk
    return [
        _ROWS.prefix(styles, last - c.chunk + later if durations else None).flatten().long().tolist() for c in window
    ]


def padded(rows: list[list[int]], length: int, value: int = PAD) -> torch.Tensor:
    """Returns lists of numbers side by side: (N, length)."""
    return torch.tensor([row + [value] * (length - len(row)) for row in rows], dtype=torch.long)


def latent_shape() -> tuple[int, int, int, int]:
    """Returns the shape of a chunk's latents."""
    return LATENT_CHANNELS, CHUNK_FRAMES, _SIDE, _SIDE

"""What training also asks: what a caption says, of the encoded captions; and of the hidden states where the object is and how it moves.

All tokens say it, those of captions and those after the fourth layer, through small heads that are not part of the model. A velocity
tells a model little of what there is to see, as most of it is noise, and hardly anything of what words mean; plain questions teach
both much earlier (after "Representation Alignment", arXiv 2410.06940, which asks for the features of another network instead).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from magi.config import SPATIAL_DOWNSAMPLE, TEMPORAL_DOWNSAMPLE

from . import world
from .components import CHUNK_FRAMES

LAYER = 3  # after which the tokens are asked
WEIGHT = 0.1  # of each of these losses beside that of velocities
_SCALE = 16.0  # pixels that count as one
_TURN = 120.0  # degrees per second, likewise
NUMBERS = 7  # place (2), radius, velocity (2), growth, turn
# How many shapes, colours, backgrounds and motions there are, which captions say, and sizes of an object as a second begins.
TOLD = (len(world.SHAPES), len(world.COLOURS), len(world.BACKGROUNDS), len(world.MOTIONS), len(world.RADII))
LABELS = len(TOLD) + 2  # and the place, as its column and row


def numbers(scene: world.Scene) -> torch.Tensor:
    """Returns the numbers of a scene for every latent frame: (chunks, 6, 7) float32, each about from -1 to 1 but for the place."""
    path = world.path(scene)
    frames = len(path.radius) // TEMPORAL_DOWNSAMPLE

    def mean(values: np.ndarray) -> np.ndarray:
        return values.reshape(frames, TEMPORAL_DOWNSAMPLE, -1).mean(1)

    per_chunk = np.array(
        [
            (
                *world.DIRECTIONS.get(motion, (0, 0)),
                world.RESIZING.get(motion, 0),
                scene.turn / _TURN if motion == "turns" else 0.0,
            )
            for motion in world.shown_or_asked(scene)
        ]
    )
    moving = per_chunk.repeat(frames // scene.chunks, axis=0)
    every = np.concatenate([mean(path.centre) / _SCALE, np.log(mean(path.radius) / 10), moving], axis=1)
    return torch.from_numpy(every).float().unflatten(0, (scene.chunks, -1))


def labels(scene: world.Scene) -> torch.Tensor:
    """Returns what there is as each second begins, as indices: (chunks, 7) int64."""
    path = world.path(scene)
    columns, rows = (_nearest(path.centre[:: world.CHUNK, axis], world.PLACES) for axis in (0, 1))
    radii = _nearest(path.radius[:: world.CHUNK], world.RADII)
    shape, background = world.SHAPES.index(scene.shape), list(world.BACKGROUNDS).index(scene.background)
    return torch.tensor(
        [
            (shape, list(world.COLOURS).index(colour), background, world.MOTIONS.index(motion), *where)
            for colour, motion, *where in zip(scene.colours, scene.motions, radii, columns, rows, strict=True)
        ]
    )


def _nearest(values: np.ndarray, known: tuple[float, ...]) -> list[int]:
    return [int(i) for i in np.abs(values[:, None] - np.array(known)).argmin(axis=1)]


class Hints(nn.Module):
    """The heads, and their losses."""

    def __init__(self, hidden_size: int, patch_size: int, text_size: int) -> None:
        super().__init__()
        self.side = SPATIAL_DOWNSAMPLE * patch_size  # pixels of a token
        self.columns = world.SIZE // self.side
        self._offsets = self.columns + len(world.PLACES) - 1  # how many places there are, seen from a token
        self.head = nn.Sequential(
            nn.LayerNorm(hidden_size),
            nn.Linear(hidden_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, NUMBERS + sum(TOLD) + 2 * self._offsets + CHUNK_FRAMES),
        )
        self.text_head = nn.Linear(text_size, sum(TOLD))

    def text_loss(self, embeds: torch.Tensor, asked: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns how wrong encoded captions are about what they say.

        Args:
            embeds: (M, L, text_size).
            asked: which of their tokens are asked, (M, L) bool.
            labels: of the scenes, (M, 7).
        """
        names = labels[:, None, : len(TOLD)].expand(-1, embeds.shape[1], -1)  # (M, L, choices)
        wrong = sum(_wrong_names(self.text_head(embeds).flatten(0, 1), names.flatten(0, 1), TOLD))  # (M * L,)
        return (wrong * asked.flatten()).sum() / asked.sum()

    def loss(
        self, hidden: torch.Tensor, numbers: torch.Tensor, labels: torch.Tensor, counted: torch.Tensor
    ) -> torch.Tensor:
        """Returns how wrong the tokens are.

        Args:
            hidden: (M, S, D), frames first, then rows and columns.
            numbers: of the scenes, (M, W, 7).
            labels: of the scenes, (M, 7).
            counted: which chunks count, (M,) bool.
        """
        count, frames = numbers.shape[:2]
        said = self.head(hidden).unflatten(1, (frames, -1))  # (M, W, tokens of a frame, 7 + values)
        cells = said.shape[2]
        index = torch.arange(cells, device=hidden.device)
        place = torch.stack([index % self.columns, index // self.columns], dim=-1)  # (tokens, 2) as x, y
        expected = numbers[:, :, None].expand(-1, -1, cells, -1).clone()
        expected[..., :2] -= (place + 0.5) * (self.side / _SCALE)  # seen from the token
        wrong = F.smooth_l1_loss(said[..., :NUMBERS], expected, reduction="none").mean(dim=(1, 2, 3))
        names = labels[:, None, None].repeat(1, frames, cells, 1)  # (M, W, tokens of a frame, 7)
        names[..., len(TOLD) :] += self.columns - 1 - place
        # Nothing but what they see tells tokens which of a chunk's frames they are of.
        frame = torch.arange(frames, device=hidden.device)[:, None, None].expand(count, -1, cells, 1)
        names = torch.cat([names, frame], dim=-1)
        sizes = (*TOLD, self._offsets, self._offsets, CHUNK_FRAMES)
        named = sum(_wrong_names(said[..., NUMBERS:].flatten(0, 2), names.flatten(0, 2), sizes))
        every = wrong + 0.1 * named.view(count, -1).mean(1)
        return (every * counted).sum() / counted.sum().clamp_min(1)


def _wrong_names(said: torch.Tensor, names: torch.Tensor, sizes: tuple[int, ...]) -> list[torch.Tensor]:
    """Returns the cross entropy of each of several choices: scores (N, sum of sizes) and indices (N, choices) -> (N,) each."""
    scores = said.split(sizes, dim=-1)
    return [F.cross_entropy(s, name, reduction="none") for s, name in zip(scores, names.unbind(-1), strict=True)]

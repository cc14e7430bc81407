"""What training asks of the hidden states besides velocities: where the object is, how large, which shape, and how it moves.

All tokens say it after the middle layer, through a small head that is not part of the model. A velocity tells a model little of
what there is to see, as most of it is noise; numbers of the scene tell it plainly, so it learns to look for objects much earlier
(after "Representation Alignment", arXiv 2410.06940, which asks for the features of another network instead).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from magi.config import SPATIAL_DOWNSAMPLE, TEMPORAL_DOWNSAMPLE

from . import world

LAYER = 2  # after which the tokens are asked
WEIGHT = 0.1  # of this loss beside that of velocities
_SCALE = 16.0  # pixels that count as one
NUMBERS = 7  # place (2), radius, velocity (2), growth, turn


def numbers(scene: world.Scene) -> torch.Tensor:
    """Returns the numbers of a scene for every latent frame: (chunks, 6, 7) float32, each about from -1 to 1 but for the place."""
    path = world.path(scene)
    frames = len(path.radius) // TEMPORAL_DOWNSAMPLE

    def mean(values: np.ndarray) -> np.ndarray:
        return values.reshape(frames, TEMPORAL_DOWNSAMPLE, -1).mean(1)

    per_chunk = np.array(
        [
            (
                *(way for way in world.DIRECTIONS.get(motion, (0, 0))),
                world.RESIZING.get(motion, 0),
                scene.turn / 120 if motion == "turns" else 0.0,
            )
            for motion in world.shown_or_asked(scene)
        ]
    )
    moving = per_chunk.repeat(frames // scene.chunks, axis=0)
    every = np.concatenate([mean(path.centre) / _SCALE, np.log(mean(path.radius) / 10), moving], axis=1)
    return torch.from_numpy(every).float().unflatten(0, (scene.chunks, -1))


class Hints(nn.Module):
    """The head, and its loss."""

    def __init__(self, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.side = SPATIAL_DOWNSAMPLE * patch_size  # pixels of a token
        self.head = nn.Sequential(
            nn.LayerNorm(hidden_size),
            nn.Linear(hidden_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, NUMBERS + len(world.SHAPES)),
        )

    def loss(
        self, hidden: torch.Tensor, numbers: torch.Tensor, shapes: torch.Tensor, counted: torch.Tensor
    ) -> torch.Tensor:
        """Returns how wrong the tokens are.

        Args:
            hidden: (M, S, D), frames first, then rows and columns.
            numbers: of the scenes, (M, W, 7).
            shapes: indices of `SHAPES`, (M,).
            counted: which chunks count, (M,) bool.
        """
        count, frames = numbers.shape[:2]
        said = self.head(hidden).unflatten(1, (frames, -1))  # (M, W, tokens of a frame, 7 + shapes)
        cells = said.shape[2]
        columns = world.SIZE // self.side
        index = torch.arange(cells, device=hidden.device)
        place = torch.stack([index % columns, index // columns], dim=-1).float() + 0.5  # (tokens, 2) as x, y
        expected = numbers[:, :, None].expand(-1, -1, cells, -1).clone()
        expected[..., :2] -= place * (self.side / _SCALE)  # seen from the token
        wrong = F.smooth_l1_loss(said[..., :NUMBERS], expected, reduction="none").mean(dim=(1, 2, 3))
        named = F.cross_entropy(
            said[..., NUMBERS:].flatten(0, 2), shapes.repeat_interleave(frames * cells), reduction="none"
        )
        every = wrong + 0.1 * named.view(count, -1).mean(1)
        return (every * counted).sum() / counted.sum().clamp_min(1)

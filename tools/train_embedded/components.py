"""The principal components of the world's patches of 4 x 8 x 8 pixels, which are its latents.

A patch has 768 values, and five components keep 96.4 % of their variance: its mean colour, and how its brightness rises to the
right and downwards. The encoder computes them, the transformer learns to make them, and the decoder to draw crisp frames from them
(`vae.py`). Their mean is 0 and their variance is 1 over all, but each keeps the root of its own spread: brightness, which tells
where the object is, stands out from the noise before the rest does.

The other of the 16 channels are empty. A token of the transformer is four patches, and its velocity is most of all the noise that
was mixed in, number by number: a small model that has to carry 64 of them through its layers has little room for anything else, and
details are what a decoder draws more easily (docs/embedded-model.md).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from magi.config import LATENT_CHANNELS, SPATIAL_DOWNSAMPLE, TEMPORAL_DOWNSAMPLE
from magi.system.whole_files import put_in_place

from . import world

PATCH = (TEMPORAL_DOWNSAMPLE, SPATIAL_DOWNSAMPLE, SPATIAL_DOWNSAMPLE)
CHUNK_FRAMES = world.CHUNK // PATCH[0]  # latent frames of a second
SCENES = 1500  # that they are computed from
USED = 5  # of the latent channels; the others are empty
DETAILS = 96  # components after these, which the decoder begins with


def pixels(frames: NDArray[np.uint8]) -> torch.Tensor:
    """Returns frames (T, H, W, 3) as numbers from -1 to 1, by patch: (T / 4, H / 8, W / 8, 3 * 4 * 8 * 8)."""
    t, h, w = (n // p for n, p in zip(frames.shape, PATCH, strict=False))
    video = torch.from_numpy(np.ascontiguousarray(frames)).view(t, PATCH[0], h, PATCH[1], w, PATCH[2], 3)
    patches = video.permute(0, 2, 4, 6, 1, 3, 5).flatten(3)  # (t, h, w, channel and place)
    return patches.float().div_(127.5).sub_(1)


@dataclass(frozen=True)
class Components:
    """The components of patches.

    Attributes:
        mean: of a patch, (768,).
        analysis: a patch less its mean times this is its latents, (768, 16), zero for the empty channels.
        synthesis: latents times this, and the mean, are the nearest patch that there is to them, (16, 768).
        details: the same for the components after these, which latents lack, (96, 768).
    """

    mean: torch.Tensor
    analysis: torch.Tensor
    synthesis: torch.Tensor
    details: torch.Tensor

    @classmethod
    def of_world(cls) -> "Components":
        """Computes them from training scenes (20 seconds); the same on every machine but for rounding."""
        size = 3 * PATCH[0] * PATCH[1] * PATCH[2]
        total, products, count = torch.zeros(size).double(), torch.zeros(size, size).double(), 0
        for seed in range(SCENES):
            patches = pixels(world.frames(world.draw(seed, 2))).flatten(0, 2).double()
            total += patches.sum(0)
            products += patches.T @ patches
            count += len(patches)
        mean = total / count
        values, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))
        kept = USED + DETAILS
        deviation, basis = values.flip(0)[:kept].sqrt(), vectors.flip(1)[:, :kept]
        # The sign of an eigenvector is any: make its largest entry positive.
        basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
        patterns = basis * deviation
        spread = deviation[:USED].sqrt()
        spread /= spread.square().mean().sqrt()
        empty = LATENT_CHANNELS - USED
        return cls(
            mean.float(),
            analysis=F.pad((basis / deviation)[:, :USED] * spread, (0, empty)).float(),
            synthesis=F.pad((patterns[:, :USED] / spread).T, (0, 0, 0, empty)).float(),
            details=patterns[:, USED:].T.float(),
        )

    def latents(self, frames: NDArray[np.uint8]) -> torch.Tensor:
        """Returns the latents of frames (T, H, W, 3): (16, T / 4, H / 8, W / 8); over the world of mean 0 and variance 1, in
        the channels in use."""
        return (pixels(frames).sub_(self.mean) @ self.analysis).permute(3, 0, 1, 2)


def noise_like(latents: torch.Tensor) -> torch.Tensor:
    """Returns normal noise of the shape of latents, (..., 16, T, h, w), in the channels in use; the others stay empty.

    So nothing is learned of these: weights that begin with zero for them stay so, and ignore the noise that a sampler puts there.
    """
    noise = torch.randn_like(latents)
    noise[..., USED:, :, :, :] = 0
    return noise


def components_of(folder: Path) -> Components:
    """Returns the components kept in a folder, computed and put there unless they are."""
    file = folder / "components.pt"
    if file.is_file():
        return Components(**torch.load(file, weights_only=True))
    components = Components.of_world()
    part = folder / "components.part"
    torch.save({name: x.clone() for name, x in vars(components).items()}, part)
    put_in_place(part, file)
    return components

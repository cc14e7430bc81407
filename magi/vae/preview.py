"""Approximate decoding of latents by one matmul in place of the VAE, for previews while a video is generated."""

from collections.abc import Callable

import torch

from ..config import LATENT_CHANNELS
from .video_vae import VideoVAE

_PROBE = 2.0  # about two standard deviations of latents
_LARGEST = 1e3  # of a latent; a hundred times what is usual
_SIDE = 2  # latent pixels of a probe: few, but more than one, as the VAE is unreliable on a single token


class RoughDecoder:
    """Approximate decoder of the last frame, at an eighth of its size.

    With a VAE the colours are about right; without one they are false, but shapes and motion are visible.
    """

    def __init__(self, vae: VideoVAE | None = None) -> None:
        """Measures the colour of each latent channel by one small decode, if there is a `vae`."""
        self._colour: Callable[[torch.Tensor], torch.Tensor] = _principal_colours
        if vae is not None:
            matrix, offset = _channel_colours(vae)
            self._colour = lambda pixels: pixels @ matrix + offset

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes the last frame: latents (1, 16, T, h, w) -> uint8 (h, w, 3)."""
        # Clamped, as the square of a number that is far out would be infinite.
        frame = latents[0, :, -1].detach().to("cpu", torch.float32).clamp(-_LARGEST, _LARGEST)  # (16, h, w)
        pixels = frame.flatten(1).T  # (h * w, 16)
        colours = self._colour(pixels).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)  # (h * w, 3)
        return colours.reshape(*frame.shape[1:], 3)  # (h, w, 3)


def _channel_colours(vae: VideoVAE) -> tuple[torch.Tensor, torch.Tensor]:
    """Measures the colour in [-1, 1] that a constant latent decodes to: per channel (16, 3), and of zeros (3,)."""
    levels = torch.cat(
        [torch.zeros(1, LATENT_CHANNELS), torch.eye(LATENT_CHANNELS), -torch.eye(LATENT_CHANNELS)]
    )  # (33, 16)
    flat = (levels * _PROBE)[:, :, None, None, None].expand(-1, -1, 1, _SIDE, _SIDE)  # (33, 16, 1, 2, 2)
    colours = vae.decode(flat.contiguous()).mean(dim=(2, 3, 4))  # (33, 3)
    up, down = colours[1 : LATENT_CHANNELS + 1], colours[LATENT_CHANNELS + 1 :]
    return (up - down) / (2 * _PROBE), colours[0]


def _principal_colours(pixels: torch.Tensor) -> torch.Tensor:
    """Projects latents on their first three principal components as RGB of about [-1, 1]: (n, 16) -> (n, 3)."""
    centred = pixels - pixels.mean(dim=0)
    _, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
    directions = directions[:, -3:].flip(1)  # (16, 3)
    # The solver's choice of signs is arbitrary: fixed here, so that colours do not flip between previews.
    directions = directions * directions.gather(0, directions.abs().argmax(dim=0, keepdim=True)).sign()
    main = centred @ directions  # (n, 3)
    return main / main.std(dim=0, correction=0).clamp(min=1e-6) / 2

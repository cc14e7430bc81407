"""Latents as pictures, roughly: one matrix product in place of the VAE, for previews while a video is being made."""

from collections.abc import Callable

import torch

from ..config import LATENT_CHANNELS
from .video_vae import VideoVAE

_PROBE = 2.0  # about two deviations of the latents of pictures
_SIDE = 2  # latent pixels of a probe: few, but more than one, as attention over a single token is no picture


class RoughDecoder:
    """Latents (1, 16, T, h, w) -> uint8 (h, w, 3), the last frame in an eighth of its size.

    Made for a VAE the colours are about right; without one they are false, but shapes and movement show.
    """

    def __init__(self, vae: VideoVAE | None = None) -> None:
        """Asks `vae` for the mean colour of each channel: one small decode."""
        self._colour: Callable[[torch.Tensor], torch.Tensor] = _principal_colours
        if vae is not None:
            matrix, offset = _channel_colours(vae)
            self._colour = lambda pixels: pixels @ matrix + offset

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """The last frame of `latents` as it is about to look."""
        frame = latents[0, :, -1].detach().to("cpu", torch.float32)  # (16, h, w)
        pixels = frame.flatten(1).T  # (h * w, 16)
        colours = self._colour(pixels).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
        return colours.reshape(*frame.shape[1:], 3)


def _channel_colours(vae: VideoVAE) -> tuple[torch.Tensor, torch.Tensor]:
    """(16, 3) and (3,): the colour a flat patch of latents has, channel by channel, in [-1, 1]."""
    levels = torch.cat([torch.zeros(1, LATENT_CHANNELS), torch.eye(LATENT_CHANNELS), -torch.eye(LATENT_CHANNELS)])
    flat = (levels * _PROBE)[:, :, None, None, None].expand(-1, -1, 1, _SIDE, _SIDE)
    colours = vae.decode(flat.contiguous()).mean(dim=(2, 3, 4))  # (33, 3)
    up, down = colours[1 : LATENT_CHANNELS + 1], colours[LATENT_CHANNELS + 1 :]
    return (up - down) / (2 * _PROBE), colours[0]


def _principal_colours(pixels: torch.Tensor) -> torch.Tensor:
    """(n, 16) -> (n, 3) in about [-1, 1]: the three directions in which the latents differ most, as red, green and blue."""
    centred = pixels - pixels.mean(dim=0)
    _, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
    directions = directions[:, -3:].flip(1)
    # Their signs are the solver's whim: held, so that colours do not flip from one preview to the next.
    directions = directions * directions.gather(0, directions.abs().argmax(dim=0, keepdim=True)).sign()
    main = centred @ directions
    return main / main.std(dim=0, correction=0).clamp(min=1e-6) / 2

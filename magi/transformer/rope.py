"""Rotary position embedding with learned bands over time, height and width (paper section 2.2)."""

import math

import torch


def rope_angles(bands: torch.Tensor, first_frame: int, frames: int, height: int, width: int) -> torch.Tensor:
    """Angles of every token of a run of latent frames.

    Args:
        bands: (head/8,) float32, learned frequencies.
        first_frame: index of the first latent frame in the video.
        frames: latent frames.
        height: tokens in a column.
        width: tokens in a row.

    Returns:
        (frames * height * width, 3 * head/8) float32: the angles of t, h and w side by side.
    """
    device = bands.device
    t = torch.arange(first_frame, first_frame + frames, device=device, dtype=torch.float32)
    # Height and width are centred and stretched so that any picture spans what a 16 x 16 token square of its area would.
    scale = math.sqrt(height * width / 256)
    h, w = (_centred(n, n / scale, device) for n in (height, width))
    grid = torch.stack(torch.meshgrid(t, h, w, indexing="ij"), dim=-1)
    return (grid[..., None] * bands).reshape(frames * height * width, 3 * bands.numel())


def _centred(n: int, reference: float, device: torch.device) -> torch.Tensor:
    # Divided first and multiplied then: this order decides the last bits.
    return (torch.arange(n, device=device, dtype=torch.float32) - (n - 1) / 2) / (n - 1) * (reference - 1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first 2 * n features of each head by n angles, pairing feature i with i + n; the rest stays.

    Args:
        x: (tokens, heads, d) float32.
        cos: (tokens, n) float32.
        sin: (tokens, n) float32.
    """
    n = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    a, b, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

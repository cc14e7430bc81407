"""Rotary position embedding with learned bands over time, height and width (arXiv 2505.13211, section 2.2)."""

import math

import torch


def rope_angles(bands: torch.Tensor, first_frame: int, frames: int, height: int, width: int) -> torch.Tensor:
    """Computes the rotary angles of every token of consecutive latent frames.

    Args:
        bands: (head/8,) float32, learned frequencies.
        first_frame: index of the first latent frame in the video.
        frames: latent frames.
        height: tokens along the height.
        width: tokens along the width.

    Returns:
        (frames * height * width, 3 * head/8) float32: the angles of t, h and w, concatenated.
    """
    device = bands.device
    t = torch.arange(first_frame, first_frame + frames, device=device, dtype=torch.float32)  # (frames,)
    # Height and width are centred and scaled so that a picture of any size spans the area of 16 x 16 tokens.
    scale = math.sqrt(height * width / 256)
    h, w = (_centred(n, n / scale, device) for n in (height, width))  # (height,), (width,)
    grid = torch.stack(torch.meshgrid(t, h, w, indexing="ij"), dim=-1)  # (frames, height, width, 3)
    return (grid[..., None] * bands).reshape(frames * height * width, 3 * bands.numel())  # (S, n)


def _centred(n: int, span: float, device: torch.device) -> torch.Tensor:
    # Division before multiplication: the order decides the last bits.
    return (torch.arange(n, device=device, dtype=torch.float32) - (n - 1) / 2) / (n - 1) * (span - 1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first 2 * n features of each head by n angles, pairing feature i with i + n, and keeps the others.

    Args:
        x: (S, heads, d) float32.
        cos: (S, n) float32.
        sin: (S, n) float32.

    Returns:
        (S, heads, d) float32.
    """
    n = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]  # (S, 1, n)
    a, b, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]  # (S, heads, n) twice, (S, heads, d - 2n)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)  # (S, heads, d)

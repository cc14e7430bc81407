"""The memory of a tile in the VAE, and the largest tile that fits: pure functions."""

from dataclasses import replace

import torch

from .model import PATCH_VALUES, VAEConfig
from .tiling import PATCH_FRAMES, PATCH_SIZE, Tiling

SIZES = (256, 192, 128, 96, 64)  # side of a tile in pixels, the published one first
_RESERVE = 0.1  # share of free memory for allocator rounding, kernel workspaces, and the edges kept for blending


def tile_bytes(config: VAEConfig, tiling: Tiling, dtype: torch.dtype, scores: bool) -> int:
    """Returns the peak bytes, beside the weights, of encoding or decoding a tile.

    Args:
        config: sizes of the VAE.
        tiling: size of the tile.
        dtype: compute dtype.
        scores: whether attention materializes a score per pair of tokens, see `makes_scores`.
    """
    e, d = dtype.itemsize, config.embed_dim
    grid = (tiling.frames // PATCH_FRAMES, tiling.size // PATCH_SIZE, tiling.size // PATCH_SIZE)
    tokens = grid[0] * grid[1] * grid[2]
    around = tokens * e * (3 * PATCH_VALUES + d)  # the pixels, and the tokens before the first block
    upcast = e < 4
    # Each sum is what is alive at once: the residual stream, then what is computed from it.
    attention = [d * (4 * e + 2 * e + 2 * 4 + e * upcast)]  # q, k and v, one of them being standardised
    if scores:  # the plain kernel computes them in float32
        attention.append(d * (4 * e + 4 + 3 * 4 * upcast) + 2 * 4 * config.num_heads * tokens)
    mlp = e * (3 * d + 2 * round(d * config.mlp_ratio))
    positions = d * (e + 4 + 4 + e)
    learned = 0
    if grid != config.grid:
        t, h, w = config.grid
        learned = 4 * d * (t * h * w * upcast + t * grid[1] * grid[2])
    return around + max(tokens * max(*attention, mlp), tokens * positions + learned)


def fitting(tiling: Tiling, config: VAEConfig, dtype: torch.dtype, scores: bool, free: int) -> Tiling:
    """Returns the largest tiling up to `tiling` that fits into 90% of `free` bytes; the smallest if none does."""
    while tile_bytes(config, tiling, dtype, scores) > (1 - _RESERVE) * free:
        smaller = next_smaller(tiling)
        if smaller is None:
            break
        tiling = smaller
    return tiling


def next_smaller(tiling: Tiling) -> Tiling | None:
    """Returns the tiling of the next smaller size with the published overlap; None below the smallest."""
    size = next((size for size in SIZES if size < tiling.size), None)
    return None if size is None else replace(tiling, size=size, overlap=Tiling.overlap)


def makes_scores(device: torch.device, dtype: torch.dtype, config: VAEConfig) -> bool:
    """Returns whether torch's only attention kernel on this device materializes the matrix of scores."""
    head = torch.zeros(1, 1, 64, config.embed_dim // config.num_heads, device=device, dtype=dtype)
    try:
        with torch.no_grad():
            return int(torch._fused_sdp_choice(head, head, head)) == 0  # 0: the plain kernel
    except (AttributeError, RuntimeError, NotImplementedError):
        return True

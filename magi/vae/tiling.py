"""Tiling in space and time: cuts a video into tiles and blends them without seams.

Along time tiles do not overlap. In space they do, and each tile fades in over the one above it and then over the one to
its left.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from ..config import SPATIAL_DOWNSAMPLE, TEMPORAL_DOWNSAMPLE
from ..errors import MagiError
from ..system.progress import OnProgress

PATCH_FRAMES, PATCH_SIZE = TEMPORAL_DOWNSAMPLE, SPATIAL_DOWNSAMPLE


@dataclass(frozen=True)
class Tiling:
    """Size and overlap of the tiles that the VAE processes one at a time; they alone set the peak memory.

    Attributes:
        frames: video frames per tile, a multiple of 4. The official 12 are half a second.
        size: height and width of a tile in pixels, a multiple of 8.
        overlap: share of `size` common to neighbouring tiles, at least 0 and below 1; a multiple of 8 pixels.

    Raises:
        MagiError: a value breaks the rules above.
    """

    frames: int = 12
    size: int = 256
    overlap: float = 0.25

    def __post_init__(self) -> None:
        for name, value, unit in (("frames", self.frames, PATCH_FRAMES), ("size", self.size, PATCH_SIZE)):
            if not isinstance(value, int) or value < unit or value % unit:
                raise MagiError(
                    f"Tiling {name} {value!r} is not a positive multiple of {unit}. {_nearest(value, unit)}"
                )
        if not 0 <= self.overlap < 1:
            raise MagiError(f"Tiling overlap {self.overlap!r} is not in 0..1 (1 excluded). The official value is 0.25.")
        if abs(self.size * self.overlap - self.latent_overlap * PATCH_SIZE) > 1e-3:
            raise MagiError(
                f"Tiling overlap {self.overlap} of size {self.size} is {self.size * self.overlap:g} pixels, not a multiple of "
                f"{PATCH_SIZE}. Choose overlap {self.latent_overlap * PATCH_SIZE / self.size:.6g}, or a size that is a multiple of 32 with overlap 0.25."
            )

    @property
    def latent_frames(self) -> int:
        """Returns the latent frames of a tile."""
        return self.frames // PATCH_FRAMES

    @property
    def latent_size(self) -> int:
        """Returns height and width of a tile in latent pixels."""
        return self.size // PATCH_SIZE

    @property
    def latent_overlap(self) -> int:
        """Returns the overlap of neighbouring tiles in latent pixels."""
        # One below the size at most, so that the stride is at least one latent pixel.
        return min(round(self.size * self.overlap / PATCH_SIZE), self.latent_size - 1)

    def starts(self, length: int) -> range:
        """Returns the first latent pixel of every tile along an axis of `length` ones; the last may be a sliver."""
        return range(0, length, self.latent_size - self.latent_overlap)

    def tile_count(self, frames: int, height: int, width: int) -> int:
        """Returns the number of tiles of `frames` x `height` x `width` latents."""
        return -(-frames // self.latent_frames) * len(self.starts(height)) * len(self.starts(width))


def _nearest(value: object, unit: int) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 2**31:
        return f"Choose a multiple of {unit}."
    return f"The nearest is {max(unit, round(value / unit) * unit)}."


class TileProgress:
    """Progress over tiles for a callback, which may cancel by raising, inside a long tile too.

    `on_progress` calls the callback at most every `interval` seconds, so that it does not slow down a fast device.
    """

    interval = 0.5  # seconds

    def __init__(self, callback: OnProgress | None) -> None:
        self.done = 0
        self.total = 0
        self._callback = callback
        self._called = time.monotonic()

    def finish_tile(self) -> None:
        """Counts one more finished tile and calls the callback."""
        self.done += 1
        self._call()

    def on_progress(self) -> None:
        """Calls the callback if its last call is `interval` ago; to be called after each part of a tile."""
        if time.monotonic() - self._called >= self.interval:
            self._call()

    def _call(self) -> None:
        if self._callback is not None:
            self._callback(self.done, self.total)
        self._called = time.monotonic()


def recut(blocks: Iterable[torch.Tensor], length: int) -> Iterator[torch.Tensor]:
    """Re-cuts a sequence of (B, C, t, H, W) blocks of any t into pieces of `length` frames, yielded once complete.

    The last piece may be shorter. At most one piece and the current block are kept.
    """
    parts: list[torch.Tensor] = []
    count = 0
    for block in blocks:
        start = 0
        while start < block.shape[2]:
            part = block[:, :, start : start + length - count]
            start += part.shape[2]
            count += part.shape[2]
            parts.append(part)
            if count == length:
                yield _joined(parts)  # (B, C, length, H, W)
                parts, count = [], 0
    if parts:
        yield _joined(parts)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def map_tiles(
    run: Callable[[torch.Tensor], torch.Tensor],
    source: torch.Tensor,
    result: torch.Tensor,
    tiling: Tiling,
    *,
    scale_in: int,
    scale_out: int,
    chained: bool,
) -> None:
    """Runs a function over the spatial tiles of `source`, and blends the results into `result`.

    Args:
        run: maps a tile of `source` to the same tile of `result`; may return any floating dtype and device.
        source: (..., h * scale_in, w * scale_in), for h x w latent pixels.
        result: (..., h * scale_out, w * scale_out); tiles are blended in float32, then copied to its device and dtype.
        tiling: size and overlap of the tiles.
        scale_in: units of `source` per latent pixel.
        scale_out: units of `result` per latent pixel.
        chained: fade in over neighbours that are blended themselves (encoding), or as returned (decoding).
    """
    extent = tiling.latent_overlap * scale_out
    keep = (tiling.latent_size - tiling.latent_overlap) * scale_out
    above: list[torch.Tensor] = []  # the lower edges of the previous row of tiles, all that blending needs
    for y in tiling.starts(source.shape[-2] // scale_in):
        edges: list[torch.Tensor] = []
        left = None
        for column, x in enumerate(tiling.starts(source.shape[-1] // scale_in)):
            rows, columns = (slice(s * scale_in, (s + tiling.latent_size) * scale_in) for s in (y, x))
            tile = run(source[..., rows, columns]).float()
            lower, right = _end(tile, extent, -2), _end(tile, extent, -1)
            if above:
                _fade_in(tile, above[column], -2)
            if left is not None:
                _fade_in(tile, left, -1)
            if chained:
                lower, right = _end(tile, extent, -2), _end(tile, extent, -1)
            tile = tile[..., :keep, :keep]
            top, start = y * scale_out, x * scale_out
            result[..., top : top + tile.shape[-2], start : start + tile.shape[-1]] = tile
            edges.append(lower)
            left = right
        above = edges


def _end(tile: torch.Tensor, extent: int, dim: int) -> torch.Tensor:
    extent = min(extent, tile.shape[dim])
    return tile.narrow(dim, tile.shape[dim] - extent, extent).clone()  # a view would keep the whole tile in memory


def _fade_in(tile: torch.Tensor, before: torch.Tensor, dim: int) -> None:
    """Blends the start of `tile` in place: linearly from the end of `before` to its own values."""
    # A sliver is narrower than the overlap and ends where the tile before it ends, so the fade is as long as the
    # sliver.
    extent = min(before.shape[dim], tile.shape[dim])
    weight = torch.arange(extent, device=tile.device, dtype=tile.dtype) / max(extent, 1)
    if dim == -2:
        weight = weight[:, None]
    start = tile.narrow(dim, 0, extent)
    start.copy_(before.narrow(dim, before.shape[dim] - extent, extent).lerp(start, weight))

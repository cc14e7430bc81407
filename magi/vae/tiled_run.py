"""One encoding or decoding, by temporal tiles: checks the input, and shrinks the tiles if memory runs out."""

from collections.abc import Callable, Iterable, Iterator
from warnings import warn

import torch

from ..errors import MagiError
from ..system.device import empty_cache, retry_with_less
from ..system.finite import check_finite
from ..system.progress import OnProgress
from .footprint import next_smaller
from .tiling import PATCH_FRAMES, PATCH_SIZE, TileProgress, Tiling


class TileRun:
    """One encoding or decoding: the tiling in use, and the progress over its tiles.

    Attributes:
        tiling: current tiling; its `frames` are fixed, its `size` may shrink.
        counter: counts tiles done and known.
    """

    def __init__(
        self,
        tiling: Tiling,
        progress: OnProgress | None,
        device: torch.device,
        fitting: Callable[[Tiling], Tiling] | None = None,
    ) -> None:
        """Prepares a run; `fitting` shrinks the tiling to the free memory, and is called with the first tile."""
        self.tiling = tiling
        self._fitting = fitting
        self.counter = TileProgress(progress)
        self._device = device
        self._warned = False
        self._extent = (0, 0, 0)  # latents known so far: frames, height, width
        self._finished = 0  # temporal tiles

    def checked(
        self, blocks: Iterable[torch.Tensor], check: Callable[[torch.Tensor], None], frames: int, size: int
    ) -> Iterator[torch.Tensor]:
        """Yields `blocks` after checking them, and counts their tiles.

        Args:
            blocks: (B, C, t, H, W) each, of any t.
            check: raises MagiError for a bad block.
            frames: frames of a block per latent frame.
            size: pixels of a block per latent pixel, along height and width.

        Raises:
            MagiError: a block is bad, or differs from the first one in more than t.
        """
        first: torch.Size | None = None
        length = 0
        for block in blocks:
            check(block)
            first = first or block.shape
            if block.shape[3:] != first[3:] or block.shape[0] != first[0]:
                raise MagiError(
                    f"A block of shape {tuple(block.shape)} follows one of {tuple(first)}. Only the number of frames may change."
                )
            length += block.shape[2]
            self._extent = (-(-length // frames), first[3] // size, first[4] // size)
            self.counter.total = self.tiling.tile_count(*self._extent)
            yield block

    def attempt(self, work: Callable[[Tiling], torch.Tensor]) -> torch.Tensor:
        """Runs `work` on one temporal tile; if memory runs out, repeats it with smaller tiles, which later ones keep.

        Raises:
            MagiError: even the smallest tiles do not fit.
        """
        if self._fitting:
            chosen, self._fitting = self._fitting(self.tiling), None
            if chosen != self.tiling:
                self._shrink(chosen)
        result = retry_with_less(lambda: work(self.tiling), self._take_smaller)
        self._finished += 1
        return result

    def _take_smaller(self, error: BaseException) -> None:
        smaller = next_smaller(self.tiling)
        if smaller is None:
            raise MagiError(
                f"{self._device} has too little memory even for tiles of {self.tiling.size} pixels and "
                f"{self.tiling.frames} frames. Close what else uses it, use {_fewer(self.tiling)}the CPU for the VAE."
            ) from error
        empty_cache(self._device)
        self._shrink(smaller)

    def _shrink(self, tiling: Tiling) -> None:
        self.tiling = tiling
        _, height, width = self._extent
        self.counter.done = self._finished * tiling.tile_count(tiling.latent_frames, height, width)
        self.counter.total = tiling.tile_count(*self._extent)
        self._warn()

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            warn(
                f"{self._device} has too little free memory for the VAE's tiles. Smaller ones, of {self.tiling.size} pixels or "
                "less, are used: seams may show, and details differ a little. To avoid that, free memory or use the CPU for the VAE.",
                stacklevel=4,
            )


def check_video(video: torch.Tensor) -> None:
    """Raises MagiError unless the video is (B, 3, T, H, W), floating point, with H and W multiples of 8."""
    check_tensor(video, "video", "(batch, 3, frames, height, width)", 3)
    for name, value in (("height", video.shape[3]), ("width", video.shape[4])):
        if value % PATCH_SIZE:
            nearest = max(1, round(value / PATCH_SIZE)) * PATCH_SIZE
            raise MagiError(
                f"The video's {name}, {value} pixels, is not a multiple of {PATCH_SIZE}. Resize or crop it to {nearest}."
            )


def check_tensor(tensor: torch.Tensor, name: str, layout: str, channels: int) -> None:
    """Raises MagiError unless the tensor is floating point, finite, not empty, and (B, channels, T, H, W)."""
    shape = tuple(tensor.shape)
    if len(shape) != 5 or shape[1] != channels:
        raise MagiError(f"Shape {shape} is not that of {name} for the VAE. Give {layout}.")
    if 0 in shape:
        raise MagiError(f"There is nothing in {name} of shape {shape}. Give at least one frame.")
    if not tensor.is_floating_point():
        raise MagiError(
            f"Values of type {tensor.dtype} are not {name} for the VAE. Give floating point; pixels as uint8 / 127.5 - 1."
        )
    check_finite(tensor, f"the {name} for the VAE", "Mend what it comes from: there is no picture in it.")


def _fewer(tiling: Tiling) -> str:
    return "fewer frames per tile, or " if tiling.frames > PATCH_FRAMES else ""

"""What a pipeline asks of the owner of its models: `ResidentModels`, or in ComfyUI `ManagedModels`."""

from collections.abc import Iterator
from typing import Protocol

from ..config import MagiConfig
from ..planning.placement import Placement
from ..sampling.state import Chunk
from ..system.progress import OnProgress
from ..transformer.model import Transformer
from ..vae.video_vae import VideoVAE


class Models(Protocol):
    """The transformer and VAE of a pipeline, and the memory they lie in."""

    def place(self, run: MagiConfig, prefix_frames: int, allow_smaller_window: bool) -> Placement:
        """Returns what goes where in a run, from headers and free memory; nothing is loaded.

        Args:
            run: settings with its size, length and window.
            prefix_frames: latent frames that come before what is made.
            allow_smaller_window: a smaller window may be taken where nothing else helps.

        Raises:
            MagiError: the run cannot fit.
        """

    def transformer(self, placement: Placement, progress: OnProgress | None = None) -> Transformer:
        """Returns the transformer, placed as `placement` says; `progress` counts layers while it is loaded."""

    def left_with(self, window: int) -> None:
        """Notes that memory ran out and the run ended with a window of so many chunks."""

    def share_device(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """Yields the sampler's chunks; while one is sampled, the VAE may be off the device."""

    @property
    def vae(self) -> VideoVAE:
        """Returns the VAE, on the device."""

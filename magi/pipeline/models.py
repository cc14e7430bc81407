"""What a pipeline asks of whoever keeps its models in memory: `ResidentModels`, or ComfyUI's memory manager."""

from collections.abc import Iterator
from typing import Protocol

from ..config import MagiConfig
from ..planning.placement import Placement
from ..sampling.state import Chunk
from ..system.progress import OnProgress
from ..transformer.model import Transformer
from ..vae.video_vae import VideoVAE


class Models(Protocol):
    """A transformer and a VAE, and who finds room for them."""

    def place(self, run: MagiConfig, given: int, may_narrow: bool) -> Placement:
        """Returns what goes where in a run, from headers and free memory; nothing is loaded.

        Args:
            run: settings with its size, length and window.
            given: latent frames that come before what is made.
            may_narrow: a smaller window may be taken where nothing else helps.

        Raises:
            MagiError: the run cannot fit.
        """

    def transformer(self, placement: Placement, progress: OnProgress | None = None) -> Transformer:
        """Returns the transformer, laid out for the placement's run; `progress` counts layers while it is loaded."""

    def left_with(self, window: int) -> None:
        """Notes that the run had to denoise fewer chunks at a time, so many in the end."""

    def share_device(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """Yields the sampler's chunks; while one is made, the VAE may leave the device to it."""

    @property
    def vae(self) -> VideoVAE:
        """Returns the VAE, on the device."""

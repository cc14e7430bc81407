"""`MagiPipeline` over ComfyUI's memory manager, which loads and evicts the models in place of `ResidentModels`."""

from collections.abc import Iterator
from typing import Any, cast

from ...magi.config import MagiConfig
from ...magi.model_files.locate import ModelFiles
from ...magi.pipeline.pipeline import MagiPipeline
from ...magi.planning.placement import Placement
from ...magi.sampling.state import Chunk
from ...magi.system.progress import OnProgress
from ...magi.transformer.model import Transformer
from ...magi.vae.tiling import Tiling
from ...magi.vae.video_vae import VideoVAE
from . import host, memory
from .models import Model
from .vae import magi_vae, working_memory

_PREVIEW = Tiling(frames=4)  # of one latent frame


class ManagedModels:
    """A transformer, and a VAE for previews, that ComfyUI loads and evicts: the `Models` of a pipeline.

    Attributes:
        preview_vae: the VAE, where there was room to load it beside the transformer; else None.
    """

    def __init__(self, model: Model, vae: Any = None) -> None:
        """Takes what the loader nodes hand on; nothing is loaded."""
        self._model = model
        self._vae = None if vae is None else magi_vae(vae)
        self.preview_vae: VideoVAE | None = None

    def place(self, run: MagiConfig, prefix_frames: int, allow_smaller_window: bool) -> Placement:
        """Returns what goes where in a run, given the memory that is free once ComfyUI has evicted all its models."""
        return self._model.transformer.plan(run, prefix_frames, allow_smaller_window)

    def transformer(self, placement: Placement, progress: OnProgress | None = None) -> Transformer:
        """Returns the transformer, placed as `placement` says; the VAE is loaded beside it where both fit.

        What waits in RAM is page-locked until `unpin`: between two runs others may want to page-lock theirs.
        """
        transformer = self._load(placement, progress)
        self._model.transformer.pin()
        return transformer

    def unpin(self) -> None:
        """Gives page-locked memory back, once a run has ended in whatever way."""
        self._model.transformer.unpin()

    def _load(self, placement: Placement, progress: OnProgress | None) -> Transformer:
        self._model.transformer.placement = placement
        patcher, working = self._model.patcher, placement.spare_bytes
        if self._vae is not None:
            usable, both = host.usable_memory(), working + working_memory(_PREVIEW)
            if usable is None or patcher.model_size() + self._vae.patcher.model_size() + both <= usable:
                loaded = memory.load(patcher, self._vae.patcher, working=both, progress=progress)
                transformer, self.preview_vae = loaded
                return cast(Transformer, transformer)
        return cast(Transformer, memory.load(patcher, working=working, progress=progress)[0])

    def left_with(self, window: int) -> None:
        """Notes that memory ran out and the run ended with a window of so many chunks."""
        self._model.transformer.left_with(window)

    def share_device(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """Returns the chunks as they are: ComfyUI moves models between nodes, not within one."""
        return chunks

    @property
    def vae(self) -> VideoVAE:
        """Returns the VAE on the device."""
        return magi_vae(self._vae).loaded()


def managed_pipeline(model: Model, config: MagiConfig, models: ManagedModels) -> MagiPipeline:
    """Returns a pipeline from captions and latents to latents, over a loader's model and with its settings."""
    transformer = model.transformer
    return MagiPipeline(
        ModelFiles(transformer.path),
        config,
        device=host.device(),
        precision=transformer.precision,
        attention=transformer.attention,
        compiled=transformer.compiled,
        models=models,
        special_tokens=model.special_tokens,
    )

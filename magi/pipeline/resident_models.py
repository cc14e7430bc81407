"""The transformer and VAE of a pipeline without ComfyUI: loaded on first use, and placed so that both find room."""

from collections.abc import Iterator
from contextlib import suppress

import torch

from ..checkpoint.reader import Checkpoint
from ..config import MagiConfig
from ..errors import MagiError
from ..model_files.load import load_transformer
from ..model_files.locate import ModelFiles
from ..planning.footprint import weight_sizes
from ..planning.placement import MemoryOptions, Placement
from ..planning.planner import Planner
from ..sampling.state import Chunk
from ..system.device import empty_cache, free_memory
from ..system.host_memory import memory_beside
from ..system.progress import OnProgress
from ..transformer.compiled import check_compile
from ..transformer.inputs import TOKEN_BLOCK
from ..transformer.model import Transformer
from ..transformer.weights import Precision
from ..vae.footprint import makes_scores, tile_bytes
from ..vae.tiling import Tiling
from ..vae.video_vae import VideoVAE, load_vae


class ResidentModels:
    """Both models and the memory they share. They stay loaded for the next run."""

    def __init__(
        self,
        files: ModelFiles,
        config: MagiConfig,
        device: torch.device,
        *,
        dtype: torch.dtype | None,
        vae_dtype: torch.dtype,
        precision: Precision,
        attention: str,
        memory: MemoryOptions,
        compiled: bool = False,
    ) -> None:
        """Loads nothing; arguments as for `MagiPipeline.from_files`.

        Raises:
            MagiError: `compiled`, and torch.compile makes no kernels here.
        """
        self._files, self._config, self._device = files, config, device
        self._dtype, self._vae_dtype = dtype, vae_dtype
        self._precision: Precision = precision
        self._attention = attention
        self._compiled = compiled
        if compiled:
            check_compile(device)
        self._planner = Planner(memory)
        self._transformer: Transformer | None = None
        self._placement: Placement | None = None  # how the transformer was loaded
        self._vae: VideoVAE | None = None
        self._parks_vae = False  # whether the VAE leaves the device while the transformer works

    def place(self, run: MagiConfig, prefix_frames: int, allow_smaller_window: bool) -> Placement:
        """Returns what goes where in a run, from headers and free memory; what is loaded here counts as free.

        Args:
            run: with its size, length and window.
            prefix_frames: latent frames of an image or clip that come before what is made.
            allow_smaller_window: a smaller window may be taken where nothing else helps.

        Raises:
            MagiError: the run cannot fit.
        """
        with Checkpoint(self._files.transformer) as checkpoint:
            sizes = weight_sizes(checkpoint.tensors, run.model, self._device, self._precision, self._dtype)

        empty_cache(self._device)
        host, room = memory_beside(self._device), free_memory(self._device)
        room = None if room is None else room + self._loaded_bytes()
        if self._transformer is not None:
            self._planner.learn(self._transformer, sizes)

        def placed(**vae: int) -> Placement:
            return self._planner.place(
                run, sizes, room, prefix_frames, free_host=host, allow_smaller_window=allow_smaller_window, **vae
            )

        self._parks_vae = False
        if room is None:
            return placed()
        vae, tile = self._vae_needs()
        with suppress(MagiError):
            roomy = placed(reserved=vae, other_model_bytes=tile)
            best = ("device", self._planner.options.token_block or TOKEN_BLOCK, run.runtime.window_size)
            if not roomy.streaming and (roomy.cache, roomy.token_block, roomy.window) == best:
                return roomy
        self._parks_vae = True
        return placed(other_model_bytes=vae + tile)

    def transformer(self, placement: Placement, progress: OnProgress | None = None) -> Transformer:
        """Returns the transformer, placed so; read again only for other resident layers or a smaller ring buffer."""
        loaded = self._placement
        self._planner.begin(placement)
        if self._transformer is not None and loaded is not None:
            ring_shrinks = placement.streaming and loaded.slots > placement.slots
            resident = set(self._transformer.blocks.on_device)  # fewer than loaded where memory ran out
            if (
                resident >= set(placement.on_device)
                and (loaded.on_device, loaded.on_host) == (placement.on_device, placement.on_host)
                and not ring_shrinks
            ):
                self._transformer.cache_device = placement.cache
                self._transformer.token_block = placement.token_block
                return self._transformer
            self._transformer = None
            empty_cache(self._device)
        self._transformer = load_transformer(
            self._files.transformer,
            self._config,
            self._device,
            self._dtype,
            progress=progress,
            precision=self._precision,
            attention=self._attention,
            placement=placement,
            compiled=self._compiled,
        )
        self._placement = placement
        return self._transformer

    @property
    def vae(self) -> VideoVAE:
        """Returns the VAE, loaded on first use; where it is parked, it comes back to the device when it is used."""
        if self._vae is None:
            self._vae = load_vae(self._files.required("vae"), self._device, self._vae_dtype)
        return self._vae

    def left_with(self, window: int) -> None:
        """Notes that memory ran out and the run ended with a window of so many chunks."""
        self._planner.left_with(window)

    def share_device(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """Yields the sampler's chunks; where memory is short, the VAE is off the device while each is sampled."""
        while True:
            if self._parks_vae and self._vae is not None:
                self._vae.park()
            chunk = next(chunks, None)
            if chunk is None:
                return
            if self._parks_vae:
                empty_cache(self._device)
            yield chunk

    def _vae_needs(self) -> tuple[int, int]:
        """Returns the bytes of the VAE's weights, and those that a tile takes on its way through it; 0 without a VAE."""
        if self._files.vae is None:
            return 0, 0
        vae = self._vae or load_vae(self._files.required("vae"), "meta", self._vae_dtype)
        scores = makes_scores(self._device, self._vae_dtype, vae.config)
        return vae.nbytes, tile_bytes(vae.config, Tiling(), self._vae_dtype, scores)

    def _loaded_bytes(self) -> int:
        """Returns the bytes that these models have on the device."""
        loaded = self._transformer.nbytes if self._transformer else 0
        return loaded + (self._vae.device_bytes if self._vae else 0)

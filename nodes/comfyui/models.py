"""What the loaders hand on: files that were found and checked, and weights that are read when a node needs them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...magi.checkpoint.reader import Checkpoint
from ...magi.config import MagiConfig
from ...magi.errors import MagiError
from ...magi.model_files.load import load_transformer
from ...magi.planning.footprint import weight_sizes
from ...magi.planning.placement import MemoryOptions, Placement, spread
from ...magi.planning.planner import Planner
from ...magi.sampling.special_tokens import SpecialTokens
from ...magi.system.host_memory import memory_beside
from ...magi.transformer.weights import Precision
from ...magi.vae.video_vae import load_vae
from . import host
from .memory import Held, Managed


class MagiTransformer(Held):
    """The transformer, wholly on the device or streamed to it, as the run that is to come allows."""

    def __init__(
        self,
        path: Path,
        config: MagiConfig,
        precision: Precision,
        attention: str,
        options: MemoryOptions,
        compiled: bool = False,
    ) -> None:
        """Reads headers only; `config` fits the file."""
        super().__init__()
        self.path, self._config = path, config
        self.precision, self.attention, self.compiled = precision, attention, compiled
        with Checkpoint(path) as checkpoint:
            self._sizes = weight_sizes(checkpoint.tensors, config.model, host.device(), precision)
        self._planner = Planner(options)
        self.placement: Placement | None = None  # of the run that is to come

    def plan(self, run: MagiConfig, given: int, may_narrow: bool = False) -> Placement:
        """Returns what goes where in a run, if all that is evictable makes room for it.

        Args:
            run: with its size, length and window.
            given: latent frames of an image or clip that come before what is made.
            may_narrow: a smaller window may be taken where nothing else helps.

        Raises:
            MagiError: the run cannot fit.
        """
        if self.content is not None:
            self._planner.learn(self.content, self._sizes)
        return self._place(run, given, host.usable_memory(), may_narrow)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that are on the device at a time."""
        if self.content is not None:
            return int(self.content.nbytes)
        return self.placement.weight_bytes if self.placement else self._sizes.total

    def fits(self, room: float) -> bool:
        """Whether what is loaded may stay: too many layers can be dropped, a few too few are no reason to read all again."""
        could = len(self._for(room).on_device)
        return len(self.content.blocks.on_device) >= could - max(2, len(self.content.blocks) // 8)

    def read(self, room: float) -> Any:
        """The transformer, as many of its layers on the device as the room allows."""
        return load_transformer(
            self.path,
            self._config,
            host.device(),
            progress=self.progress,
            precision=self.precision,
            attention=self.attention,
            placement=self._for(room),
            compiled=self.compiled,
        )

    def load(self, room: float) -> None:
        """Also has what this run wants and needs no reading: fewer layers on the device, keys elsewhere, other token blocks."""
        before = self.content
        super().load(room)
        wanted, model = self._for(room), self.content
        staying = sorted(model.blocks.on_device)
        if len(staying) > len(wanted.on_device):
            model.blocks.keep_on_device([staying[i] for i in spread(len(staying), len(wanted.on_device))])
        model.cache_device, model.token_block = wanted.cache, wanted.token_block
        if model is before:  # a few layers fewer than there is room for may have been left
            wanted = replace(wanted, on_device=tuple(sorted(model.blocks.on_device)))
        self._planner.begin(replace(wanted, run=self._planned.run))

    def drop(self) -> None:
        """Also learns from how the last run has left it."""
        if self.content is not None:
            self._planner.learn(self.content, self._sizes)
        self._planner.end()
        super().drop()

    def left_with(self, window: int) -> None:
        """Notes that a run had to denoise fewer chunks at a time, so many in the end."""
        self._planner.left_with(window)

    @property
    def _planned(self) -> Placement:
        """Returns the placement of the run that is to come; without one ComfyUI loads it for the model's own settings."""
        if self.placement is None:
            self.placement = self.plan(self._config, 0)
        return self.placement

    def _for(self, room: float) -> Placement:
        """The placement with `room` bytes for weights besides what is spared for the work; the planned one where that is too little."""
        planned, usable = self._planned, host.usable_memory()
        if usable is None:
            return planned
        try:
            return self._place(
                planned.run.config, planned.run.prefix_frames, int(min(usable, room + planned.spare_bytes))
            )
        except MagiError:
            return planned

    def _place(self, run: MagiConfig, given: int, free: int | None, may_narrow: bool = False) -> Placement:
        beside = memory_beside(host.device())
        return self._planner.place(run, self._sizes, free, given, free_host=beside, allow_smaller_window=may_narrow)


@dataclass(frozen=True)
class Model:
    """A transformer and what belongs to it. Nothing of it is loaded before a sampler runs."""

    name: str
    config: MagiConfig
    special_tokens: SpecialTokens | None
    patcher: Managed

    @property
    def transformer(self) -> MagiTransformer:
        """The managed transformer."""
        held = self.patcher.held
        assert isinstance(held, MagiTransformer)  # noqa: S101 (made so)
        return held

    def __repr__(self) -> str:
        return f"MAGI-1 model {self.name!r}"


@dataclass(frozen=True)
class Encoder:
    """A T5 text encoder's files and where to run it; it is loaded for a prompt that is not in the cache, and freed again."""

    path: Path
    tokenizer: Path | None
    device: torch.device
    dtype: torch.dtype


class MagiVideoVAE(Held):
    """The VAE's weights."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        """Finds damaged and wrong files by their header.

        Raises:
            MagiError: the file is not a MAGI-1 VAE.
        """
        super().__init__()
        self._path, self._dtype = path, dtype
        # On the meta device nothing is read, but all that is missing is found.
        self._nbytes = load_vae(path, "meta", dtype).nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self._nbytes

    def fits(self, room: float) -> bool:
        """It has no other way to be loaded."""
        return True

    def read(self, room: float) -> Any:
        """The VAE."""
        return load_vae(self._path, host.vae_device(), self._dtype, self.progress)

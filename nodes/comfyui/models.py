"""What the loaders' outputs carry: files that were checked, and weights that are read when a node needs them."""

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
from ...magi.transformer.weights import Precision
from ...magi.vae.video_vae import load_vae
from . import host
from .families import Family
from .memory import LoadableModel, WholeModelPatcher
from .page_locked import host_room, pin_for


class MagiTransformer(LoadableModel):
    """The transformer, wholly on the device or streamed to it, as the next run's placement has it."""

    def __init__(
        self,
        path: Path,
        config: MagiConfig,
        precision: Precision,
        attention: str,
        options: MemoryOptions,
        compiled: bool = False,
    ) -> None:
        """Reads the header only; `config` must fit the file."""
        super().__init__()
        self.path, self._config = path, config
        self.precision, self.attention, self.compiled = precision, attention, compiled
        with Checkpoint(path) as checkpoint:
            self._sizes = weight_sizes(checkpoint.tensors, config.model, host.device(), precision)
        self._planner = Planner(options)
        self.placement: Placement | None = None  # of the next run

    def plan(self, run: MagiConfig, prefix_frames: int, allow_smaller_window: bool = False) -> Placement:
        """Returns what goes where in a run, given the memory that is free once ComfyUI has evicted all its models.

        Args:
            run: with its size, length and window.
            prefix_frames: latent frames of an image or clip that come before what is made.
            allow_smaller_window: a smaller window may be taken where nothing else helps.

        Raises:
            MagiError: the run cannot fit.
        """
        if self.loaded is not None:
            self._planner.learn(self.loaded, self._sizes)
        return self._place(run, prefix_frames, host.usable_memory(), allow_smaller_window)

    @property
    def nbytes(self) -> int:
        """Returns the bytes of the weights that are on the device at a time, or will be when loaded."""
        if self.loaded is not None:
            return int(self.loaded.nbytes)
        return self.placement.weight_bytes if self.placement else self._sizes.total

    @property
    def host_bytes(self) -> int:
        """Returns the bytes of RAM in which loaded layers wait."""
        return 0 if self.loaded is None else int(self.loaded.blocks.host_bytes)

    @property
    def pinned_bytes(self) -> int:
        """Returns the bytes of them that are page-locked."""
        return 0 if self.loaded is None else int(self.loaded.blocks.pinned_bytes)

    def pin(self) -> None:
        """Page-locks them for a run, after `unpin`."""
        if self.loaded is not None:
            self.loaded.blocks.pin()

    def unpin(self) -> None:
        """Makes them pageable, between two runs."""
        if self.loaded is not None:
            self.loaded.blocks.unpin()

    def fits(self, room: float) -> bool:
        """Returns whether the loaded layers may stay: spare ones can be dropped, and a few missing ones do no harm."""
        wanted = len(self._placement_for(room).on_device)
        return len(self.loaded.blocks.on_device) >= wanted - max(2, len(self.loaded.blocks) // 8)

    def read(self, room: float) -> Any:
        """Returns the transformer, with as many of its layers on the device as `room` bytes allow."""
        return load_transformer(
            self.path,
            self._config,
            host.device(),
            progress=self.progress,
            precision=self.precision,
            attention=self.attention,
            placement=self._placement_for(room),
            compiled=self.compiled,
            pin=pin_for(host.device()),
        )

    def load(self, room: float) -> None:
        """Loads it, and applies what needs no reading: fewer resident layers, where the K/V are, the token block."""
        before = self.loaded
        super().load(room)
        wanted, model = self._placement_for(room), self.loaded
        staying = sorted(model.blocks.on_device)
        if len(staying) > len(wanted.on_device):
            model.blocks.keep_on_device([staying[i] for i in spread(len(staying), len(wanted.on_device))])
        model.cache_device, model.token_block = wanted.cache, wanted.token_block
        if model is before:  # it may have a few layers less on the device than there is room for
            wanted = replace(wanted, on_device=tuple(sorted(model.blocks.on_device)))
        self._planner.begin(replace(wanted, run=self._planned.run))

    def drop(self) -> None:
        """Drops the weights, after learning from the token block and layers that the last run ended with."""
        if self.loaded is not None:
            self._planner.learn(self.loaded, self._sizes)
        self._planner.end()
        super().drop()

    def left_with(self, window: int) -> None:
        """Notes that memory ran out and the run ended with a window of so many chunks."""
        self._planner.left_with(window)

    @property
    def _planned(self) -> Placement:
        """Returns the placement of the next run; without a run, that for the model's own settings."""
        if self.placement is None:
            self.placement = self.plan(self._config, 0)
        return self.placement

    def _placement_for(self, room: float) -> Placement:
        """Returns the placement with `room` bytes for weights beside working memory; the planned one if none fits."""
        planned, usable = self._planned, host.usable_memory()
        if usable is None:
            return planned
        try:
            return self._place(
                planned.run.config, planned.run.prefix_frames, int(min(usable, room + planned.spare_bytes))
            )
        except MagiError:
            return planned

    def _place(
        self, run: MagiConfig, prefix_frames: int, free: int | None, allow_smaller_window: bool = False
    ) -> Placement:
        beside = host_room(host.device())
        beside = None if beside is None else beside + self.host_bytes  # its own layers there may stay
        return self._planner.place(
            run, self._sizes, free, prefix_frames, free_host=beside, allow_smaller_window=allow_smaller_window
        )


@dataclass(frozen=True)
class Model:
    """A transformer and what belongs to it. Nothing of it is loaded before a sampler runs."""

    name: str
    config: MagiConfig
    special_tokens: SpecialTokens | None
    patcher: WholeModelPatcher
    family: Family | None = None

    @property
    def transformer(self) -> MagiTransformer:
        """Returns the transformer that the patcher loads and drops."""
        transformer = self.patcher.loadable
        assert isinstance(transformer, MagiTransformer)  # noqa: S101 (the loader node makes it so)
        return transformer

    def __repr__(self) -> str:
        return f"MAGI-1 model {self.name!r}"


@dataclass(frozen=True)
class Encoder:
    """A T5 text encoder's files and where to run it; it is loaded for prompts that are not in the cache, and freed."""

    path: Path
    tokenizer: Path | None
    device: torch.device
    dtype: torch.dtype
    family: Family | None = None


class MagiVideoVAE(LoadableModel):
    """The VAE's weights."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        """Reads the header only.

        Raises:
            MagiError: the file is damaged or not a MAGI-1 VAE.
        """
        super().__init__()
        self._path, self._dtype = path, dtype
        # On the meta device no weights are read, but missing tensors are found.
        header = load_vae(path, "meta", dtype)
        self._nbytes, self.config = header.nbytes, header.config

    @property
    def nbytes(self) -> int:
        """Returns the bytes of the weights."""
        return self._nbytes

    def fits(self, room: float) -> bool:
        """Returns True: there is only one way to load it."""
        return True

    def read(self, room: float) -> Any:
        """Returns the VAE on the device."""
        return load_vae(self._path, host.vae_device(), self._dtype, self.progress)

"""What the loaders hand on: files that were found and checked, and weights that are read when a node needs them."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import host
from .managed import Held, Managed

if TYPE_CHECKING:
    from ..magi.config import MagiConfig
    from ..magi.memory import MemoryOptions, Placement
    from ..magi.special_tokens import SpecialTokens


class MagiTransformer(Held):
    """The transformer, wholly on the device or streamed to it, as the run that is to come allows."""

    def __init__(
        self, path: Path, config: "MagiConfig", precision: str, attention: str, options: "MemoryOptions"
    ) -> None:
        """Reads headers only; `config` fits the file."""
        from ..magi.checkpoint import Checkpoint
        from ..magi.memory import weight_sizes

        super().__init__()
        self._path, self._config = path, config
        self._precision, self._attention, self._options = precision, attention, options
        with Checkpoint(path) as checkpoint:
            self._sizes = weight_sizes(checkpoint.tensors, config.model, host.device(), precision)
        self._run, self._given_chunks = config, 0
        self._loaded: Placement | None = None
        self.placement: Placement | None = None  # of the run that is to come

    def plan(self, run: "MagiConfig", given_chunks: int) -> "Placement":
        """What goes where in a run, if all that is evictable makes room for it.

        Raises:
            MagiError: the run cannot fit.
        """
        self._run, self._given_chunks = run, given_chunks
        self.placement = self._place(host.usable_memory())
        return self.placement

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that are on the device at a time."""
        placement = self._loaded or self.placement
        return placement.weight_bytes if placement else self._sizes.total

    def fits(self, room: float) -> bool:
        """Whether weights that were placed for another run suit this one."""
        wanted = self._for(room)
        return self._loaded is not None and wanted.streaming == self._loaded.streaming

    def read(self, room: float) -> Any:
        """The transformer, streamed if the room asks for it."""
        from ..magi.load import load_transformer

        placement = self._for(room)
        transformer = load_transformer(
            self._path,
            self._config,
            host.device(),
            offload=placement.streaming,
            progress=self.progress,
            precision=self._precision,
            attention=self._attention,
            pinned=placement.pinned,
        )
        self._loaded = placement
        return transformer

    def load(self, room: float) -> None:
        """Also has the keys kept where this run wants them, which needs no reading."""
        super().load(room)
        self.content.cache_device = self._for(room).cache

    def drop(self) -> None:
        """Lets go of the weights."""
        super().drop()
        self._loaded = None

    def _for(self, room: float) -> "Placement":
        """The placement with `room` bytes for weights besides what is spared for the work; the planned one where that is too little."""
        from ..magi.errors import MagiError

        planned = self.placement or self.plan(self._config, 0)
        usable = host.usable_memory()
        if usable is None:
            return planned
        try:
            return self._place(int(min(usable, room + planned.spare_bytes)))
        except MagiError:
            return planned

    def _place(self, free: int | None) -> "Placement":
        from ..magi.memory import place

        return place(self._run, self._sizes, free, self._options, self._given_chunks)


@dataclass(frozen=True)
class Model:
    """A transformer and what belongs to it. Nothing of it is loaded before a sampler runs."""

    name: str
    config: "MagiConfig"
    special_tokens: "SpecialTokens | None"
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
    nbytes: int


class MagiVideoVAE(Held):
    """The VAE's weights."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        """Finds damaged and wrong files by their header.

        Raises:
            MagiError: the file is not a MAGI-1 VAE.
        """
        from ..magi.vae import load_vae

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
        from ..magi.vae import load_vae

        return load_vae(self._path, host.vae_device(), self._dtype, self.progress)

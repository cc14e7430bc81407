"""Our models as ComfyUI's memory manager sees them: it loads and evicts them, and knows the bytes that they take.

Since 0.16 ComfyUI's own models are "dynamic": their weights give way page by page when torch allocates memory, so that
loading a dynamic model evicts no other one. Ours are both. While one is being loaded it says that it is dynamic: the
others need not be unloaded for it, as they give way. From then on it says that it is not, since its weights are
ordinary memory that does not give way by itself: so ComfyUI evicts it when others need the room.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch

from ...magi.system.progress import OnProgress
from . import host


class LoadableModel(torch.nn.Module, ABC):
    """A model that ComfyUI loads or drops as a whole; which of its weights are streamed is decided by the pipeline."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")  # where ComfyUI takes the weights to be
        self.progress: OnProgress | None = None
        self._loaded: list[Any] = []  # in a list, so that a torch module does not become a submodule of this one

    @property
    def loaded(self) -> Any:
        """Returns the loaded model, or None."""
        return self._loaded[0] if self._loaded else None

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Returns the bytes of device memory that its weights take, or would take when loaded."""

    @property
    def host_bytes(self) -> int:
        """Returns the bytes of RAM that the loaded model's weights take beside those on the device."""
        return 0

    @property
    def pinned_bytes(self) -> int:
        """Returns the bytes of RAM that the loaded model has page-locked."""
        return 0

    def unpin(self) -> None:
        """Makes page-locked RAM pageable, between two runs."""

    @abstractmethod
    def fits(self, room: float) -> bool:
        """Returns whether the loaded model may stay when it can have `room` bytes; called only when one is loaded."""

    @abstractmethod
    def read(self, room: float) -> Any:
        """Returns the model, read into at most `room` bytes of the device as far as possible."""

    def load(self, room: float) -> None:
        """Reads the model, unless it is loaded and may stay."""
        if self._loaded and not self.fits(room):
            self.drop()
        if not self._loaded:
            # Weights made in inference mode, in which ComfyUI runs its nodes, could not be used outside it.
            with torch.inference_mode(False):
                self._loaded = [self.read(room)]

    def drop(self) -> None:
        """Drops the weights, whose memory is free at once."""
        self._loaded = []


class WholeModelPatcher(comfy.model_patcher.ModelPatcher):
    """The ModelPatcher of a `LoadableModel`: it has no patches, and is loaded and evicted as a whole."""

    def __init__(
        self,
        model: LoadableModel,
        load_device: torch.device | None = None,
        offload_device: torch.device | None = None,
        size: int = 0,
        weight_inplace_update: bool = False,
    ) -> None:
        """Takes ComfyUI's arguments; `size` means nothing, as the model is asked for its size each time."""
        super().__init__(model, load_device or host.device(), offload_device or torch.device("cpu"), 1)
        self.loading = False

    @property
    def loadable(self) -> LoadableModel:
        """Returns the model that this loads and drops."""
        return self.model

    def model_size(self) -> int:
        """Returns the bytes that it takes on the device when loaded."""
        return self.loadable.nbytes

    def loaded_size(self) -> int:
        """Returns the bytes that it takes on the device now."""
        return self.loadable.nbytes if self.loadable.loaded is not None else 0

    def loaded_ram_size(self) -> int:
        """Returns the bytes of RAM that it takes now."""
        return self.loadable.host_bytes

    def pinned_memory_size(self) -> int:
        """Returns the bytes of RAM that it has page-locked, which it does only while a sampler runs."""
        return self.loadable.pinned_bytes

    def partially_unload_ram(self, ram_to_unload: float, *args: Any, **kwargs: Any) -> int:
        """Makes its page-locked RAM pageable, however little is asked for; returns its bytes."""
        unpinned = self.loadable.pinned_bytes
        self.loadable.unpin()
        return unpinned

    def is_dynamic(self) -> bool:
        """Returns whether other models need not be unloaded for this one; see the top of this file."""
        return self.loading and host.frees_on_demand()

    def current_loaded_device(self) -> torch.device:
        """Returns the device that ComfyUI takes the weights to be on."""
        return self.load_device if self.loadable.loaded is not None else self.offload_device

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> float:
        """Loads the model into the bytes that it takes now and `extra_memory` more; returns its growth in bytes.

        Where other models give way on demand, what is free now says nothing: it may take what it was planned to.
        """
        before = self.loaded_size()
        self.loadable.load(math.inf if self.is_dynamic() else before + extra_memory)
        self.loadable.device = device_to
        self.loading = False
        return self.loaded_size() - before

    def partially_unload(
        self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> float:
        """Returns 0 bytes freed: no part can be evicted alone, so ComfyUI detaches the whole."""
        return 0

    def detach(self, unpatch_all: bool = True) -> LoadableModel:
        """Drops the weights, unless `unpatch_all` is False, with which ComfyUI detaches models that stay loaded."""
        if unpatch_all:
            self.loadable.drop()
            self.loadable.device = self.offload_device
        return self.loadable

    def patch_model(self, *args: Any, **kwargs: Any) -> LoadableModel:
        """Returns the model as it is: there is nothing to patch."""
        return self.loadable

    def unpatch_model(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: there is nothing to unpatch."""

    def clone(self, *args: Any, **kwargs: Any) -> "WholeModelPatcher":
        """Returns itself: without patches a clone could not differ."""
        return self

    def clone_has_same_weights(self, clone: object, *args: Any, **kwargs: Any) -> bool:
        """Returns whether `clone` is this one, of which there are no others."""
        return clone is self


def load(*models: WholeModelPatcher, working: int = 0, progress: OnProgress | None = None) -> list[Any]:
    """Returns the models loaded to the device, with `working` bytes free there; ComfyUI evicts others for that.

    `progress` is called with (tensors or layers loaded, all of them) while weights are read; what it raises ends the
    loading.
    """
    for model in models:
        model.loadable.progress, model.loading = progress, True
    try:
        comfy.model_management.load_models_gpu(list(models), memory_required=working)
    except BaseException:
        # ComfyUI takes models off its list while it loads them: what is no longer on it would never be evicted.
        known = comfy.model_management.loaded_models()
        for model in models:
            if not any(model is other for other in known):
                model.detach()
        host.release()
        raise
    finally:
        for model in models:
            model.loadable.progress, model.loading = None, False
    return [model.loadable.loaded for model in models]

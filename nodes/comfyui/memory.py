"""Our models as ComfyUI's memory manager sees them: it loads and evicts them, and knows the bytes that they take."""

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

    def current_loaded_device(self) -> torch.device:
        """Returns the device that ComfyUI takes the weights to be on."""
        return self.load_device if self.loadable.loaded is not None else self.offload_device

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> float:
        """Loads the model into the bytes that it takes now and `extra_memory` more; returns its growth in bytes."""
        before = self.loaded_size()
        self.loadable.load(before + extra_memory)
        self.loadable.device = device_to
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


def load(*models: WholeModelPatcher, working: int = 0, progress: OnProgress | None = None) -> list[Any]:
    """Returns the models loaded to the device, with `working` bytes free there; ComfyUI evicts others for that.

    `progress` is called with (tensors or layers loaded, all of them) while weights are read; what it raises ends the
    loading.
    """
    for model in models:
        model.loadable.progress = progress
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
            model.loadable.progress = None
    return [model.loadable.loaded for model in models]

"""Our models as ComfyUI's memory manager sees them: it loads them, evicts them, and is told what they truly take."""

from abc import ABC, abstractmethod
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch

from ...magi.system.progress import OnProgress
from . import host


class Held(torch.nn.Module, ABC):
    """Weights that are on the device as a whole, or not at all; where they go in between is the pipeline's own affair."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")  # where ComfyUI takes the weights to be
        self.progress: OnProgress | None = None
        self._slot: list[Any] = []  # a list, so that a torch module in it does not become a part of this one

    @property
    def content(self) -> Any:
        """The loaded model, or None."""
        return self._slot[0] if self._slot else None

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of device memory it takes, or would take, when loaded."""

    @abstractmethod
    def fits(self, room: float) -> bool:
        """Whether what is loaded may stay as it is when it can have `room` bytes; called only when something is."""

    @abstractmethod
    def read(self, room: float) -> Any:
        """The model, read into at most `room` bytes of the device as far as possible."""

    def load(self, room: float) -> None:
        """Reads the model unless it is there and may stay."""
        if self._slot and not self.fits(room):
            self.drop()
        if not self._slot:
            # Weights made in inference mode, in which ComfyUI runs its nodes, could not be used outside it.
            with torch.inference_mode(False):
                self._slot = [self.read(room)]

    def drop(self) -> None:
        """Lets go of the weights; what they take is free at once."""
        self._slot = []


class Managed(comfy.model_patcher.ModelPatcher):
    """A `Held` in ComfyUI's terms. There is nothing to patch, and no part of it can be loaded or evicted alone."""

    def __init__(
        self,
        model: Held,
        load_device: torch.device | None = None,
        offload_device: torch.device | None = None,
        size: int = 0,
        weight_inplace_update: bool = False,
    ) -> None:
        """As ComfyUI makes patchers; the size is asked for anew each time."""
        super().__init__(model, load_device or host.device(), offload_device or torch.device("cpu"), 1)

    @property
    def held(self) -> Held:
        """What is managed."""
        return self.model

    def model_size(self) -> int:
        """Bytes on the device when loaded."""
        return self.held.nbytes

    def loaded_size(self) -> int:
        """Bytes on the device now."""
        return self.held.nbytes if self.held.content is not None else 0

    def current_loaded_device(self) -> torch.device:
        """Where ComfyUI takes the weights to be."""
        return self.load_device if self.held.content is not None else self.offload_device

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> float:
        """Loads it; `extra_memory` is what may be used beyond what is used already. Returns by how much that grew."""
        before = self.loaded_size()
        self.held.load(before + extra_memory)
        self.held.device = device_to
        return self.loaded_size() - before

    def partially_unload(
        self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> float:
        """Nothing: no part can go alone. ComfyUI then detaches the whole."""
        return 0

    def detach(self, unpatch_all: bool = True) -> Held:
        """Drops the weights; `unpatch_all` False is asked of models that stay."""
        if unpatch_all:
            self.held.drop()
            self.held.device = self.offload_device
        return self.held

    def patch_model(self, *args: Any, **kwargs: Any) -> Held:
        """There is nothing to patch."""
        return self.held

    def unpatch_model(self, *args: Any, **kwargs: Any) -> None:
        """There is nothing to patch."""

    def clone(self, *args: Any, **kwargs: Any) -> "Managed":
        """Without patches a clone could not differ."""
        return self


def load(*models: Managed, working: int = 0, progress: OnProgress | None = None) -> list[Any]:
    """What the models hold, on the device, with `working` bytes to spare there; other models make room.

    `progress(parts placed, parts)` is called while weights are read; what it raises ends that.
    """
    for model in models:
        model.held.progress = progress
    try:
        comfy.model_management.load_models_gpu(list(models), memory_required=working)
    except BaseException:
        # Those that ComfyUI had taken off its list for the time of loading are not to stay behind unseen.
        known = comfy.model_management.loaded_models()
        for model in models:
            if not any(model is other for other in known):
                model.detach()
        host.release()
        raise
    finally:
        for model in models:
            model.held.progress = None
    return [model.held.content for model in models]

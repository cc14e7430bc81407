"""Page-locked memory through ComfyUI's account of it: its models and ours share what the system allows."""

import logging
from collections.abc import Callable
from typing import Any

import comfy
import comfy.model_management
import torch

from ...magi.offload.pinned_memory import Pin
from ...magi.system.host_memory import memory_beside
from . import host

_LEAST_HEADROOM = 2 << 30  # RAM that ComfyUI keeps free when it page-locks its own models


def pin_for(device: torch.device) -> Pin | None:
    """Returns what page-locks memory for a device; None where ComfyUI has no account, and we page-lock ourselves."""
    needed = ("pin_memory", "unpin_memory", "MAX_PINNED_MEMORY", "TOTAL_PINNED_MEMORY")
    if device.type != "cuda" or not all(hasattr(comfy.model_management, name) for name in needed):
        return None
    return _Account(device)


def host_room(device: torch.device) -> int | None:
    """Returns the bytes of RAM that layers and K/V for a device may take; None where the file is read just as fast.

    ComfyUI keeps a headroom of RAM free and page-locks up to a limit; its own models that are not at work give way.
    """
    room = memory_beside(device)
    if room is None or pin_for(device) is None:
        return room
    management: Any = comfy.model_management
    others = [model for model in management.loaded_models() if model is not None and host.is_dynamic(model)]
    if hasattr(management, "ensure_pin_budget") and not _keeps_all():
        memory = getattr(comfy, "memory_management", None)
        headroom = max(getattr(memory, "RAM_CACHE_HEADROOM", 0) // 2, _LEAST_HEADROOM)
        room += sum(model.loaded_ram_size() for model in others if hasattr(model, "loaded_ram_size")) - headroom
    limit = management.MAX_PINNED_MEMORY - management.TOTAL_PINNED_MEMORY
    limit += sum(model.pinned_memory_size() for model in others if hasattr(model, "pinned_memory_size"))
    return max(0, int(min(room, limit)))


def _keeps_all() -> bool:
    """Returns whether ComfyUI was started with --high-ram: it keeps no headroom."""
    return bool(getattr(getattr(comfy.model_management, "args", None), "high_ram", False))


class _Account:
    """Page-locks a tensor's memory in ComfyUI's account when called, and returns what undoes it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._filled: set[int] = set()  # addresses that were page-locked before: their RAM is taken already

    def __call__(self, data: torch.Tensor) -> Callable[[], None]:
        """Page-locks. Raises RuntimeError if ComfyUI refuses."""
        management: Any = comfy.model_management
        if management.MAX_PINNED_MEMORY <= 0:
            raise RuntimeError("ComfyUI page-locks no memory here, or was told not to")
        more = 0 if data.data_ptr() in self._filled else data.nbytes
        # Its idle models give way; newer ComfyUIs only.
        for ensure, nbytes in (("ensure_pin_budget", more), ("ensure_pin_registerable", data.nbytes)):
            if nbytes and hasattr(management, ensure) and not getattr(management, ensure)(nbytes):
                raise RuntimeError(f"ComfyUI's limits leave no room for {data.nbytes / 1e9:.1f} GB more")
        owner = torch.nn.Parameter(data, requires_grad=False)  # older ComfyUIs page-lock parameters only
        if not management.pin_memory(owner):
            raise RuntimeError(f"ComfyUI page-locks no {data.nbytes / 1e9:.1f} GB more")
        self._filled.add(data.data_ptr())

        def unpin() -> None:
            torch.cuda.synchronize(self._device)
            if not management.unpin_memory(owner):
                logging.warning("MAGI-1: ComfyUI could not undo the page-locking of memory.")

        return unpin

"""Everything that is asked of ComfyUI: folders, device, progress, previews and interrupts."""

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths

FOLDER = "magi1"  # below ComfyUI's models/: the tree that `python -m magi download` makes
_PREVIEW_SIZE = 512
_SHARES = {"text": 0.05, "prefix": 0.02, "load": 0.03, "sample": 0.9}  # of the bar, in the order of the work
_STEPS = 1000


def models_folder() -> Path:
    """Where MAGI-1's files are expected."""
    return Path(folder_paths.models_dir) / FOLDER


def cache_folder() -> Path:
    """Where embeddings and the embedded model are kept."""
    return Path(folder_paths.get_user_directory()) / FOLDER


def make_room() -> Any:
    """Frees the device of other models and returns it."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    return comfy.model_management.get_torch_device()


def check_interrupt() -> None:
    """Raises ComfyUI's own exception if the user has cancelled."""
    comfy.model_management.throw_exception_if_processing_interrupted()


class NodeProgress:
    """ComfyUI's bar over all stages of a run, with finished frames as the preview; every call asks for a cancel."""

    def __init__(self, node_id: str | None) -> None:
        """`node_id` is the node that runs."""
        self._bar = comfy.utils.ProgressBar(_STEPS, node_id=node_id)
        self._at = 0

    def __call__(self, stage: Any) -> None:
        """Moves the bar; decoding happens between samples and leaves it where it is."""
        check_interrupt()
        if stage.name in _SHARES:
            names = list(_SHARES)
            before = sum(_SHARES[name] for name in names[: names.index(stage.name)])
            at = int(_STEPS * (before + _SHARES[stage.name] * stage.done / max(stage.total, 1e-9)))
            if at > self._at:
                self._at = at
                self._bar.update_absolute(at, _STEPS)

    def show(self, frame: Any) -> None:
        """Shows a finished frame, uint8 (H, W, 3)."""
        from PIL import Image

        self._bar.update_absolute(self._at, _STEPS, ("JPEG", Image.fromarray(frame.numpy()), _PREVIEW_SIZE))

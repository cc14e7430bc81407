"""Everything that is asked of ComfyUI: folders, device, memory manager, progress, previews and interrupts."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy
import comfy.model_management
import comfy.utils
import folder_paths
import torch
from PIL import Image
from server import PromptServer

from ...magi.errors import MagiError
from ...magi.system.device import is_out_of_memory

Interrupted = comfy.model_management.InterruptProcessingException  # raised where the user has cancelled
FOLDER = "magi1"  # below ComfyUI's models/: the tree that `python -m magi download` makes
_PREVIEW_SIZE = 512
_POLL_SECONDS = 0.01  # of the flag for a cancel


# -- folders -----------------------------------------------------------------------------------------------------------


def register_folder() -> None:
    """Registers models/magi1 with ComfyUI, beside the folders that extra_model_paths.yaml names for it."""
    default = str(home())
    paths, extensions = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
    paths = [*paths, *([] if default in paths else [default])]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {*extensions, ".safetensors"})


def home() -> Path:
    """Returns the folder that MAGI-1's files belong in."""
    return Path(folder_paths.models_dir) / FOLDER


def model_folders(kind: str = FOLDER) -> list[Path]:
    """Returns the folders in which ComfyUI finds models of a kind."""
    return [Path(p) for p in folder_paths.get_folder_paths(kind)]


def model_names(kind: str) -> list[str]:
    """Returns the files in those folders, relative to them, with forward slashes on every system."""
    return [name.replace("\\", "/") for name in folder_paths.get_filename_list(kind)]


def cache_folder() -> Path:
    """Returns the folder in which embeddings, unfinished runs and the embedded photo model are kept."""
    return Path(folder_paths.get_user_directory()) / FOLDER


def temp_folder() -> Path:
    """Returns the folder for files that ComfyUI removes when it ends."""
    return Path(folder_paths.get_temp_directory())


def t5_tokenizer() -> Path:
    """Returns the folder of the T5 tokenizer that ComfyUI ships for its own text encoders."""
    return Path(comfy.model_management.__file__).parent / "text_encoders" / "t5_tokenizer"


# -- device and memory -------------------------------------------------------------------------------------------------


def device() -> torch.device:
    """Returns the device that ComfyUI computes on."""
    return comfy.model_management.get_torch_device()


def vae_device() -> torch.device:
    """Returns the device that ComfyUI computes VAEs on: the same, unless it was started with --cpu-vae."""
    return comfy.model_management.vae_device()


def usable_memory() -> int | None:
    """Returns the device memory in bytes that is free if ComfyUI evicts all models, less its reserve; None on a CPU."""
    where = device()
    if where.type == "cpu":
        return None
    models = [m for m in comfy.model_management.loaded_models() if m is not None]  # None: dropped, not yet cleared away
    evictable = sum(model.loaded_size() for model in models if model.load_device == where)
    return int(
        comfy.model_management.get_free_memory(where) + evictable - comfy.model_management.extra_reserved_memory()
    )


def make_room(nbytes: int) -> None:
    """Has ComfyUI evict models until `nbytes` of device memory are free, or given way to on demand."""
    on_demand = {"for_dynamic": True} if frees_on_demand() else {}
    comfy.model_management.free_memory(nbytes, device(), **on_demand)


def frees_on_demand() -> bool:
    """Returns whether ComfyUI's own models give way at the moment that torch allocates memory ("dynamic VRAM")."""
    return device().type == "cuda" and bool(getattr(getattr(comfy, "memory_management", None), "aimdo_enabled", False))


def is_dynamic(patcher: Any) -> bool:
    """Returns whether a ModelPatcher is one of those that give way on demand; older ComfyUIs have none."""
    return hasattr(patcher, "is_dynamic") and bool(patcher.is_dynamic())


@contextmanager
def device_work(what: str, remedy: str) -> Iterator[None]:
    """Wraps heavy work: turns running out of memory into a clear error, and empties torch's cache at the end.

    Raises:
        MagiError: the device ran out of memory doing `what`; it names the `remedy`.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MagiError(f"{device()} ran out of memory {what}. {remedy}") from error
    finally:
        release()


def release() -> None:
    """Gives memory that torch has cached but does not use back to the device."""
    comfy.model_management.soft_empty_cache()


# -- progress ----------------------------------------------------------------------------------------------------------


def check_interrupt() -> None:
    """Raises `Interrupted` if the user has cancelled.

    ComfyUI's flag stays set until the next run, for nodes that run beside this one.
    """
    if comfy.model_management.processing_interrupted():
        raise Interrupted


@contextmanager
def interrupt_watched() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether the user has cancelled, for work in a thread beside other nodes.

    ComfyUI clears its flag once one node has raised for it. This polls it more often than nearly any node does, and
    remembers.
    """
    cancelled, over = threading.Event(), threading.Event()

    def watch() -> None:
        while not over.wait(_POLL_SECONDS):
            if comfy.model_management.processing_interrupted():
                cancelled.set()

    threading.Thread(target=watch, name="magi-interrupt", daemon=True).start()
    try:
        yield cancelled.is_set
    finally:
        over.set()


def show_progress(node_id: str | None, value: int, total: int, picture: torch.Tensor | None = None) -> None:
    """Moves a node's bar, with a picture, uint8 (H, W, 3), as its preview."""
    preview = None
    if picture is not None:
        preview = ("JPEG", Image.fromarray(picture.numpy()), _PREVIEW_SIZE)
    try:
        comfy.utils.ProgressBar(total, node_id=node_id).update_absolute(value, total, preview)
    except Interrupted:  # ComfyUI checks for a cancel here, too, and has cleared its flag: set it again
        comfy.model_management.interrupt_current_processing()
        raise


def show_text(node_id: str | None, text: str) -> dict[str, list[str]]:
    """Writes a line under a node; returns it as the UI output of a node that ends with it.

    Newer front ends take the line away when the job ends. The UI output stays: with the node, and in the job's history.
    """
    if node_id is not None and getattr(PromptServer, "instance", None) is not None:
        PromptServer.instance.send_progress_text(text, node_id)
    return {"text": [text]}

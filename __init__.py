"""MAGI-1 for ComfyUI: registers the nodes, nothing else."""

from typing import Any

from .nodes.comfyui.requirements import check_comfyui, check_packages

check_comfyui()  # here: a ComfyUI without the V3 interface does not know `comfy_entrypoint`

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """Returns the extension with the nodes. ComfyUI logs an error from here as one line, and starts without them."""
    check_packages()
    from .nodes.extension import comfy_entrypoint as nodes

    return await nodes()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

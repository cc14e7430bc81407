"""The nodes: a thin layer between ComfyUI and the pipeline in `magi/`."""

from .extension import comfy_entrypoint

__all__ = ["comfy_entrypoint"]

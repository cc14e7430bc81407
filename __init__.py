"""MAGI-1 for ComfyUI: registers the nodes, nothing else."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]

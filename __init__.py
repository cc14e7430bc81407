"""MAGI-1 for ComfyUI: registers the nodes, nothing else."""

# Imported by ComfyUI this folder is a package; test collectors and the command line, which run from inside it, import it bare.
if __package__:
    from .nodes import comfy_entrypoint

    __all__ = ["comfy_entrypoint"]

"""What ComfyUI asks the pack for: its list of nodes."""

from comfy_api.latest import ComfyExtension, io

from .generate import Magi1Generate


class Magi1Extension(ComfyExtension):
    """The pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All of them."""
        return [Magi1Generate]


async def comfy_entrypoint() -> Magi1Extension:
    """Called once by ComfyUI."""
    return Magi1Extension()

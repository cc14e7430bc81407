"""What ComfyUI asks the pack for: its list of nodes."""

from comfy_api.latest import ComfyExtension, io

from .comfyui import host
from .comfyui.replacements import register_replacements
from .conditioning import Magi1ImageToVideo, Magi1TextToVideo, Magi1VideoToVideo
from .decode import Magi1VAEDecode
from .demo import Magi1DemoImage
from .loaders import Magi1MemoryOptions, Magi1ModelLoader, Magi1TextEncoderLoader, Magi1VAELoader
from .remote import Magi1Remote
from .sampler import Magi1Sampler
from .text import Magi1TextEncode


class Magi1Extension(ComfyExtension):
    """The pack's nodes."""

    async def on_load(self) -> None:
        """Offers ours for nodes of the model authors' pack; older ComfyUIs do not call this."""
        await register_replacements()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Returns the classes of all nodes, in the order of the menu."""
        return [
            Magi1ModelLoader,
            Magi1MemoryOptions,
            Magi1VAELoader,
            Magi1TextEncoderLoader,
            Magi1TextEncode,
            Magi1TextToVideo,
            Magi1ImageToVideo,
            Magi1VideoToVideo,
            Magi1Sampler,
            Magi1VAEDecode,
            Magi1DemoImage,
            Magi1Remote,
        ]


async def comfy_entrypoint() -> Magi1Extension:
    """Registers the folder for models and returns the list of nodes; ComfyUI calls it once."""
    host.register_folder()
    return Magi1Extension()

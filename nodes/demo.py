"""A picture to try the other nodes with."""

from comfy_api.latest import io

from ..magi.media.image import read_image
from ..magi.model_files.embedded import DEMO_IMAGE
from .comfyui import media, schema


class Magi1DemoImage(io.ComfyNode):
    """The photo that the pack brings with it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns the node's inputs and outputs."""
        return schema.schema(
            node_id="Magi1DemoImage",
            display_name="MAGI-1 Demo Image",
            aliases=["example image", "cat"],
            description="A photo of a cat (Chelsea, by Stéfan van der Walt, CC0), so that a first try needs no file.",
            inputs=[],
            outputs=[io.Image.Output(display_name="image")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """Returns the photo as an IMAGE batch of one."""
        return io.NodeOutput(media.images_of(read_image(DEMO_IMAGE)))

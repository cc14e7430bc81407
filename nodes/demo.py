"""A picture to try the other nodes with."""

from comfy_api.latest import io

from ..magi.media.image import read_image
from ..magi.model_files.embedded import DEMO_IMAGE, DEMO_SHAPE
from .comfyui import media, schema

_SHAPE, _CAT = "moving shape", "cat photo"
_PICTURES = {_SHAPE: DEMO_SHAPE, _CAT: DEMO_IMAGE}


class Magi1DemoImage(io.ComfyNode):
    """The pictures that the pack brings with it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns the node's inputs and outputs."""
        return schema.schema(
            node_id="Magi1DemoImage",
            display_name="MAGI-1 Demo Image",
            aliases=["example image", "cat", "star"],
            description="A picture, so that a first try needs no file.",
            inputs=[
                io.Combo.Input(
                    "picture",
                    options=list(_PICTURES),
                    default=_SHAPE,
                    # A graph from before there was a choice lacks it: ComfyUI would refuse that if it were required.
                    optional=True,
                    tooltip="moving shape: a yellow star on dark blue, for the embedded demo model. cat photo: Chelsea, by Stéfan van der Walt (CC0), for the other models.",
                )
            ],
            outputs=[io.Image.Output(display_name="image")],
        )

    @classmethod
    def execute(cls, picture: str = _CAT) -> io.NodeOutput:
        """Returns the picture as an IMAGE batch of one; without a choice the cat, which once was the only one."""
        return io.NodeOutput(media.images_of(read_image(_PICTURES[picture])))

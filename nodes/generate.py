"""One node that does it all: prompt and picture in, video out."""

from fractions import Fraction
from typing import Any

from comfy_api.latest import InputImpl, Types, io

from . import host

EMBEDDED = "embedded demo model"


class Magi1Generate(io.ComfyNode):
    """Text or image to video with a model of the official folder tree."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="Magi1Generate",
            display_name="MAGI-1 Generate (all in one)",
            category="MAGI-1",
            description="Makes a video from a prompt, and from a picture if there is one. Nothing stays loaded afterwards.",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=[EMBEDDED, *_models()],
                    tooltip=(
                        "Models found in ComfyUI/models/magi1. The embedded one needs no download and only shows that "
                        "everything works."
                    ),
                ),
                io.String.Input("prompt", multiline=True, default="A cat looks around", tooltip="What to show."),
                io.Image.Input("image", optional=True, tooltip="The picture to start from. Without it: text to video."),
                io.Float.Input(
                    "seconds",
                    default=4.0,
                    min=1.0,
                    max=600.0,
                    step=1.0,
                    tooltip="Length. A chunk is one second, 24 frames.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=True,
                    tooltip="Another number, another video.",
                ),
                *(
                    io.Int.Input(
                        side,
                        default=0,
                        min=0,
                        max=4096,
                        step=16,
                        tooltip="In pixels, a multiple of 16; 0: the model's, in the picture's shape.",
                    )
                    for side in ("width", "height")
                ),
                io.Int.Input(
                    "steps", default=0, min=0, max=256, tooltip="Denoising steps a chunk; 0: the model's own."
                ),
            ],
            outputs=[io.Image.Output(display_name="frames"), io.Video.Output(display_name="video")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: str,
        prompt: str,
        seconds: float,
        seed: int,
        width: int,
        height: int,
        steps: int,
        image: Any = None,
    ) -> io.NodeOutput:
        """Runs it."""
        import torch

        from ..magi import EmbeddingCache, MagiPipeline
        from ..magi.model_files import find_files
        from ..magi.pipeline import Request

        options = {"device": host.make_room(), "cache": EmbeddingCache(host.cache_folder() / "text")}
        if model == EMBEDDED:
            pipeline = MagiPipeline.embedded(host.cache_folder(), **options)
        else:
            pipeline = MagiPipeline.from_files(**vars(find_files(host.models_folder(), model)), **options)
        request = Request(
            prompt=prompt,
            image=None if image is None else (image[:1] * 255).round().clamp(0, 255).to(torch.uint8).cpu(),
            seconds=seconds,
            seed=seed,
            width=width or None,
            height=height or None,
            num_steps=steps or None,
        )
        plan = pipeline.plan(request)
        progress = host.NodeProgress(cls.hidden.unique_id)
        size = (plan.config.runtime.video_size_h, plan.config.runtime.video_size_w)
        frames = torch.empty(plan.frames, *size, 3)
        for clip in pipeline.run(plan, progress):
            frames[clip.first_frame : clip.first_frame + len(clip.frames)] = clip.frames.float() / 255
            progress.show(clip.frames[-1])
        components = Types.VideoComponents(images=frames, frame_rate=Fraction(plan.config.runtime.fps))
        return io.NodeOutput(frames, InputImpl.VideoFromComponents(components))


def _models() -> list[str]:
    """Released models of which there is a folder."""
    folder = host.models_folder() / "ckpt" / "magi"
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []

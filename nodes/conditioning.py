"""What a video starts from: a size, a picture, or the end of a clip. Each gives a LATENT for the sampler."""

from typing import Any

import torch
from comfy_api.latest import io

from ..magi.config import FPS, LATENT_CHANNELS, SPATIAL_DOWNSAMPLE
from ..magi.errors import MagiError
from ..magi.media.frames import check_size, clip_end, complete_size, nearest_size, size_for, to_model
from ..magi.media.frames import fit as fit_frames
from ..magi.vae.tiling import Tiling
from .comfyui import host, media, schema
from .comfyui.families import embedded_size, latent_of, size_notice
from .comfyui.graph import graph_of
from .comfyui.preflight import check_loaders
from .comfyui.progress import NodeProgress
from .comfyui.vae import magi_vae

_SIZES = ["720p", "540p", "480p", "360p", "256p"]
_FROM_IMAGE = "from image"
_SHAPES = {"16:9": 16 / 9, "9:16": 9 / 16, "1:1": 1.0, "4:3": 4 / 3, "3:4": 3 / 4, "21:9": 21 / 9}
_SIZE_TIP = (
    "A number of pixels, whatever the shape: 720p is 1280x720 in 16:9. Time and memory grow with it; 540p has as many "
    "pixels as the 720x720 that the 4.5B models are at home at."
)


def _sides() -> list[Any]:
    tip = "In pixels, a multiple of 16. 0: by size and shape; if only one side is given, the other follows from the shape."
    return [io.Int.Input(side, default=0, min=0, max=4096, step=16, tooltip=tip) for side in ("width", "height")]


def _fit() -> Any:
    return io.Combo.Input(
        "fit",
        options=["crop", "pad", "stretch"],
        default="crop",
        tooltip="Where the size has another shape than the picture: cut its edges, add black bars, or distort it.",
    )


class _Sized(io.ComfyNode):
    """A node with the inputs width and height."""

    @classmethod
    def validate_inputs(cls, width: int | None = None, height: int | None = None) -> bool | str:
        """Returns True, or what is wrong with a size, before anything runs."""
        try:
            check_size(height or 32, width or 32)
        except MagiError as error:
            return str(error)
        return True


class Magi1TextToVideo(_Sized):
    """A size to start from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns the node's inputs and outputs."""
        return schema.schema(
            node_id="Magi1TextToVideo",
            display_name="MAGI-1 Text to Video (size)",
            aliases=["empty latent", "magi size", "t2v"],
            description="The size of a video that starts from text alone. Its length is set in the sampler.",
            inputs=[
                io.Combo.Input("size", options=_SIZES, default="540p", tooltip=_SIZE_TIP),
                io.Combo.Input("shape", options=list(_SHAPES), default="16:9", tooltip="Width to height."),
                *_sides(),
            ],
            outputs=[io.Latent.Output(display_name="start")],
        )

    @classmethod
    @schema.checked
    def execute(cls, size: str, shape: str, width: int, height: int) -> io.NodeOutput:
        """Returns latents of zeros, (1, 16, 1, height / 8, width / 8), of which only the size counts."""
        height, width = _target_size(size, width, height, _SHAPES[shape])
        return io.NodeOutput(
            {"samples": torch.zeros(1, LATENT_CHANNELS, 1, height // SPATIAL_DOWNSAMPLE, width // SPATIAL_DOWNSAMPLE)}
        )


class Magi1ImageToVideo(_Sized):
    """A picture to start from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns the node's inputs and outputs."""
        return schema.schema(
            node_id="Magi1ImageToVideo",
            display_name="MAGI-1 Image to Video",
            aliases=["first frame", "i2v", "animate image"],
            description="Encodes the picture that a video starts with.",
            inputs=[
                io.Vae.Input("vae", tooltip="From the MAGI-1 VAE Loader."),
                io.Image.Input("image", tooltip="The first frame. Of several pictures the first one is taken."),
                io.Combo.Input(
                    "size",
                    options=[*_SIZES, _FROM_IMAGE],
                    default="540p",
                    tooltip=f"{_SIZE_TIP} Keeps the picture's shape.",
                ),
                *_sides(),
                _fit(),
            ],
            outputs=[io.Latent.Output(display_name="start")],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    @schema.checked
    def execute(cls, vae: Any, image: torch.Tensor, size: str, width: int, height: int, fit: str) -> io.NodeOutput:
        """Returns the first picture, fitted to the size and encoded: latents (1, 16, 1, height / 8, width / 8)."""
        check_loaders(graph_of(cls.hidden.dynprompt), cls.hidden.unique_id)
        frames = media.frames_of(image[:1])
        own = (frames.shape[1], frames.shape[2])
        asked = _target_size(size, width, height, own[1] / own[0], own)
        target = embedded_size(magi_vae(vae).family) or asked
        progress = NodeProgress(cls.hidden.unique_id, load=0.3, encode=0.7)
        return _encoded(vae, fit_frames(frames, *target, fit), asked, progress)


class Magi1VideoToVideo(_Sized):
    """The end of a clip to continue."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns the node's inputs and outputs."""
        return schema.schema(
            node_id="Magi1VideoToVideo",
            display_name="MAGI-1 Video to Video",
            aliases=["extend video", "continue video", "v2v"],
            description="Encodes the end of a clip, for a sampler that continues it. The sampler's result begins after the clip.",
            inputs=[
                io.MultiType.Input(
                    "video",
                    types=[io.Video, io.Image, io.Latent],
                    tooltip="A video, its frames, or what another MAGI-1 Sampler made (which needs no encoding and keeps its size).",
                ),
                io.Float.Input(
                    "continue_seconds",
                    default=2.0,
                    min=0.5,
                    max=30.0,
                    step=0.5,
                    tooltip="How much of the end the model sees. One or two seconds hold movement and look; more takes longer.",
                ),
                io.Combo.Input(
                    "size",
                    options=[*_SIZES, _FROM_IMAGE],
                    default="540p",
                    tooltip=f"{_SIZE_TIP} Keeps the clip's shape. Latents keep their own size.",
                ),
                *_sides(),
                _fit(),
                schema.advanced(
                    io.Float.Input(
                        "fps",
                        default=float(FPS),
                        min=1.0,
                        max=240.0,
                        step=0.001,
                        tooltip="Frame rate of separate frames (a video knows its own). MAGI-1 works at 24.",
                    )
                ),
                io.Vae.Input("vae", optional=True, tooltip="From the MAGI-1 VAE Loader. Not needed for latents."),
            ],
            outputs=[io.Latent.Output(display_name="start")],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    @schema.checked
    def execute(
        cls,
        video: Any,
        continue_seconds: float,
        size: str,
        width: int,
        height: int,
        fit: str,
        fps: float = FPS,
        vae: Any = None,
    ) -> io.NodeOutput:
        """Returns the latents of the clip's end, (1, 16, T, height / 8, width / 8): encoded, or cut from a LATENT."""
        if isinstance(video, dict):
            return io.NodeOutput(media.latent_tail(video, continue_seconds))
        if vae is None:
            raise MagiError("A video has to be encoded. Connect a MAGI-1 VAE Loader to vae.")
        check_loaders(graph_of(cls.hidden.dynprompt), cls.hidden.unique_id)
        source = media.Clip.of(video, fps)
        asked = _target_size(size, width, height, source.width / source.height, (source.height, source.width))
        target = embedded_size(magi_vae(vae).family) or asked
        progress = NodeProgress(cls.hidden.unique_id, read=0.2, load=0.2, encode=0.6)
        frames = source.read(*target, fit, continue_seconds, lambda *_: progress.move("read", 0))
        return _encoded(vae, clip_end(frames), asked, progress, source.notices)


def _encoded(
    vae: Any, frames: torch.Tensor, asked: tuple[int, int], progress: NodeProgress, notices: tuple[str, ...] = ()
) -> io.NodeOutput:
    """Returns the LATENT of frames, whose size need not be the (height, width) that was asked for; shows `notices`."""
    on_progress = progress.phase("encode", f"encoding {frames.shape[2]}x{frames.shape[1]}")
    with host.device_work("encoding", "Close what else uses it, or encode with ComfyUI's own VAE Encode (Tiled)."):
        loaded = magi_vae(vae).loaded(Tiling(), progress.phase("load", "loading the VAE"))
        samples = loaded.encode(to_model(frames), progress=on_progress)
    size = () if asked == tuple(frames.shape[1:3]) else (size_notice(*asked),)
    made = f"{frames.shape[2]}x{frames.shape[1]}, {samples.shape[2]} latent frame{'s' * (samples.shape[2] > 1)}"
    shown = progress.show_now("\n".join((made, *size, *notices)))
    return io.NodeOutput(latent_of(samples, magi_vae(vae).family), ui=shown)


def _target_size(
    size: str, width: int, height: int, aspect: float, own: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Returns the (height, width) to make; `own` is that of the picture or clip."""
    if width or height:
        return complete_size(height or None, width or None, aspect)
    return nearest_size(*own) if size == _FROM_IMAGE and own else size_for(size, aspect)

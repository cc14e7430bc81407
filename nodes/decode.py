"""Latents to frames and video."""

from fractions import Fraction
from typing import Any

import torch
from comfy_api.latest import InputImpl, Types, io

from ..magi.errors import MagiError
from ..magi.vae.tiling import Tiling
from .comfyui import host, media, schema
from .comfyui.progress import Clock, NodeProgress
from .comfyui.vae import decoded, magi_vae


class Magi1VAEDecode(io.ComfyNode):
    """Decodes what the sampler made."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return schema.schema(
            node_id="Magi1VAEDecode",
            display_name="MAGI-1 VAE Decode",
            aliases=["decode", "latent to video"],
            description="Decodes latents to frames and to a video at 24 frames per second, tile by tile.",
            inputs=[
                io.Latent.Input("samples", tooltip="From the MAGI-1 Sampler."),
                io.Vae.Input("vae", tooltip="From the MAGI-1 VAE Loader."),
                io.MultiType.Input(
                    "before",
                    types=[io.Video, io.Image],
                    optional=True,
                    tooltip="A clip to put in front: the one that was continued. It is brought to the same size and to 24 frames per second.",
                ),
                schema.advanced(
                    io.Int.Input(
                        "tile_size",
                        default=256,
                        min=64,
                        max=1024,
                        step=32,
                        tooltip="Pixels of a tile's side. 256 is what MAGI-1 was published with; smaller takes less memory, and is used by itself where memory runs out.",
                    )
                ),
                schema.advanced(
                    io.Int.Input(
                        "tile_frames",
                        default=12,
                        min=4,
                        max=96,
                        step=4,
                        tooltip="Frames of a tile. 12 is what MAGI-1 was published with; longer ones take more memory.",
                    )
                ),
            ],
            outputs=[
                io.Image.Output(display_name="frames"),
                io.Video.Output(display_name="video", tooltip="24 frames per second, without sound."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, tile_size: int | None = None, tile_frames: int | None = None) -> bool | str:
        """Refuses tiles that cannot be."""
        try:
            Tiling(tile_frames or 12, tile_size or 256)
        except MagiError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, samples: dict[str, Any], vae: Any, before: Any = None, tile_size: int = 256, tile_frames: int = 12
    ) -> io.NodeOutput:
        """Decodes into one tensor, with the clip before it where there is one."""
        latents, tiling = media.check_latent(samples), Tiling(tile_frames, tile_size)
        chosen = None if tiling == Tiling() else tiling  # the published one gives way where memory is short
        made, height, width = 4 * latents.shape[2], 8 * latents.shape[3], 8 * latents.shape[4]
        progress, clock = NodeProgress(cls.hidden.unique_id, read=0.05, load=0.1, decode=0.85), Clock()
        clip = None
        if before is not None:
            clip = media.Clip.of(before).read(height, width, "crop", progress=lambda *_: progress.at("read", 0))
        first = 0 if clip is None else len(clip)
        frames = _room_for(first + made, height, width)
        if clip is not None:
            torch.div(clip, 255, out=frames[:first])

        def report(done: int, total: int) -> None:
            progress.at("decode", done / total)
            progress.say(f"decoding {made} frames: {done / total:.0%}{clock.left(done / total)}")

        with host.device_work(
            f"decoding tiles of {tile_size} pixels and {tile_frames} frames",
            "Use a tile_size of 128, or tile_frames of 4.",
        ):
            loaded = magi_vae(vae).loaded(chosen, progress.phase("load", "loading the VAE"))
            at = first
            for part in decoded(loaded, latents, chosen, report):
                frames[at : at + len(part)] = part
                at += len(part)
                progress.at("decode", (at - first) / made, part[-1].mul(255).round().to(torch.uint8).cpu())
        progress.say(f"{len(frames)} frames, {len(frames) / media.FPS:g} s, {width}x{height}", at_once=True)
        components = Types.VideoComponents(images=frames, frame_rate=Fraction(media.FPS))
        return io.NodeOutput(frames, InputImpl.VideoFromComponents(components))


def _room_for(count: int, height: int, width: int) -> torch.Tensor:
    """An empty IMAGE batch."""
    media.check_room(
        count,
        height,
        width,
        "Make a shorter video, save its latents, and go on from them in parts (MAGI-1 Video to Video).",
    )
    return torch.empty(count, height, width, 3)

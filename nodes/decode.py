"""Latents to frames and video."""

from fractions import Fraction
from typing import Any

import torch
from comfy_api.latest import InputImpl, Types, io

from ..magi.config import FPS, SPATIAL_DOWNSAMPLE, TEMPORAL_DOWNSAMPLE
from ..magi.errors import MagiError
from ..magi.media.sound import lasting
from ..magi.vae.tiling import Tiling
from .comfyui import host, media, schema
from .comfyui.families import check_fit, family_of_latent
from .comfyui.progress import Clock, NodeProgress
from .comfyui.vae import decoded, magi_vae

_IN_PARTS = "Make a shorter video, save its latents, and continue from them in parts (MAGI-1 Video to Video)."


class Magi1VAEDecode(io.ComfyNode):
    """Decodes what the sampler made."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns the node's inputs and outputs."""
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
                    tooltip="A clip to put in front: the one that was continued. It is brought to the same size and to 24 frames per second; the sound of a VIDEO is kept.",
                ),
                schema.advanced(
                    io.Int.Input(
                        "tile_size",
                        default=256,
                        min=64,
                        max=1024,
                        step=32,
                        tooltip="Pixels of a tile's side. 256 is what MAGI-1 was published with; smaller takes less memory, and is used automatically where memory runs out.",
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
                io.Video.Output(
                    display_name="video",
                    tooltip="24 frames per second, with the sound of before and silence after it. MAGI-1 makes no sound.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, tile_size: int | None = None, tile_frames: int | None = None) -> bool | str:
        """Returns True, or what is wrong with the tiles, before anything runs."""
        try:
            Tiling(tile_frames or 12, tile_size or 256)
        except MagiError as error:
            return str(error)
        return True

    @classmethod
    @schema.checked
    def execute(
        cls, samples: dict[str, Any], vae: Any, before: Any = None, tile_size: int = 256, tile_frames: int = 12
    ) -> io.NodeOutput:
        """Returns the frames as one IMAGE batch, after those of `before` where it is connected, and a VIDEO of them.

        The VIDEO has the sound of `before`, then silence.
        """
        latents, tiling = media.check_latent(samples), Tiling(tile_frames, tile_size)
        check_fit(magi_vae(vae).family, "VAE", family_of_latent(samples), "model that made these latents")
        # None: the published one, or a smaller one where memory is short.
        chosen = None if tiling == Tiling() else tiling
        made = TEMPORAL_DOWNSAMPLE * latents.shape[2]
        height, width = (SPATIAL_DOWNSAMPLE * side for side in latents.shape[3:])
        progress, clock = NodeProgress(cls.hidden.unique_id, read=0.05, load=0.1, decode=0.85), Clock()
        clip, sound = None, None
        notices: tuple[str, ...] = ()
        if before is not None:
            source, on_read = media.Clip.of(before), lambda *_: progress.move("read", 0)
            notices = source.notices
            media.check_room(source.length() + made, height, width, _IN_PARTS)  # before an hour of it is read
            clip = source.read(height, width, "crop", progress=on_read)
            sound = source.sound(len(clip), on_read)
        first = 0 if clip is None else len(clip)
        frames = _empty_batch(first + made, height, width)
        if clip is not None:
            torch.div(clip, 255, out=frames[:first])

        def on_progress(done: int, total: int) -> None:
            progress.move("decode", done / total)
            progress.show_text(f"decoding {made} frames: {done / total:.0%}{clock.left(done / total)}")

        with host.device_work(
            f"decoding tiles of {tile_size} pixels and {tile_frames} frames",
            "Use a tile_size of 128, or tile_frames of 4.",
        ):
            loaded = magi_vae(vae).loaded(chosen, progress.phase("load", "loading the VAE"))
            end = first
            for part in decoded(loaded, latents, chosen, on_progress):
                frames[end : end + len(part)] = part
                end += len(part)
                progress.move("decode", (end - first) / made, part[-1].mul(255).round().to(torch.uint8).cpu())
        shown = progress.show_now(
            "\n".join((f"{len(frames)} frames, {len(frames) / FPS:g} s, {width}x{height}", *notices))
        )
        audio = None if sound is None else media.audio_of(lasting(sound, Fraction(len(frames), FPS)))
        components = Types.VideoComponents(images=frames, frame_rate=Fraction(FPS), audio=audio)
        return io.NodeOutput(frames, InputImpl.VideoFromComponents(components), ui=shown)


def _empty_batch(count: int, height: int, width: int) -> torch.Tensor:
    """Returns an empty IMAGE batch, float32 (count, height, width, 3). Raises MagiError if it does not fit in RAM."""
    media.check_room(count, height, width, _IN_PARTS)
    return torch.empty(count, height, width, 3)

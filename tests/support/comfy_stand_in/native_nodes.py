"""ComfyUI's own nodes, as far as the tests and example workflows use them."""

from fractions import Fraction
from pathlib import Path

import folder_paths
import numpy as np
import torch
from comfy_api.latest import InputImpl, Types, io
from PIL import Image


def _node(name, inputs, outputs, run, output_node=False):
    schema = io.Schema(name, inputs=inputs, outputs=[o.Output() for o in outputs], is_output_node=output_node)
    body = {
        "define_schema": classmethod(lambda cls: schema),
        "execute": classmethod(lambda cls, **values: io.NodeOutput(*run(**values))),
    }
    return type(name, (io.ComfyNode,), body)


def _load_image(image):
    pixels = np.asarray(Image.open(folder_paths.get_annotated_filepath(image)).convert("RGB"))
    return torch.from_numpy(pixels / np.float32(255))[None], torch.zeros(1, 64, 64)


def _load_video(file):
    return (InputImpl.VideoFromFile(folder_paths.get_annotated_filepath(file)),)


def _save_video(video, filename_prefix="video/ComfyUI", format="auto", codec="auto"):
    path = Path(folder_paths.get_output_directory(), f"{filename_prefix}_00001_.mp4")
    path.parent.mkdir(parents=True, exist_ok=True)
    video.save_to(str(path))
    return ()


def _video_of(images, fps=30.0, audio=None):
    return (InputImpl.VideoFromComponents(Types.VideoComponents(images, Fraction(fps), audio)),)


def _empty_latent(width, height, length, batch_size=1):
    return ({"samples": torch.zeros(batch_size, 16, (length - 1) // 4 + 1, height // 8, width // 8)},)


def _encode(pixels, vae):
    return ({"samples": vae.encode(pixels[..., :3])},)


def _decode(samples, vae):
    return (vae.decode(samples["samples"]).flatten(0, 1),)


def all_nodes():
    """{name: class}"""
    text, image, video, latent, vae = io.String.Input, io.Image.Input, io.Video.Input, io.Latent.Input, io.Vae.Input
    number, real = io.Int.Input, io.Float.Input
    empty = [number(name) for name in ("width", "height", "length", "batch_size")]
    sound = io.Audio.Input("audio", optional=True)
    save = [video("video"), text("filename_prefix"), text("format"), text("codec")]
    nodes = [
        _node("PrimitiveStringMultiline", [text("value", multiline=True)], [io.String], lambda value: (value,)),
        _node("LoadImage", [text("image")], [io.Image, io.Mask], _load_image),
        _node("LoadVideo", [text("file")], [io.Video], _load_video),
        _node("SaveVideo", save, [], _save_video, output_node=True),
        _node("PreviewAny", [io.AnyType.Input("source")], [], lambda source: (), output_node=True),
        _node("CreateVideo", [image("images"), real("fps"), sound], [io.Video], _video_of),
        _node("EmptyHunyuanLatentVideo", empty, [io.Latent], _empty_latent),
        _node("VAEEncode", [image("pixels"), vae("vae")], [io.Latent], _encode),
        _node("VAEDecode", [latent("samples"), vae("vae")], [io.Image], _decode),
    ]
    return {n.GET_SCHEMA().node_id: n for n in nodes}

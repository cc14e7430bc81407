"""The fake server's videos: the picture, or a pattern, in slow motion, with a text that tells them from MAGI-1's."""

import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..media.video_writer import VideoWriter

_SIDES = {"480p": (832, 480), "720p": (1280, 720)}
_SQUARES = {"480p": 480, "720p": 720}
_BLOCK = 24  # frames in memory
_ZOOM = 0.15  # of the picture, over the video


def make_video(
    num_frames: int = 96,
    frames_per_second: int = 24,
    resolution: str = "720p",
    aspect_ratio: str = "auto",
    image: bytes | None = None,
) -> bytes:
    """Encodes a video with the service's parameters and returns the MP4's bytes; `image` is an image file's content."""
    picture = Image.open(BytesIO(image)).convert("RGB") if image else None
    width, height = _size(resolution, aspect_ratio, picture)
    base = ImageOps.fit(picture, (width, height)) if picture else _pattern(width, height)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "video.mp4")
        with VideoWriter(path, height, width, frames_per_second, crf=28) as writer:
            for start in range(0, num_frames, _BLOCK):
                block = range(start, min(start + _BLOCK, num_frames))
                frames = [np.asarray(_frame(base, i, num_frames)) for i in block]
                writer.write(torch.from_numpy(np.stack(frames)))
        return path.read_bytes()


def _size(resolution: str, aspect_ratio: str, picture: Image.Image | None) -> tuple[int, int]:
    wide, high = _SIDES[resolution]
    if aspect_ratio == "auto" and picture is not None:
        ratio = picture.width / picture.height
        aspect_ratio = "1:1" if 0.75 < ratio < 4 / 3 else "16:9" if ratio > 1 else "9:16"
    if aspect_ratio == "1:1":
        return _SQUARES[resolution], _SQUARES[resolution]
    return (high, wide) if aspect_ratio == "9:16" else (wide, high)


def _pattern(width: int, height: int) -> Image.Image:
    x = np.linspace(0, 1, width)[None, :, None]
    y = np.linspace(0, 1, height)[:, None, None]
    colours = 0.5 + 0.5 * np.cos(2 * np.pi * (x + y * np.array([0.5, 1.0, 1.5])))
    return Image.fromarray((colours * 255).astype(np.uint8))


def _frame(base: Image.Image, index: int, count: int) -> Image.Image:
    width, height = base.size
    cut = _ZOOM / 2 * index / count
    box = (width * cut, height * cut, width * (1 - cut), height * (1 - cut))
    frame = base.resize((width, height), Image.Resampling.BILINEAR, box=box)
    text = f"test server, not MAGI-1: {index + 1} of {count}"
    ImageDraw.Draw(frame).text((12, 12), text, "white", _font(), stroke_width=2, stroke_fill="black")
    return frame


def _font() -> Any:
    try:
        return ImageFont.load_default(24)
    except TypeError:  # before Pillow 10.1: the small one
        return ImageFont.load_default()

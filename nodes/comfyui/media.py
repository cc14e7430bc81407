"""Clips in ComfyUI's types: VIDEO, IMAGE batches and LATENT, as the pipeline takes frames."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from comfy_api.latest import InputImpl

from ...magi.errors import MagiError
from ...magi.media.frames import fit as fit_frames
from ...magi.media.frames import over_white
from ...magi.media.video_decoder import TimedFrame
from ...magi.media.video_reader import probe, read_video, resample
from ...magi.system.host_memory import free_host_memory

LEAST = 8  # frames of two latents: a single one is taken for a picture
FPS = 24
_WHOLE = 0.5  # seconds by which two ways of telling a file's length may differ


@dataclass(frozen=True)
class Clip:
    """A clip that can be read in any size: a file where there is one, as its end is then all that is decoded."""

    width: int
    height: int
    file: str | None = None
    images: torch.Tensor | None = None
    fps: Fraction = Fraction(FPS)

    @classmethod
    def of(cls, video: Any, fps: float = FPS) -> "Clip":
        """From a VIDEO, or an IMAGE batch of `fps` frames per second.

        Raises:
            MagiError: a file that cannot be read.
        """
        if isinstance(video, torch.Tensor):
            return cls(video.shape[2], video.shape[1], images=video, fps=Fraction(fps).limit_denominator(1001))
        # Asked of a video that is no file, this would encode it.
        source = video.get_stream_source() if isinstance(video, InputImpl.VideoFromFile) else None
        if isinstance(source, str):
            info = probe(source)
            # A video may be a part of its file; then it alone knows which.
            if info.seconds is None or abs(video.get_duration() - info.seconds) < _WHOLE:
                return cls(info.width, info.height, file=source)
        parts = video.get_components()
        return cls(parts.images.shape[2], parts.images.shape[1], images=parts.images, fps=Fraction(parts.frame_rate))

    def read(
        self,
        height: int,
        width: int,
        fit: str,
        tail_seconds: float | None = None,
        progress: Callable[[int, int | None], None] | None = None,
    ) -> torch.Tensor:
        """Frames uint8 (T, height, width, 3) at 24 per second, of the last `tail_seconds` or all.

        `progress` is called while a file is read; what it raises ends that.
        """
        if self.file is not None:
            return read_video(
                self.file, FPS, tail_seconds=tail_seconds, progress=progress, height=height, width=width, mode=fit
            )
        assert self.images is not None  # noqa: S101 (one of them is)
        shown = _frames_shown(len(self.images), self.fps)
        if tail_seconds is not None:
            shown = shown[-max(1, round(tail_seconds * FPS)) :]
        return fit_frames(frames_of(self.images[shown]), height, width, fit)


def _frames_shown(count: int, fps: Fraction) -> list[int]:
    """Which of `count` frames, `fps` per second, stands at each tick of 24 per second."""
    frames = (TimedFrame(i / fps, 1 / fps, partial(torch.tensor, i)) for i in range(count))
    return [int(frame.load()) for frame in resample(frames, Fraction(FPS))]


def frames_of(images: torch.Tensor) -> torch.Tensor:
    """IMAGE (T, H, W, C) in 0..1 -> uint8 (T, H, W, 3); what is transparent is put over white."""
    frames = torch.empty(images.shape, dtype=torch.uint8)
    for image, frame in zip(images, frames, strict=True):  # one by one: no second float copy of a whole clip
        frame.copy_(image.mul(255).round().clamp(0, 255))
    return over_white(frames) if frames.shape[3] == 4 else frames[..., :3].expand(-1, -1, -1, 3)


def images_of(frames: torch.Tensor) -> torch.Tensor:
    """uint8 (T, H, W, 3) -> IMAGE, float32 in 0..1."""
    return frames.float().div_(255)


def check_room(count: int, height: int, width: int, remedy: str) -> None:
    """Raises MagiError where the host has no memory for so many images: it may not be refused before it is filled."""
    needed, free = 12 * count * height * width, free_host_memory()
    if free is not None and needed > free:
        raise MagiError(
            f"{count} frames of {width}x{height} take {needed / 1e9:.1f} GB of memory as ComfyUI holds them, and {free / 1e9:.1f} GB are "
            f"free. {remedy}"
        )


def latent_tail(latent: dict[str, Any], seconds: float) -> dict[str, torch.Tensor]:
    """The end of a LATENT."""
    samples = check_latent(latent)
    return {"samples": samples[:, :, -max(LEAST // 4, round(seconds * FPS / 4)) :]}


def check_latent(latent: dict[str, Any]) -> torch.Tensor:
    """A LATENT's samples, (1, 16, T, h, w) float32. Raises MagiError for those of other models."""
    samples = latent["samples"]
    if samples.ndim != 5 or samples.shape[:2] != (1, 16) or 0 in samples.shape:
        raise MagiError(
            f"These latents have the shape {tuple(samples.shape)}; MAGI-1's are (1, 16, frames, height / 8, width / 8). "
            "Connect a MAGI-1 node, or an empty latent video with 16 channels."
        )
    return samples.float()

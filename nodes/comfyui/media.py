"""Clips in ComfyUI's types: VIDEO, IMAGE batches and LATENT, as the pipeline takes frames."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from comfy_api.latest import InputImpl

from ...magi.config import FPS, LATENT_CHANNELS, SPATIAL_DOWNSAMPLE, TEMPORAL_DOWNSAMPLE
from ...magi.errors import MagiError
from ...magi.media.containers import media_errors, open_container
from ...magi.media.frames import MIN_CLIP_FRAMES, over_white
from ...magi.media.frames import fit as fit_frames
from ...magi.media.sound import LAYOUTS, Sound, lasting
from ...magi.media.sound_reader import read_sound
from ...magi.media.video_decoder import TimedFrame
from ...magi.media.video_reader import MediaInfo, probe, read_video, resample
from ...magi.system.finite import check_finite
from ...magi.system.host_memory import free_host_memory
from .families import family_of_latent, latent_of

_TOLERANCE = 0.5  # seconds by which two readings of a file's length may differ


@dataclass(frozen=True)
class Clip:
    """A clip that can be read in any size: a file, of which only the end needs decoding, or its frames and their sound."""

    width: int
    height: int
    file: str | None = None
    images: torch.Tensor | None = None
    audio: Sound | None = None
    fps: Fraction = Fraction(FPS)
    notices: tuple[str, ...] = ()  # sentences about its file that the user should read

    @classmethod
    def of(cls, video: Any, fps: float = FPS) -> "Clip":
        """Returns the clip of a VIDEO, or of an IMAGE batch of `fps` frames per second.

        Raises:
            MagiError: its file cannot be read.
        """
        if isinstance(video, torch.Tensor):
            return cls(video.shape[2], video.shape[1], images=video, fps=Fraction(fps).limit_denominator(1001))
        # Only of a VideoFromFile: any other video would be encoded for this.
        source = video.get_stream_source() if isinstance(video, InputImpl.VideoFromFile) else None
        if isinstance(source, str):
            info = probe(source)
            if _is_whole(video, info):
                return cls(info.width, info.height, file=source, notices=info.notices)
        elif source is not None:
            _check_kind(source)
        try:
            parts = video.get_components()
        except media_errors() as error:
            raise MagiError(
                f"This video cannot be read ({error}). Play it to see whether it is whole, and load it again."
            ) from error
        height, width = parts.images.shape[1:3]
        rate, audio = Fraction(parts.frame_rate), _sound_of(parts.audio)
        return cls(width, height, images=parts.images, audio=audio, fps=rate)

    def length(self) -> int:
        """Returns about how many frames at 24 per second it has, by its header; 0 where that does not say."""
        if self.images is not None:
            return round(len(self.images) / self.fps * FPS)
        return round((probe(str(self.file)).seconds or 0) * FPS)

    def read(
        self,
        height: int,
        width: int,
        fit: str,
        tail_seconds: float | None = None,
        progress: Callable[[int, int | None], None] | None = None,
    ) -> torch.Tensor:
        """Returns frames, uint8 (T, height, width, 3) at 24 per second, of the last `tail_seconds` or of all.

        `progress` is called with (frames, frames in all or None) while a file is read; what it raises ends the reading.
        """
        if self.file is not None:
            return read_video(
                self.file, FPS, tail_seconds=tail_seconds, progress=progress, height=height, width=width, mode=fit
            )
        assert self.images is not None  # noqa: S101 (a clip has a file or images)
        shown = _frames_shown(len(self.images), self.fps)
        if tail_seconds is not None:
            shown = shown[-max(1, round(tail_seconds * FPS)) :]
        return fit_frames(frames_of(self.images[shown]), height, width, fit)

    def sound(self, frames: int, progress: Callable[[int, int], None] | None = None) -> Sound | None:
        """Returns the sound of the clip's first `frames` frames at 24 per second, exactly as long; None without any.

        `progress` is called with (samples, samples in all) while a file is read; what it raises ends the reading.
        """
        seconds = Fraction(frames, FPS)
        if self.file is not None:
            return read_sound(self.file, seconds, progress)
        return None if self.audio is None else lasting(self.audio, seconds)


def _check_kind(source: Any) -> None:
    """Raises MagiError for a file in memory of a kind that is not read: a playlist makes ComfyUI open other files."""
    source.seek(0)
    try:
        open_container(source).close()
    except media_errors() as error:
        raise MagiError("This video is damaged, or of a kind that is not read. Convert it to MP4.") from error
    finally:
        source.seek(0)


def _is_whole(video: Any, info: MediaInfo) -> bool:
    """Returns whether a VIDEO is all of its file. It may be a part, and only it knows which."""
    if hasattr(video, "get_active_trim_window"):
        start, seconds = video.get_active_trim_window()
        return start == 0 and (seconds == 0 or (info.seconds is not None and seconds >= info.seconds))
    if not hasattr(video, "as_trimmed"):  # ComfyUI 0.8 has no parts yet
        return True
    return info.seconds is None or abs(video.get_duration() - info.seconds) < _TOLERANCE


def _sound_of(audio: dict[str, Any] | None) -> Sound | None:
    """Returns the sound of an AUDIO, the first of its batch; None for none."""
    if not audio or 0 in audio["waveform"].shape:
        return None
    waveform = audio["waveform"][0].float().cpu()
    check_finite(waveform, "the clip's sound", "Mend the node that it comes from.")
    if len(waveform) not in LAYOUTS:  # ComfyUI could not save it
        waveform = waveform.mean(0, keepdim=True)
    return Sound(waveform, int(audio["sample_rate"]))


def audio_of(sound: Sound) -> dict[str, Any]:
    """Returns a sound as an AUDIO."""
    return {"waveform": sound.waveform[None], "sample_rate": sound.rate}


def _frames_shown(count: int, fps: Fraction) -> list[int]:
    """Returns which of `count` frames, `fps` per second, is shown at each tick of 24 per second."""
    frames = (TimedFrame(i / fps, 1 / fps, partial(torch.tensor, i)) for i in range(count))
    return [int(frame.load()) for frame in resample(frames, Fraction(FPS))]


def frames_of(images: torch.Tensor) -> torch.Tensor:
    """Converts an IMAGE batch, (T, H, W, C) in 0..1, to frames, uint8 (T, H, W, 3); transparency is laid over white."""
    frames = torch.empty(images.shape, dtype=torch.uint8)
    for image, frame in zip(images, frames, strict=True):  # one by one: no second float copy of a whole clip
        check_finite(image, "an image", "Mend the node that it comes from.")
        frame.copy_(image.mul(255).round().clamp(0, 255))
    return over_white(frames) if frames.shape[3] == 4 else frames[..., :3].expand(-1, -1, -1, 3)


def images_of(frames: torch.Tensor) -> torch.Tensor:
    """Converts frames, uint8 (T, H, W, 3), to an IMAGE batch, float32 in 0..1."""
    return frames.float().div_(255)


def check_room(count: int, height: int, width: int, remedy: str) -> None:
    """Raises MagiError, with the remedy, unless an IMAGE batch of this size fits in RAM.

    Allocating it would not tell: a system may grant memory that it does not have, and end the process when it is
    filled.
    """
    needed, free = 12 * count * height * width, free_host_memory()
    if free is not None and needed > free:
        raise MagiError(
            f"{count} frames of {width}x{height} take {needed / 1e9:.1f} GB of memory as ComfyUI holds them, and {free / 1e9:.1f} GB are "
            f"free. {remedy}"
        )


def latent_tail(latent: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Returns a LATENT of the last `seconds`, of two latent frames at least. Raises MagiError if it has only one."""
    least, samples = MIN_CLIP_FRAMES // TEMPORAL_DOWNSAMPLE, check_latent(latent)
    if samples.shape[2] < least:
        raise MagiError(
            "These latents are of a single frame, which is a picture and no clip. Connect them to start of the sampler itself."
        )
    return latent_of(samples[:, :, -max(least, round(seconds * FPS / TEMPORAL_DOWNSAMPLE)) :], family_of_latent(latent))


def check_latent(latent: dict[str, Any]) -> torch.Tensor:
    """Returns a LATENT's samples, float32 (1, 16, T, h, w). Raises MagiError for those of other models, or without numbers."""
    samples = latent["samples"]
    if samples.ndim == 5 and len(samples) > 1:
        raise MagiError(
            f"These latents are a batch of {len(samples)} videos, and MAGI-1 makes one at a time. Take one of them with Latent From Batch."
        )
    if samples.ndim != 5 or samples.shape[:2] != (1, LATENT_CHANNELS) or 0 in samples.shape:
        raise MagiError(
            f"These latents have the shape {tuple(samples.shape)}; MAGI-1's are (1, {LATENT_CHANNELS}, frames, height / {SPATIAL_DOWNSAMPLE}, width / {SPATIAL_DOWNSAMPLE}). "
            f"Connect a MAGI-1 node, or an empty latent video with {LATENT_CHANNELS} channels."
        )
    check_finite(samples, "these latents", "Make them anew: there is no picture in them.")
    return samples.float()

"""Clips with sound: tones at known places, beside pictures that grow brighter."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

LAYOUTS = {1: "mono", 2: "stereo", 4: "quad", 6: "5.1"}
HEIGHT, WIDTH = 48, 64


def tone(seconds: float, rate: int = 48000, begin: float = 0.5, end: float = 1.0, channels: int = 2) -> torch.Tensor:
    """Silence with a tone from `begin` to `end`, another one in each channel: float32 (channels, samples) of 16 bits."""
    times = torch.arange(round(seconds * rate)) / rate
    pitches = 200 + 50 * torch.arange(channels)[:, None]
    waves = 0.5 * torch.cos(2 * torch.pi * pitches * times) * ((times >= begin) & (times < end))
    return (waves * 32767).round() / 32768


def heard(waveform: torch.Tensor, rate: int) -> tuple[float, float]:
    """When, in seconds, the first channel's tone begins and ends."""
    loud = (waveform[0].abs() > 0.1).nonzero()[:, 0]
    return loud[0].item() / rate, (loud[-1].item() + 1) / rate


def write_clip(
    path: Path,
    waveform: torch.Tensor | None,
    rate: int = 48000,
    frames: int = 48,
    fps: int = 24,
    codec: str = "pcm_s16le",
    sound_at: float = 0,
    picture_at: float = 0,
    pieces: dict[int, float] | None = None,
    movflags: str = "",
) -> Path:
    """Writes a video whose sound is exactly `waveform` (for PCM, in a .mov or .mkv).

    The sound begins at `sound_at`, the picture at `picture_at` seconds. `pieces` {sample: seconds} cuts the sound before
    these samples, and gives what follows these times instead of the ones that they would have.
    """
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as out:
        picture = out.add_stream("libx264", rate=fps, options={"preset": "ultrafast"})
        picture.height, picture.width, picture.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        sound = None
        if waveform is not None:
            sound = out.add_stream(codec, rate=rate)
            sound.codec_context.layout = LAYOUTS[len(waveform)]
        for index in range(frames):
            level = 20 + 200 * index // frames
            frame = av.VideoFrame.from_ndarray(np.full((HEIGHT, WIDTH, 3), level, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(picture_at * fps) + index, Fraction(1, fps)
            out.mux(picture.encode(frame))
        out.mux(picture.encode(None))
        if sound is not None:
            starts = {0: sound_at, **(pieces or {})}
            for begin, end in zip(starts, [*list(starts)[1:], waveform.shape[1]], strict=True):
                _write_sound(out, sound, waveform[:, begin:end], rate, starts[begin])
            out.mux(sound.encode(None))
    return path


def _write_sound(out: Any, stream: Any, waveform: torch.Tensor, rate: int, at: float) -> None:
    for start in range(0, waveform.shape[1], 1024):
        samples = (waveform[:, start : start + 1024] * 32768).round().to(torch.int16)
        packed = samples.T.reshape(1, -1).contiguous().numpy()
        frame = av.AudioFrame.from_ndarray(packed, format="s16", layout=LAYOUTS[len(waveform)])
        frame.sample_rate, frame.pts, frame.time_base = rate, round(at * rate) + start, Fraction(1, rate)
        out.mux(stream.encode(frame))


def packets(path: Path, kind: str) -> list[tuple[int, int, bytes]]:
    """(pts, place in the file, bytes) of the packets of the "audio" or "video"."""
    with av.open(str(path)) as file:
        stream = next(stream for stream in file.streams if stream.type == kind)
        return [(packet.pts, packet.pos, bytes(packet)) for packet in file.demux(stream) if packet.dts is not None]


def spoil(path: Path, *numbers: int) -> None:
    """Overwrites packets of the sound, each with all that are the same."""
    data = path.read_bytes()
    for number, (_, _, content) in enumerate(packets(path, "audio")):
        if number in numbers:
            data = data.replace(content, b"\xff" * len(content))
    path.write_bytes(data)

"""Videos as they travel along links."""

import io
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
import torch

_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}


@dataclass
class VideoComponents:
    images: torch.Tensor  # float (T, H, W, 3), 0 to 1
    frame_rate: Fraction
    audio: dict | None = None
    metadata: dict | None = None


class VideoInput(ABC):
    @abstractmethod
    def get_components(self):
        """All of it, decoded."""

    @abstractmethod
    def save_to(self, path):
        """Writes it to a path or a buffer."""

    def get_stream_source(self):
        buffer = io.BytesIO()
        self.save_to(buffer)
        buffer.seek(0)
        return buffer

    def get_dimensions(self):
        images = self.get_components().images
        return images.shape[2], images.shape[1]

    def get_duration(self):
        components = self.get_components()
        return float(len(components.images) / components.frame_rate)


class VideoFromComponents(VideoInput):
    def __init__(self, components):
        self._components = components

    def get_components(self):
        return self._components

    def save_to(self, path, format="mp4", codec="auto", metadata=None):
        images = self._components.images
        with av.open(path, "w") as file:  # which fails for a buffer, as in ComfyUI
            stream = file.add_stream("h264", rate=self._components.frame_rate)
            stream.height, stream.width = images.shape[1:3]
            stream.pix_fmt = "yuv420p"
            audio = self._components.audio
            if audio:
                sound = file.add_stream("aac", rate=int(audio["sample_rate"]))
                sound.codec_context.layout = _LAYOUTS[audio["waveform"].shape[1]]
            for image in (images * 255).clamp(0, 255).byte().cpu().numpy():
                file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            file.mux(stream.encode(None))
            if audio:
                samples = audio["waveform"][0].float().contiguous().numpy()
                frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=_LAYOUTS[len(samples)])
                frame.sample_rate, frame.pts = int(audio["sample_rate"]), 0
                file.mux(sound.encode(frame))
                file.mux(sound.encode(None))


class VideoFromFile(VideoInput):
    def __init__(self, file, *, start_time=0, duration=0):
        self._file, self._start, self._seconds = file, start_time, duration

    def get_stream_source(self):
        if isinstance(self._file, io.BytesIO):
            self._file.seek(0)
        return self._file

    def get_active_trim_window(self):
        return float(self._start), float(self._seconds)

    def get_components(self):
        with av.open(self.get_stream_source()) as file:
            rate = Fraction(file.streams.video[0].average_rate)
            frames = [
                torch.from_numpy(f.to_ndarray(format="rgb24")) / 255
                for f in file.decode(video=0)
                if f.time >= self._start and not (self._seconds and f.time >= self._start + self._seconds)
            ]
        return VideoComponents(torch.stack(frames), rate, self._audio())

    def _audio(self):
        with av.open(self.get_stream_source()) as file:
            if not file.streams.audio:
                return None
            rate, resampler = file.streams.audio[0].rate, av.AudioResampler("fltp")
            parts = [part.to_ndarray() for f in file.decode(audio=0) for part in resampler.resample(f)]
        samples = torch.from_numpy(np.concatenate(parts, 1))[None, :, int(self._start * rate) :]
        return {"waveform": samples[..., : int(self._seconds * rate) or None], "sample_rate": rate}

    def save_to(self, path, format="mp4", codec="auto", metadata=None):
        VideoFromComponents(self.get_components()).save_to(path)

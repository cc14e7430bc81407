"""Videos as they travel along links."""

import io
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction

import av
import torch


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
            for image in (images * 255).clamp(0, 255).byte().cpu().numpy():
                file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            file.mux(stream.encode(None))


class VideoFromFile(VideoInput):
    def __init__(self, file):
        self._file = file

    def get_stream_source(self):
        if isinstance(self._file, io.BytesIO):
            self._file.seek(0)
        return self._file

    def get_components(self):
        with av.open(self.get_stream_source()) as file:
            rate = Fraction(file.streams.video[0].average_rate)
            frames = [torch.from_numpy(f.to_ndarray(format="rgb24")) / 255 for f in file.decode(video=0)]
        return VideoComponents(torch.stack(frames), rate)

    def save_to(self, path, format="mp4", codec="auto", metadata=None):
        VideoFromComponents(self.get_components()).save_to(path)

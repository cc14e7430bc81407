"""What a V3 node pack imports from ComfyUI."""

from abc import ABC, abstractmethod

from . import _io as io
from ._video import VideoComponents, VideoFromComponents, VideoFromFile, VideoInput


class ComfyExtension(ABC):
    """A pack's list of nodes."""

    @abstractmethod
    async def get_node_list(self):
        """All node classes."""


class Input:
    Video = VideoInput


class InputImpl:
    VideoFromComponents = VideoFromComponents
    VideoFromFile = VideoFromFile


class Types:
    VideoComponents = VideoComponents


__all__ = ["ComfyExtension", "Input", "InputImpl", "Types", "io"]

"""A request to the service: its limits, checks and JSON."""

import hashlib
import json
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import torch

from ..errors import MagiError
from ..system.whole_files import tensor_digest
from .address import can_be_opened, redact_url

MODEL = "wavespeed-ai/magi-1-24b"
FRAMES = (96, 192)
FPS = (5, 30)
MOST_SEED = 2**31 - 1
RESOLUTIONS = ("480p", "720p")
ASPECTS = ("auto", "16:9", "9:16", "1:1")

_LEAST_SIDE = 32  # pixels; as the local models
_MOST_SIDE = 2048  # pixels; the service makes at most 1280x720 of it
_MOST_BYTES = 10 << 20  # half of what the service takes


@dataclass(frozen=True, eq=False)
class RemoteRequest:
    """The request for one video, checked against the values that the service documents.

    Attributes:
        prompt: what to show.
        image: the picture it begins with, uint8 (H, W, 3), or its public URL.
        num_frames: 96 to 192.
        fps: frames per second, 5 to 30.
        resolution: "480p" or "720p".
        aspect_ratio: "auto" is the picture's.
        seed: 0 to 2147483647; None: the service picks one.
        safety_checker: whether the service checks the content.

    Raises:
        MagiError: a value is out of range.
    """

    prompt: str
    image: torch.Tensor | str | None = field(default=None, repr=False)
    num_frames: int = 96
    fps: int = 24
    resolution: str = "720p"
    aspect_ratio: str = "auto"
    seed: int | None = None
    safety_checker: bool = True

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise MagiError('The prompt is blank. Say what to show, for example "A lighthouse in a storm".')
        for name, value, (least, most) in (("frames", self.num_frames, FRAMES), ("fps", self.fps, FPS)):
            if not least <= value <= most:
                raise MagiError(f"{name} is {value}; the service takes {least} to {most}.")
        if self.seed is not None and not 0 <= self.seed <= MOST_SEED:
            raise MagiError(
                f"The seed {self.seed} is out of range; it can be 0 to {MOST_SEED}, or -1 for a random one."
            )
        for name, choice, known in (
            ("resolution", self.resolution, RESOLUTIONS),
            ("aspect ratio", self.aspect_ratio, ASPECTS),
        ):
            if choice not in known:
                raise MagiError(f"The {name} {choice!r} is unknown. Use one of: {', '.join(known)}.")
        if isinstance(self.image, str):
            if not can_be_opened(self.image):
                raise MagiError(
                    f"The picture's address {redact_url(self.image)!r} is not one that the service can open. It begins with https://."
                )
        elif self.image is not None and min(self.image.shape[:2]) < _LEAST_SIDE:
            height, width = self.image.shape[:2]
            raise MagiError(f"The picture is {width}x{height}; give one of at least {_LEAST_SIDE}x{_LEAST_SIDE}.")

    def notes(self) -> list[str]:
        """Returns notes for the user, in sentences."""
        if self.image is not None or self.aspect_ratio != "auto":
            return []
        return ["The aspect ratio is auto, but there is no picture to take it from: the service chooses."]

    def body(self, image_url: str | None) -> dict[str, Any]:
        """Returns the JSON object to submit; `image_url` is the uploaded picture's URL."""
        body = {
            "prompt": self.prompt,
            "num_frames": self.num_frames,
            "frames_per_second": self.fps,
            "resolution": self.resolution,
            "aspect_ratio": self.aspect_ratio,
            "enable_safety_checker": self.safety_checker,
        }
        optional = {"image": image_url, "seed": self.seed}
        return body | {name: value for name, value in optional.items() if value is not None}

    def settings(self) -> dict[str, Any]:
        """Returns all of it but pixels, for people to read."""
        rest = {name: value for name, value in vars(self).items() if name != "image"}
        return rest | {"image": self.image if isinstance(self.image, str) or self.image is None else "a picture"}

    def digest(self, base: str, version: str) -> str:
        """Returns 32 hexadecimal digits, the same for the same request to the same service and API version."""
        image = tensor_digest(self.image) if isinstance(self.image, torch.Tensor) else self.image
        text = json.dumps([MODEL, base, version, self.settings(), image], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def encode_image(pixels: torch.Tensor) -> tuple[bytes, str]:
    """Encodes uint8 (H, W, 3) pixels and returns the file and its media type: PNG, or JPEG where that is too large.

    A picture larger than the service uses is scaled down.
    """
    from PIL import Image

    image = Image.fromarray(pixels.cpu().numpy())
    if max(image.size) > _MOST_SIDE:
        image.thumbnail((_MOST_SIDE, _MOST_SIDE), Image.Resampling.LANCZOS)
    data = _saved(image, "PNG")
    return (data, "image/png") if len(data) <= _MOST_BYTES else (_saved(image, "JPEG", quality=95), "image/jpeg")


def _saved(image: Any, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()

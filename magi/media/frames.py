"""Frames as tensors: fitting them to a size, choosing that size, and the way to and from the model's range.

Frames are uint8 (T, H, W, 3) RGB everywhere outside the model; the model's video is float (1, 3, T, H, W) in [-1, 1].
"""

from itertools import product
from math import ceil, floor, log, sqrt

import torch
import torch.nn.functional as F

from ..config import FPS, TEMPORAL_DOWNSAMPLE
from ..errors import MagiError

MODES = ("crop", "pad", "stretch")

# Of a clip to continue, at 24 per second: two latent frames. A single one is a picture to the model.
MIN_CLIP_FRAMES = 2 * TEMPORAL_DOWNSAMPLE

# Pixels of the usual 16:9 sizes; another aspect ratio keeps the area, and with it the time and memory a chunk costs.
AREAS = {"256p": 448 * 256, "360p": 640 * 368, "480p": 848 * 480, "540p": 960 * 544, "720p": 1280 * 720}

# Of one picture or frame: what PIL opens. A file of a few kilobytes may hold one that memory cannot.
MAX_PIXELS = 178_956_970

# Bounds the temporaries of a resize; a frame at a time would waste little, a whole clip would double it.
_BLOCK = 16

_STRIP = 1 << 16  # pixels that are converted at a time

LONGEST_SECONDS = 86_400  # of a video; a saved run numbers its chunks, a second each, with five digits
_LONGEST_SIDE = 8192  # pixels: beyond what any card has room for, and what H.264 encoders take


def fit(frames: torch.Tensor, height: int, width: int, mode: str = "crop") -> torch.Tensor:
    """Resizes frames, uint8 (T, H, W, 3), to (T, height, width, 3), antialiased bicubic.

    Frames of that size are returned as they are.

    `mode` "crop" covers the size and cuts the excess around the centre, "pad" keeps everything and adds black bars,
    "stretch" ignores the aspect ratio.

    Raises:
        MagiError: the mode is unknown or the size not positive.
    """
    check_mode(mode)
    if height < 1 or width < 1:
        raise MagiError(f"A size of {width}x{height} is not possible. Give a width and height of 1 or more.")
    old_height, old_width = frames.shape[1:3]
    if (old_height, old_width) == (height, width):
        return frames
    if mode == "crop":
        scale = max(height / old_height, width / old_width)
        keep_height = min(old_height, max(1, round(height / scale)))
        keep_width = min(old_width, max(1, round(width / scale)))
        top, left = (old_height - keep_height) // 2, (old_width - keep_width) // 2
        return _resize(frames[:, top : top + keep_height, left : left + keep_width], height, width)
    if mode == "stretch":
        return _resize(frames, height, width)
    scale = min(height / old_height, width / old_width)
    inner_height = min(height, max(1, round(old_height * scale)))
    inner_width = min(width, max(1, round(old_width * scale)))
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    out = frames.new_zeros(len(frames), height, width, 3)
    out[:, top : top + inner_height, left : left + inner_width] = _resize(frames, inner_height, inner_width)
    return out


def check_mode(mode: str) -> None:
    """Raises MagiError when `mode` is not one of `MODES`."""
    if mode not in MODES:
        raise MagiError(f"The fit mode {mode!r} is unknown. Use one of: {', '.join(MODES)}.")


def _resize(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    # torch resizes uint8 in channels-last order directly: as good as PIL's filters and several times faster.
    blocks = [
        F.interpolate(block.permute(0, 3, 1, 2), (height, width), mode="bicubic", antialias=True).permute(0, 2, 3, 1)
        for block in frames.split(_BLOCK)
    ]
    return (torch.cat(blocks) if len(blocks) > 1 else blocks[0]).contiguous()


def check_pixels(height: int, width: int, name: str) -> None:
    """Raises MagiError, before it is decoded, for a picture or frame larger than `MAX_PIXELS`; `name` is its file's."""
    if height * width > MAX_PIXELS:
        raise MagiError(
            f"The picture {name!r} is too large: {width}x{height} are {height * width / 1e6:.0f} million pixels, and at "
            f"most {MAX_PIXELS / 1e6:.0f} million are read. Scale it down first."
        )


def clip_end(frames: torch.Tensor) -> torch.Tensor:
    """Returns the whole latents' frames at the end of a clip to continue, uint8 (T, H, W, 3), 24 per second.

    Those too many are dropped at the beginning: what is made goes on where the clip ends.

    Raises:
        MagiError: there are fewer than `MIN_CLIP_FRAMES`.
    """
    if len(frames) < MIN_CLIP_FRAMES:
        raise MagiError(
            f"The clip has {len(frames)} frame{'s' * (len(frames) != 1)} at {FPS} per second; {MIN_CLIP_FRAMES} are needed to see "
            "a movement. Give a longer one, or use a single picture as an image."
        )
    return frames[len(frames) % TEMPORAL_DOWNSAMPLE :]


def check_clip_seconds(seconds: float) -> None:
    """Raises MagiError unless so much of a clip's end, in seconds, can be continued."""
    if not 0 < seconds <= LONGEST_SECONDS:
        raise MagiError(f"continue_seconds is {seconds}; it must be above 0, and at most {LONGEST_SECONDS} (a day).")
    if round(seconds * FPS) < MIN_CLIP_FRAMES:
        raise MagiError(
            f"continue_seconds is {seconds}, less than the {MIN_CLIP_FRAMES} frames that are needed to see a movement. "
            f"Give {ceil(100 * MIN_CLIP_FRAMES / FPS) / 100} or more."
        )


def over_white(frames: torch.Tensor) -> torch.Tensor:
    """Lays RGBA, uint8 (..., 4) with straight alpha, over white: returns RGB, uint8 (..., 3).

    White, because it is what viewers and browsers show behind a cut-out, and what its dark outlines and text need.
    """
    out = torch.empty(*frames.shape[:-1], 3, dtype=torch.uint8)
    for target, strip in zip(out.view(-1, 3).split(_STRIP), frames.reshape(-1, 4).split(_STRIP), strict=True):
        alpha = strip[:, 3:].to(torch.int32)
        mixed = strip[:, :3] * alpha + 255 * (255 - alpha) + 128
        target.copy_((mixed + (mixed >> 8)) >> 8)  # a division by 255, rounded, and much faster
    return out


def to_model(frames: torch.Tensor) -> torch.Tensor:
    """Converts frames, uint8 (T, H, W, 3), to a video, float32 (1, 3, T, H, W) in [-1, 1]: x / 127.5 - 1."""
    return frames.permute(3, 0, 1, 2).contiguous().float().div_(127.5).sub_(1)[None]


def from_model(video: torch.Tensor) -> torch.Tensor:
    """Converts a video, float (1, 3, T, H, W) of about [-1, 1], to clamped frames on its device, uint8 (T, H, W, 3)."""
    _, channels, length, height, width = video.shape
    out = torch.empty(length, height, width, channels, dtype=torch.uint8, device=video.device)
    for frame, target in zip(video[0].unbind(1), out, strict=True):  # frame by frame: no float copy of the whole video
        target.copy_(frame.float().add(1).mul_(127.5).round_().clamp_(0, 255).permute(1, 2, 0))
    return out


def nearest_size(height: int, width: int, multiple: int = 16) -> tuple[int, int]:
    """Returns the valid (height, width) nearest to the given one: multiples of `multiple`, two or more each."""
    least = 2 * multiple
    return tuple(max(least, floor(side / multiple + 0.5) * multiple) for side in (height, width))  # type: ignore[return-value]


def check_size(height: int, width: int, multiple: int = 16) -> None:
    """Raises MagiError, naming the nearest valid values, unless both sides are multiples of `multiple`, two to 8192 pixels.

    The model needs the two: positions over a grid that is one patch high or wide are not defined.
    """
    for name, side in (("Height", height), ("Width", width)):
        if side < 2 * multiple:
            raise MagiError(f"{name} {side} is too small; the smallest is {2 * multiple}.")
        if side > _LONGEST_SIDE:
            raise MagiError(f"{name} {side} is too large; the largest is {_LONGEST_SIDE}.")
        if side % multiple:
            below = side // multiple * multiple
            raise MagiError(
                f"{name} {side} is not a multiple of {multiple}; the nearest are {below} and {below + multiple}."
            )


def complete_size(height: int | None, width: int | None, aspect: float, multiple: int = 16) -> tuple[int, int]:
    """Returns (height, width) from one side or both: a missing one follows from the aspect ratio width / height.

    Raises:
        MagiError: a given side is no valid one.
    """
    if width is None and height is not None:
        width = max(2, round(height * aspect / multiple)) * multiple
    elif height is None and width is not None:
        height = max(2, round(width / aspect / multiple)) * multiple
    assert height is not None and width is not None  # noqa: S101, PT018 (one was given)
    check_size(height, width, multiple)
    return height, width


def size_for(area: int | str, aspect: float, multiple: int = 16) -> tuple[int, int]:
    """Returns a (height, width) of about `area` pixels, a number or a name of `AREAS`, and the aspect width / height.

    Of the multiples around the exact solution it is the pair nearest in both area and aspect ratio.

    Raises:
        MagiError: the name is unknown, or a number is not positive.
    """
    if isinstance(area, str):
        if area not in AREAS:
            raise MagiError(f"The size {area!r} is unknown. Use a number of pixels or one of: {', '.join(AREAS)}.")
        area = AREAS[area]
    if area <= 0 or aspect <= 0:
        raise MagiError(
            f"An area of {area} pixels with the aspect ratio {aspect} is not possible. Both must be above 0."
        )

    def choices(side: float) -> set[int]:
        return {max(2, count) * multiple for count in (floor(side / multiple), ceil(side / multiple))}

    def distance(size: tuple[int, int]) -> float:
        return abs(log(size[0] * size[1] / area)) + abs(log(size[1] / size[0] / aspect))

    return min(product(sorted(choices(sqrt(area / aspect))), sorted(choices(sqrt(area * aspect)))), key=distance)

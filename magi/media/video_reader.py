"""Pictures and videos as uint8 RGB frames at a constant rate, fitted to a size as they arrive."""

import warnings
from collections import deque
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from pathlib import Path
from typing import Literal

import torch

from ..config import FPS
from ..errors import MagiError
from ..system.progress import OnProgress
from .frames import check_mode, fit
from .image import check_file, is_animation, open_image, read_image, to_rgb
from .video_decoder import Animation, TimedFrame, VideoFile, open_clip

__all__ = ["MediaInfo", "probe", "read_image", "read_pieces", "read_video", "resample"]

# A header may promise a little more than there is; beyond this many seconds the file is taken to be cut off.
_TOLERANCE = 0.5

_PIECE = 48  # frames


@dataclass(frozen=True)
class MediaInfo:
    """What a file shows: its size in pixels upright and with square pixels; for videos also rate, frames and seconds.

    `frames` and `seconds` are those of the header, None where it has none; `sound` tells whether there is a track of it.
    `notices` are sentences that the user should read, such as that it is interlaced. An animated picture is a video.
    """

    kind: Literal["image", "video"]
    width: int
    height: int
    fps: Fraction | None = None
    frames: int | None = None
    seconds: float | None = None
    sound: bool = False
    notices: tuple[str, ...] = ()


def probe(path: str | Path) -> MediaInfo:
    """Returns what is in an image or video file, from its header and first frame; an animation is read whole.

    Raises:
        MagiError: there is no such file, or it is neither a picture nor a video that can be read.
    """
    path = check_file(path)
    image = open_image(path)
    if image is not None:
        with image:
            if not is_animation(image, path):
                height, width = to_rgb(image, path).shape[:2]
                return MediaInfo("image", width, height)
    clip = open_clip(path)
    if isinstance(clip, VideoFile):
        return MediaInfo(
            "video", clip.width, clip.height, clip.fps, clip.frame_count, clip.seconds, clip.has_sound, clip.notices
        )
    seconds = clip.whole_seconds()
    fps = (clip.frame_count / seconds).limit_denominator(1001)
    return MediaInfo("video", clip.width, clip.height, fps, clip.frame_count, float(seconds))


def read_video(
    path: str | Path,
    fps: int | float | Fraction = FPS,
    start: float | None = None,
    seconds: float | None = None,
    tail_seconds: float | None = None,
    height: int | None = None,
    width: int | None = None,
    mode: str = "crop",
    progress: OnProgress | None = None,
) -> torch.Tensor:
    """Reads frames of a video or animation at a constant rate: uint8 (T, H, W, 3) RGB.

    Args:
        path: the file. For its sound see `read_sound`; rotation, pixel aspect ratio and transparency (over white) are applied.
        fps: rate of the result; for each of its ticks the nearest frame is taken, see `resample`.
        start: seconds to skip.
        seconds: at most this much is read; a shorter clip gives fewer frames.
        tail_seconds: read the end of the clip instead, at most this much, without holding more.
        height: with `width`, the size each frame is fitted to as it arrives; without, the size the clip is shown at.
        width: see `height`.
        mode: "crop", "pad" or "stretch", see `frames.fit`.
        progress: called with (frames of the result so far, frames wanted or 0) per frame, decoded or repeated; what it
            raises ends the reading.

    Raises:
        MagiError: a bad argument; no such file, not a video, no frames; a start beyond the end; a damaged file of which
            not all that was asked for can be read. Damage that costs single frames is a warning.
    """
    rate = _check_arguments(fps, start, seconds, tail_seconds, height, width, mode)
    clip = open_clip(path)
    length = seconds if seconds is not None else tail_seconds
    wanted = None if length is None else max(1, _round(Fraction(length) * rate))
    size = (height or clip.height, width or clip.width)
    begin = Fraction(start or 0)
    seek = begin
    if tail_seconds is not None:
        seek = max(Fraction(0), Fraction(clip.seconds or 0) - Fraction(tail_seconds) - 1)
    reading = _Reading(clip, rate, begin, wanted, tail_seconds is not None, size, mode, progress)
    if not reading.run(seek):  # the file's index led past the first frame asked for
        reading.run(Fraction(0))
    reading.check(path)
    return reading.result()


def read_pieces(
    path: str | Path, fps: int | Fraction, height: int, width: int, mode: str = "crop"
) -> Generator[torch.Tensor, None, None]:
    """Yields all frames that `read_video` returns, uint8 (n, height, width, 3), in pieces of two seconds at 24 per second.

    However long the clip is, one piece is in memory.

    Raises:
        MagiError: as `read_video`; damage is found when its place is reached.
    """
    rate = _check_arguments(fps, None, None, None, height, width, mode)
    reading = _Reading(open_clip(path), rate, Fraction(0), None, False, (height, width), mode, None)
    yield from reading.pieces(_PIECE)
    reading.check(path)


def resample(
    frames: Iterable[TimedFrame], fps: Fraction, start: Fraction = Fraction(0)
) -> Generator[TimedFrame, None, None]:
    """Yields the frame for each tick start, start + 1/fps, ... up to the end of the last frame.

    An input frame may come several times or not at all. The one for a tick is the frame on display at the tick, or the
    next one when that is nearer and due within half a tick: a jittering clock loses nothing, and a slide that stays for
    seconds is not replaced early. Frames that begin late (after a seek) leave out the ticks before them.
    """
    half = 1 / fps / 2
    shown: TimedFrame | None = None
    tick = 0
    for frame in frames:
        if shown is None:
            tick = max(0, ceil((frame.time - start) * fps))
        else:
            while (now := start + tick / fps) < frame.time:
                ahead = frame.time - now
                yield frame if ahead <= half and ahead < now - shown.time else shown
                tick += 1
        shown = frame
    if shown is not None:
        for _ in range(tick, _round((shown.time + shown.duration - start) * fps)):
            yield shown


class _Reading:
    """One reading of a clip: collects the wanted frames and what is needed to judge whether they are complete."""

    def __init__(
        self,
        clip: VideoFile | Animation,
        fps: Fraction,
        start: Fraction,
        wanted: int | None,
        tail: bool,
        size: tuple[int, int],
        mode: str,
        progress: OnProgress | None,
    ) -> None:
        self.clip, self.fps, self.start, self.wanted, self.tail = clip, fps, start, wanted, tail
        self.size, self.mode, self.progress = size, mode, progress
        self.kept: deque[torch.Tensor] = deque(maxlen=wanted)
        self.first: Fraction | None = None  # seconds decoded: from, to
        self.end = Fraction(0)
        self.count = 0  # frames read, whether they are kept or not
        self.at_end = False

    def run(self, seek: Fraction) -> bool:
        """Reads from a key frame before `seek`; returns False when that key frame comes too late for what is wanted."""
        self.kept.clear()
        with closing(self._pictures(seek)) as pictures:
            for picture in pictures:
                self.kept.append(picture)
                if len(self.kept) == self.wanted and not self.tail:
                    return True
        self.at_end = True
        return self._reaches(seek) and (seek == 0 or not self.tail or self.first == 0 or len(self.kept) == self.wanted)

    def pieces(self, count: int) -> Generator[torch.Tensor, None, None]:
        """Reads from the beginning to the end, and yields the frames `count` at a time."""
        with closing(self._pictures(Fraction(0))) as pictures:
            for picture in pictures:
                self.kept.append(picture)
                if len(self.kept) == count:
                    yield self.result()
        if self.kept:
            yield self.result()
        self.at_end = True

    def _pictures(self, seek: Fraction) -> Generator[torch.Tensor, None, None]:
        """Yields fitted frames, uint8 (H, W, 3), from `start` on; none if the key frame before `seek` comes too late."""
        self.first, self.count, self.at_end = None, 0, False
        last: TimedFrame | None = None
        with closing(self._watched(seek)) as decoded, closing(resample(decoded, self.fps, self.start)) as ticks:
            for frame in ticks:
                if not self._reaches(seek):
                    return
                if frame is not last:  # a frame for several ticks is fitted once
                    picture = fit(frame.load()[None], *self.size, self.mode)[0]
                    last = frame
                else:  # it may stay for minutes
                    self._report()
                self.count += 1
                yield picture

    def _reaches(self, seek: Fraction) -> bool:
        return seek == 0 or self.tail or (self.first is not None and self.first <= self.start)

    def _watched(self, seek: Fraction) -> Generator[TimedFrame, None, None]:
        with closing(self.clip.frames(seek)) as frames:
            for count, frame in enumerate(frames):
                if count == 0:
                    self.first = frame.time
                self.end = frame.time + frame.duration
                self._report()
                yield frame

    def _report(self) -> None:
        if self.progress:
            self.progress(len(self.kept), self.wanted or 0)

    def check(self, path: str | Path) -> None:
        """Raises MagiError when nothing or, for damage, not all was read; warns of damage that could be bridged."""
        clip, promised = self.clip, self.clip.seconds
        short = self.at_end and (self.tail or len(self.kept) != self.wanted)
        certain = promised is not None and (clip.seconds_certain or clip.errors > 0)
        end = self.end + clip.left_out
        if short and certain and promised is not None and promised - end > _TOLERANCE and promised > self.start:
            raise MagiError(
                f"{str(path)!r} is damaged or cut off: it should last {promised:.2f} s, but only the first "
                f"{float(self.end):.2f} s can be read. Copy or convert it again, or ask only for seconds before that."
            )
        if not self.count:
            raise MagiError(
                f"The start at {float(self.start):g} s is beyond the end of {str(path)!r}, which lasts {float(self.end):.2f} s. "
                "Give an earlier start."
            )
        for finding in clip.findings():
            warnings.warn(finding, stacklevel=3)

    def result(self) -> torch.Tensor:
        out = torch.empty(len(self.kept), *self.size, 3, dtype=torch.uint8)
        for target in out:  # hand over one by one: never two whole copies
            target.copy_(self.kept.popleft())
        if self.progress:
            self.progress(len(out), len(out))
        return out


def _check_arguments(
    fps: int | float | Fraction,
    start: float | None,
    seconds: float | None,
    tail_seconds: float | None,
    height: int | None,
    width: int | None,
    mode: str,
) -> Fraction:
    """Returns the rate as a fraction. Raises MagiError for an argument that cannot be."""
    check_mode(mode)
    for name, value in (("fps", fps), ("seconds", seconds), ("tail_seconds", tail_seconds)):
        if value is not None and not 0 < value < float("inf"):
            raise MagiError(f"{name} is {value}; it must be above 0.")
    if start is not None and not 0 <= start < float("inf"):
        raise MagiError(f"start is {start}; it must be 0 or more.")
    if tail_seconds is not None and (start is not None or seconds is not None):
        raise MagiError(
            "tail_seconds reads the end of the clip: leave out start and seconds, or leave out tail_seconds."
        )
    if (height is None) != (width is None) or any(side is not None and side < 1 for side in (height, width)):
        raise MagiError(
            f"A size of {width}x{height} is not possible. Give both width and height, 1 or more, or neither."
        )
    return Fraction(fps).limit_denominator(100_000)


def _round(value: Fraction) -> int:
    return floor(value + Fraction(1, 2))

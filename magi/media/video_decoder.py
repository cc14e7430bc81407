"""Moving pictures as a stream of upright RGB frames with their times: videos through PyAV, animations through PIL."""

import warnings
from collections.abc import Callable, Generator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from ..errors import MagiError
from .frames import fit, over_white
from .image import check_file, is_animation, open_image, to_rgb

# The YUV matrices by their number in the bit stream.
_MATRICES = {1: "ITU709", 4: "FCC", 5: "ITU601", 6: "ITU601", 7: "SMPTE240M", 9: "BT2020"}


class TimedFrame(NamedTuple):
    """A frame shown from `time` for `duration` (seconds, from the first frame). `load()` gives uint8 (H, W, 3) RGB."""

    time: Fraction
    duration: Fraction
    load: Callable[[], torch.Tensor]


class VideoFile:
    """A video that PyAV reads. Sizes are those shown: rotated as the camera asks, in square pixels."""

    def __init__(self, path: Path) -> None:
        """Opens the file and decodes its first frame.

        Raises:
            MagiError: not a video, no video stream, or no frame in it.
        """
        self.path = path
        self.errors = 0  # damaged packets met by the last `frames()`
        container, stream = self._open()
        with container:
            first = next(self._decode(container, stream), None)
            if first is None:
                raise MagiError(f"{str(path)!r} has a video stream without a single readable frame. Give another file.")
            self._origin = _pts(first) or 0
            self._timed = _pts(first) is not None
            self._time_base: Fraction = stream.time_base
            self.start: Fraction = self._origin * self._time_base  # of the first frame, seconds on the file's own clock
            self.has_sound = len(container.streams.audio) > 0
            self.fps: Fraction | None = stream.average_rate or stream.guessed_rate or None
            self.frame_count: int | None = stream.frames or None
            self._aspect = _pixel_aspect(stream.sample_aspect_ratio)
            self._matrix = _display_matrix(first, stream)
            self.seconds, self.seconds_certain = _duration(container, stream)
            self.height, self.width = _shown_size(first.height, first.width, self._aspect, self._matrix)
            if getattr(first, "color_trc", None) in (16, 18):  # PQ, HLG
                warnings.warn(
                    f"{str(path)!r} is an HDR video: its colours are read without tone mapping and may look flat. "
                    "Convert it to SDR for true colours.",
                    stacklevel=2,
                )

    def frames(self, near: Fraction = Fraction(0)) -> Generator[TimedFrame, None, None]:
        """Yields all frames in order, from the last key frame before `near` (seconds) where the file allows it."""
        import av

        self.errors = 0
        container, stream = self._open()
        with container:
            if near > 0 and self._timed:
                with suppress(av.error.FFmpegError, OSError):  # cannot seek: read from the beginning
                    container.seek(self._origin + int(near / self._time_base), stream=stream)
            gap = 1 / (self.fps or Fraction(24))
            last: Fraction | None = None
            for frame in self._decode(container, stream):
                pts = _pts(frame)
                time = None if pts is None else (pts - self._origin) * self._time_base
                if last is not None:
                    if time is None or time <= last:  # no time, or one that jumps back: it follows the one before
                        time = last + gap
                    elif not self.fps:
                        gap = time - last
                last = max(Fraction(0), time or Fraction(0))
                duration = (getattr(frame, "duration", None) or 0) * self._time_base
                yield TimedFrame(last, duration or gap, lambda frame=frame: self._load(frame))  # type: ignore[misc]

    def _open(self) -> tuple[Any, Any]:
        import av

        if _is_text(self.path):  # FFmpeg draws text as a video, and follows playlists to other files and the network
            raise MagiError(f"{str(self.path)!r} is not a video but a text file or playlist. Give the video itself.")
        try:
            container = open_container(self.path, options={"protocol_whitelist": "file"})
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise MagiError(
                f"{str(self.path)!r} is not a video that can be read, or it is cut off ({_reason(error)}). "
                "Play it to see whether it is whole, and convert it to MP4 if it is."
            ) from error
        streams = [stream for stream in container.streams.video if not _is_cover(stream)]
        if not streams or container.format.name == "tty":
            container.close()
            raise MagiError(f"{str(self.path)!r} has no video stream. Give a video file.")
        streams[0].thread_type = "AUTO"
        return container, streams[0]

    def _decode(self, container: Any, stream: Any) -> Generator[Any, None, None]:
        import av

        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except (av.error.FFmpegError, OSError):
                self.errors += 1
                return
            try:
                yield from packet.decode()
            except av.error.EOFError:
                return
            except (av.error.FFmpegError, OSError):
                self.errors += 1  # decoders recover at the next key frame

    def _load(self, frame: Any) -> torch.Tensor:
        has_alpha = any(component.is_alpha for component in frame.format.components) or frame.format.name == "pal8"
        options = {} if frame.format.is_rgb else _colours(frame)
        array = frame.reformat(format="rgba" if has_alpha else "rgb24", **options).to_ndarray()
        picture = torch.from_numpy(array if array.flags.writeable else array.copy())
        if has_alpha:
            picture = over_white(picture)
        width = round(picture.shape[1] * self._aspect)
        picture = fit(picture[None], picture.shape[0], width, "stretch")[0]
        return _orient(picture, self._matrix)


class Animation:
    """An animated GIF, WebP, PNG or AVIF, through PIL: FFmpeg does not read all of them. Same use as `VideoFile`."""

    errors = 0
    seconds_certain = False

    def __init__(self, path: Path) -> None:
        """Opens the file and reads its first frame. Length and rate stay None: only reading it all would tell.

        Raises:
            MagiError: the frame is damaged.
        """
        self.path = path
        self.seconds: float | None = None
        self.fps: Fraction | None = None
        with self._open() as image:
            self.frame_count: int = getattr(image, "n_frames", 1)
            self.height, self.width = to_rgb(image, path).shape[:2]

    def frames(self, near: Fraction = Fraction(0)) -> Generator[TimedFrame, None, None]:
        """Yields all frames in order; `near` is not used, since every frame builds on the one before."""
        with self._open() as image:
            time = Fraction(0)
            for index in range(self.frame_count):
                try:
                    image.seek(index)
                except (EOFError, OSError, SyntaxError) as error:
                    raise MagiError(
                        f"{str(self.path)!r} is damaged: frame {index + 1} of {self.frame_count} cannot be read. "
                        "Save it again, or ask only for the seconds before that."
                    ) from error
                picture = to_rgb(image, self.path)
                milliseconds = float(image.info.get("duration") or 0)
                # Browsers show frames of 10 ms or less for 100 ms, and animations are made for browsers.
                duration = Fraction(milliseconds if milliseconds > 10 else 100.0) / 1000
                yield TimedFrame(time, duration, lambda picture=picture: picture)  # type: ignore[misc]
                time += duration

    def _open(self) -> Image.Image:
        image = open_image(self.path)
        if image is None:
            raise MagiError(f"The file {str(self.path)!r} was replaced while it was read. Try again.")
        return image


def open_container(path: Path, **options: Any) -> Any:
    """Opens a file with PyAV; undecodable text in its tags is replaced."""
    import av

    open_file: Any = av.open  # its arguments differ between versions
    try:
        return open_file(str(path), metadata_errors="replace", **options)
    except TypeError:  # PyAV 19 has no such argument any more
        return open_file(str(path), **options)


def open_clip(path: str | Path) -> VideoFile | Animation:
    """Opens the moving picture in a file.

    Raises:
        MagiError: there is no such file, or it is a still picture, not a video, or unreadable.
    """
    path = check_file(path)
    image = open_image(path)
    if image is None:
        return VideoFile(path)
    with image:
        if not is_animation(image):
            raise MagiError(f"{str(path)!r} is a still picture, not a video. Use it as an image.")
    return Animation(path)


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(1024)
    controls = set(range(32)) - set(b"\t\n\f\r\x1b")
    return controls.isdisjoint(head) and not head.startswith(b"YUV4MPEG2")


def _pts(frame: Any) -> int | None:
    return frame.pts if frame.pts is not None else frame.dts


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _is_cover(stream: Any) -> bool:
    # Album art in audio files is a video stream of one picture. PyAV before 13 cannot tell.
    disposition = getattr(stream, "disposition", None)
    return disposition is not None and bool(disposition & type(disposition).attached_pic)


def _pixel_aspect(aspect: Fraction | None) -> Fraction:
    # Nearly square is square (a resize would only blur), and a nonsensical value is no value.
    if not aspect or not Fraction(1, 8) < aspect < 8 or abs(aspect - 1) < Fraction(1, 100):
        return Fraction(1)
    return aspect


def _duration(container: Any, stream: Any) -> tuple[float | None, bool]:
    """Returns the seconds by the header, and whether they are the video's, not those of a longer audio track."""
    of_stream = float(stream.duration * stream.time_base) if stream.duration else None
    of_file = container.duration / 1_000_000 if container.duration else None
    if of_file and "matroska" in container.format.name:  # it counts from 0, not from the first frame
        of_file -= (container.start_time or 0) / 1_000_000
    if of_stream is not None and of_file is not None:
        return min(of_stream, of_file), True  # a trimmed clip keeps its full stream behind an edit list
    return of_stream or of_file, of_stream is not None or len(container.streams) == 1


def _display_matrix(frame: Any, stream: Any) -> tuple[int, int, int, int]:
    """Returns the linear part (a, b, c, d) of the display transform: right goes to (a, b), down to (c, d)."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return (1, 0, 0, 1)
    values = memoryview(bytes(data)).cast("i")
    return (values[0], values[1], values[3], values[4])


def _is_turned(matrix: tuple[int, int, int, int]) -> bool:
    a, b, c, d = matrix
    return abs(b) + abs(c) > abs(a) + abs(d)


def _orient(picture: torch.Tensor, matrix: tuple[int, int, int, int]) -> torch.Tensor:
    """Turns and mirrors a picture (H, W, 3) to the nearest of the eight ways a rectangle can lie."""
    a, b, c, d = matrix
    if _is_turned(matrix):
        picture, a, d = picture.transpose(0, 1), c, b
    flips = [dim for dim, sign in ((0, d), (1, a)) if sign < 0]
    return (picture.flip(flips) if flips else picture).contiguous()


def _shown_size(height: int, width: int, aspect: Fraction, matrix: tuple[int, int, int, int]) -> tuple[int, int]:
    width = round(width * aspect)
    return (width, height) if _is_turned(matrix) else (height, width)


def _colours(frame: Any) -> dict[str, Any]:
    """Returns a YUV frame's matrix and range for PyAV's conversion; not every version takes them from the frame."""
    from av.video.reformatter import Colorspace

    space = int(frame.colorspace)
    if space not in _MATRICES:  # unspecified: the convention is BT.709 for HD, BT.601 below
        space = 1 if frame.height >= 720 else 5
    matrix = _MATRICES[space] if hasattr(Colorspace, _MATRICES[space]) else "ITU709"
    full = int(frame.color_range) == 2 or frame.format.name.startswith("yuvj")
    return {"src_colorspace": matrix, "src_color_range": "JPEG" if full else "MPEG", "dst_color_range": "JPEG"}

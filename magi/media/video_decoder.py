"""Moving pictures as a stream of upright RGB frames with their times: videos through PyAV, animations through PIL."""

from collections.abc import Callable, Generator
from contextlib import closing, suppress
from errno import EINVAL
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from ..errors import MagiError
from .clip_clock import LONGEST, ClipClock
from .containers import has_disposition, main_stream, media_errors, open_container, readable, reason_of
from .deinterlacing import can_deinterlace, progressive
from .frames import MAX_PIXELS, check_pixels, fit, over_white
from .image import check_file, count_frames, is_animation, open_image, to_rgb

_LARGE = 8192 * 4320  # pixels

# The YUV matrices by their number in the bit stream.
_MATRICES = {1: "ITU709", 4: "FCC", 5: "ITU601", 6: "ITU601", 7: "SMPTE240M", 9: "BT2020"}


class TimedFrame(NamedTuple):
    """A frame shown from `time` for `duration` (seconds, from the first frame). `load()` gives uint8 (H, W, 3) RGB."""

    time: Fraction
    duration: Fraction
    load: Callable[[], torch.Tensor]


class VideoFile:
    """A video that PyAV reads. Sizes are those shown: rotated as the camera asks, in square pixels.

    Attributes:
        notices: sentences on what of the file makes its frames other than one may expect, for the user to read.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file and decodes its first frame.

        Raises:
            MagiError: not a video, no video stream, no frame in it, or frames that are far too large.
        """
        self.path = path
        self.errors = 0  # damaged packets met by the last `frames()`
        self.left_out = Fraction(0)  # seconds by which the clock jumped ahead in the last `frames()`
        self._deinterlaced = False
        container, stream, decoder = self._open()
        with container, readable(path):
            check_pixels(stream.height, stream.width, str(path))
            with closing(self._decode(container, stream, decoder)) as decoded:
                first = next(decoded, None)
            if first is None:
                raise MagiError(f"{str(path)!r} has a video stream without a single readable frame. Give another file.")
            self._origin = _pts(first) or 0
            self._time_base: Fraction = stream.time_base or Fraction(1, 1000)
            # Without times nothing can be sought, and a palette is told once and holds until the next one.
            self._seekable = _pts(first) is not None and first.format.name != "pal8"
            self.start: Fraction = self._origin * self._time_base  # of the first frame, seconds on the file's own clock
            self.has_sound = len(container.streams.audio) > 0
            self.fps: Fraction | None = stream.average_rate or stream.guessed_rate or None
            self.frame_count: int | None = stream.frames or None
            self._aspect = _pixel_aspect(stream.sample_aspect_ratio)
            self._matrix = _display_matrix(first, stream)
            self.seconds, self.seconds_certain = _duration(container, stream)
            self.height, self.width = _shown_size(first.height, first.width, self._aspect, self._matrix)
            check_pixels(self.height, self.width, str(path))
            self.notices = tuple(self._notices(container, stream, first, decoder is not stream.codec_context))

    def frames(self, near: Fraction = Fraction(0)) -> Generator[TimedFrame, None, None]:
        """Yields all frames in order, from the last key frame before `near` (seconds) where the file allows it.

        Raises:
            MagiError: the file cannot be read any more, or what a frame's `load()` is to convert.
        """
        self.errors, self.left_out, self._deinterlaced = 0, Fraction(0), False
        container, stream, decoder = self._open()
        with container, readable(self.path):
            if near > 0 and self._seekable:
                with suppress(*media_errors()):  # cannot seek: read from the beginning
                    container.seek(self._origin + int(near / self._time_base), stream=stream)
            clock = ClipClock(self.fps)
            with closing(self._decode(container, stream, decoder)) as decoded:
                for frame in progressive(decoded, self._note_interlaced):
                    pts = _pts(frame)
                    time = clock.time(None if pts is None else (pts - self._origin) * self._time_base)
                    self.left_out = clock.left_out
                    duration = clock.duration((getattr(frame, "duration", None) or 0) * self._time_base)
                    yield TimedFrame(time, duration, lambda frame=frame: self._load(frame))  # type: ignore[misc]

    def _open(self) -> tuple[Any, Any, Any]:
        """Returns the open container, the stream that is meant, and what decodes it."""
        try:
            container = open_container(self.path)
        except media_errors() as error:
            if _is_text(self.path):
                raise MagiError(
                    f"{str(self.path)!r} is not a video but a text file or playlist. Give the video itself."
                ) from error
            if getattr(error, "errno", None) == EINVAL:  # what FFmpeg says of a kind that it may not open
                raise MagiError(
                    f"{str(self.path)!r} is not a video, or of a kind that is not read. Convert it to MP4."
                ) from error
            raise MagiError(
                f"{str(self.path)!r} is not a video that can be read, or it is cut off ({reason_of(error)}). "
                "Play it to see whether it is whole, and convert it to MP4 if it is."
            ) from error
        stream = main_stream(_tracks(container))
        if stream is None:
            container.close()
            raise MagiError(
                f"{str(self.path)!r} has no video stream that can be read. Give a video file, or convert it to MP4."
            )
        decoder = _decoder_with_alpha(stream) or stream.codec_context
        decoder.options = {"max_pixels": str(MAX_PIXELS)}  # a stream may hold larger frames than its container says
        # Each thread holds a frame: a few of 8K are enough.
        decoder.thread_type = "AUTO" if stream.width * stream.height <= _LARGE else "SLICE"
        return container, stream, decoder

    def _decode(self, container: Any, stream: Any, decoder: Any) -> Generator[Any, None, None]:
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except media_errors():
                self.errors += 1
                return
            try:
                yield from decoder.decode(packet)
            except EOFError:
                return
            except media_errors():
                self.errors += 1  # decoders recover at the next key frame

    def _load(self, frame: Any) -> torch.Tensor:
        has_alpha = _has_alpha(frame)
        options = {} if frame.format.is_rgb else _colours(frame)
        with readable(self.path):
            array = frame.reformat(format="rgba" if has_alpha else "rgb24", **options).to_ndarray()
        picture = torch.from_numpy(array if array.flags.writeable else array.copy())
        if has_alpha:
            picture = over_white(picture)
        width = max(1, round(picture.shape[1] * self._aspect))
        picture = fit(picture[None], picture.shape[0], width, "stretch")[0]
        return _orient(picture, self._matrix)

    def _notices(self, container: Any, stream: Any, first: Any, with_alpha: bool) -> Generator[str, None, None]:
        """Yields a sentence for each thing about the file that makes its frames other than one may expect."""
        name, tracks = repr(str(self.path)), _tracks(container)
        if len(tracks) > 1:
            yield f"{name} has {len(tracks)} video tracks: number {tracks.index(stream) + 1} is read, as players do."
        if first.interlaced_frame:
            yield self._interlaced()
        if _alpha_aside(stream) and not with_alpha:
            yield (
                f"{name} has transparency that this PyAV cannot read: what it should hide is seen. "
                "Install the official wheel (pip install av), or lay the video over a background first."
            )
        if getattr(first, "color_trc", None) in (16, 18):  # PQ, HLG
            yield (
                f"{name} is an HDR video: its colours are read without tone mapping and may look flat. "
                "Convert it to SDR for true colours."
            )

    def findings(self) -> list[str]:
        """Returns the `notices`, and a sentence for each thing that the last `frames()` met and could bridge."""
        name, found = repr(str(self.path)), list(self.notices)
        if self.errors:
            found.append(
                f"{name} is damaged in {self.errors} place(s); the frames before each stand in for those that are lost."
            )
        if self.left_out:
            found.append(f"The clock of {name} jumps ahead by {float(self.left_out):,.0f} s: that time is left out.")
        if self._deinterlaced and self._interlaced() not in found:
            found.append(self._interlaced())
        return found

    def _note_interlaced(self) -> None:
        self._deinterlaced = True

    def _interlaced(self) -> str:
        if can_deinterlace():
            return f"{str(self.path)!r} is interlaced: each two fields are made one frame (deinterlaced)."
        return (
            f"{str(self.path)!r} is interlaced, and this PyAV cannot change that: what moves looks combed. "
            "Deinterlace it first."
        )


class Animation:
    """An animated GIF, WebP, PNG or AVIF, through PIL: FFmpeg does not read all of them. Same use as `VideoFile`."""

    errors = 0
    seconds_certain = False
    left_out = Fraction(0)

    def __init__(self, path: Path) -> None:
        """Opens the file and reads its first frame. Length and rate stay None: only reading it all would tell.

        Raises:
            MagiError: the frame is damaged.
        """
        self.path = path
        self.seconds: float | None = None
        self.fps: Fraction | None = None
        with self._open() as image:
            self.frame_count: int = count_frames(image, path)
            self.height, self.width = to_rgb(image, path).shape[:2]

    def frames(self, near: Fraction = Fraction(0)) -> Generator[TimedFrame, None, None]:
        """Yields all frames in order; `near` is not used, since every frame builds on the one before.

        Raises:
            MagiError: a frame is damaged.
        """
        time = Fraction(0)
        for image in self._images():
            picture = to_rgb(image, self.path)
            duration = _shown_for(image)
            yield TimedFrame(time, duration, lambda picture=picture: picture)  # type: ignore[misc]
            time += duration

    def whole_seconds(self) -> Fraction:
        """Returns how long all frames last together, by going through them. Raises MagiError as `frames`."""
        return sum((_shown_for(image) for image in self._images(load=True)), Fraction(0))

    def findings(self) -> list[str]:
        """Returns nothing: an animation is read as it is, or not at all."""
        return []

    def _images(self, load: bool = False) -> Generator[Image.Image, None, None]:
        with self._open() as image:
            for index in range(self.frame_count):
                try:
                    image.seek(index)
                    check_pixels(image.height, image.width, str(self.path))  # a frame may be larger than the first
                    if load:
                        image.load()
                except MagiError:
                    raise
                except Exception as error:  # PIL's readers raise whatever they stumble over
                    raise MagiError(
                        f"{str(self.path)!r} is damaged: frame {index + 1} of {self.frame_count} cannot be read. "
                        "Save it again, or ask only for the seconds before that."
                    ) from error
                yield image

    def _open(self) -> Image.Image:
        image = open_image(self.path)
        if image is None:
            raise MagiError(f"The file {str(self.path)!r} was replaced while it was read. Try again.")
        return image


def _shown_for(image: Image.Image) -> Fraction:
    """Returns the seconds that an animation's current frame stays, which some formats tell only once it is loaded."""
    milliseconds = float(image.info.get("duration") or 0)
    # Browsers show frames of 10 ms or less for 100 ms, and animations are made for browsers.
    return min(Fraction(milliseconds if milliseconds > 10 else 100.0) / 1000, LONGEST)


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
        if not is_animation(image, path):
            raise MagiError(f"{str(path)!r} is a still picture, not a video. Use it as an image.")
    return Animation(path)


def _is_text(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as file:
        head = file.read(1024)
        return bool(head) and (set(range(32)) - set(b"\t\n\f\r\x1b")).isdisjoint(head)
    return False


def _pts(frame: Any) -> int | None:
    return frame.pts if frame.pts is not None else frame.dts


def _tracks(container: Any) -> list[Any]:
    """Returns the video streams of a file but for album art and thumbnails, which are pictures beside it."""
    covers = ("attached_pic", "timed_thumbnails")
    return [s for s in container.streams.video if not any(has_disposition(s, cover) for cover in covers)]


def _alpha_aside(stream: Any) -> bool:
    """Returns whether transparency lies beside the picture's packets, where WebM keeps it and FFmpeg does not look."""
    return any(key.lower() == "alpha_mode" and value == "1" for key, value in stream.metadata.items())


def _decoder_with_alpha(stream: Any) -> Any | None:
    """Returns a decoder that sees what lies aside; None where there is nothing, or this PyAV has none."""
    import av

    name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.name)
    if name is None or not _alpha_aside(stream):
        return None
    try:
        decoder = av.CodecContext.create(name, "r")
    except media_errors():  # PyAV has an error of its own for a name that it does not know, a ValueError
        return None
    decoder.extradata = stream.codec_context.extradata
    return decoder


def _has_alpha(frame: Any) -> bool:
    return any(component.is_alpha for component in frame.format.components) or frame.format.name == "pal8"


def _pixel_aspect(aspect: Fraction | None) -> Fraction:
    # Nearly square is square (a resize would only blur), and a nonsensical value is no value.
    if not aspect or not Fraction(1, 8) < aspect < 8 or abs(aspect - 1) < Fraction(1, 100):
        return Fraction(1)
    return aspect


def _duration(container: Any, stream: Any) -> tuple[float | None, bool]:
    """Returns the seconds by the header, and whether they are the video's, not those of a longer audio track."""
    of_stream = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else None
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

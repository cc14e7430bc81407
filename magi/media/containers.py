"""Files of moving pictures and sound, as PyAV opens them: which kinds are read, and which of their tracks is meant."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import MagiError
from .frames import MAX_PIXELS

# FFmpeg's names of what a clip may come in. Everything else that FFmpeg reads stays shut: playlists and scripts, which
# lead to other files and the network, sequences of numbered files, text that is drawn as a video, single pictures.
_FORMATS = (
    *("mov", "matroska", "avi", "mpegts", "mpeg", "mxf", "ogg", "flv", "asf", "nut", "rm", "gxf", "dv", "wtv", "ivf"),
    *("h264", "hevc", "vvc", "av1", "obu", "m4v", "mpegvideo", "h263", "h261", "vc1", "dirac", "mjpeg", "yuv4mpegpipe"),
    *("swf", "nsv", "nuv", "pva", "smk", "bink", "roq", "flic", "film_cpk", "dhav", "mpjpeg", "jpegxl_anim"),
)

# Seconds that opening or reading on may take. FFmpeg asks again for ever where a drive says "later".
_PATIENCE = 60


def open_container(file: Path | BinaryIO) -> Any:
    """Opens a clip with PyAV, for the caller to close; undecodable text in its tags is replaced.

    Raises:
        Exception: one of `media_errors`, also where the file is of a kind that is not read.
    """
    import av

    open_file: Any = partial(av.open, timeout=_PATIENCE)  # its arguments differ between versions
    source = str(file) if isinstance(file, Path) else file
    options = {"format_whitelist": ",".join(_FORMATS), "protocol_whitelist": "file", "max_pixels": str(MAX_PIXELS)}
    try:
        return open_file(source, metadata_errors="replace", options=options)
    except TypeError:  # PyAV 19 has no such argument any more
        return open_file(source, options=options)


def media_errors() -> tuple[type[Exception], ...]:
    """Returns what PyAV raises for a file that is damaged, of another kind, or on a disk that fails."""
    import av

    # A BlockingIOError is an OSError; a name or a number that FFmpeg cannot take is a ValueError or OverflowError.
    return (av.error.FFmpegError, OSError, ValueError, OverflowError, EOFError)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Makes a MagiError that names `path` of what PyAV raises within."""
    try:
        yield
    except media_errors() as error:
        raise MagiError(
            f"{str(path)!r} cannot be read ({reason_of(error)}). Play it to see whether it is whole, and convert it to MP4 if it is."
        ) from error


def main_stream(streams: Any) -> Any | None:
    """Returns the stream that a player takes, of those that can be decoded: the default one, else the first."""
    known = [stream for stream in streams if stream.codec_context is not None]
    return next((stream for stream in known if has_disposition(stream, "default")), next(iter(known), None))


def has_disposition(stream: Any, name: str) -> bool:
    """Returns whether a stream is marked so in its file. PyAV before 13 cannot tell: then False."""
    disposition = getattr(stream, "disposition", None)
    return disposition is not None and bool(disposition & getattr(type(disposition), name))


def reason_of(error: Exception) -> str:
    """Returns what an error says, without the file's name, which PyAV puts behind it."""
    if type(error).__name__ == "ExitError":  # PyAV's, of `_PATIENCE`
        return f"its drive did not answer for {_PATIENCE} seconds"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__

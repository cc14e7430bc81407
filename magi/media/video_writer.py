"""An MP4 that grows chunk by chunk and can be played at every moment, even after the process was killed.

While it runs it is a fragmented MP4 under a partial name, and every `write` appends whole fragments and syncs them to
the disk. A clean end copies it, without encoding again, into an ordinary MP4 (index first), with the sound if there is
any, and only then gives it the final name.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from fractions import Fraction
from heapq import merge
from io import BytesIO, FileIO
from itertools import chain, count
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ..config import FPS
from ..errors import MagiError
from ..system.paths import user_path
from ..system.progress import OnProgress
from ..system.whole_files import put_in_place
from .containers import media_errors, open_container
from .frames import check_size
from .mp4_fragments import boxes, find_encoder, tag_flags

# Longer writes are cut into pieces of this many frames: it bounds memory, and the work that a crash can cost.
_PIECE = 48

# Tags that the muxer itself writes into every file.
_CONTAINER_TAGS = {"major_brand", "minor_version", "compatible_brands", "encoder"}


class VideoWriter:
    """Context manager that writes an H.264 (yuv420p, BT.709) MP4 at exactly `fps` frames per second, the first at 0.

    When the with-block ends well, the video is at `path`. When an exception leaves it, what was written stays playable
    at `partial_path`, and the exception is raised on; without any frame no file is left.

    Attributes:
        sound: made by `encode_sound`; it is in the finished video only. None: there is no sound.
        on_whole: called with the finished file just before it gets its final name; None: nothing is called.
    """

    def __init__(
        self,
        path: str | Path,
        height: int,
        width: int,
        fps: int | Fraction = FPS,
        crf: int = 18,
        metadata: dict[str, str] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Checks everything by trying it: the folder (made if missing), the name, and an encoder for the size.

        Args:
            path: the final name, ending in .mp4.
            height: of all frames; even.
            width: of all frames; even.
            fps: frames per second.
            crf: quality of libx264, 1 (best) to 51.
            metadata: tags to store, such as title and comment; any key. `read_metadata` returns them.
            overwrite: whether a file of that name may be replaced; until the end it stays as it is. Without it, one that
                appears meanwhile is not replaced either.

        Raises:
            MagiError: a bad argument, a name that is taken or cannot be written, or no encoder.
        """
        check_size(height, width, multiple=2)
        if not 0 < fps <= 1000:
            raise MagiError(f"fps is {fps}; it must be above 0 and at most 1000.")
        if not 1 <= crf <= 51:
            raise MagiError(f"crf is {crf}; it must be from 1 (best) to 51. 18 is hard to tell from the original.")
        self.path = user_path(path).absolute()
        self.height, self.width, self.fps = height, width, Fraction(fps).limit_denominator(100_000)
        self.overwrite = overwrite
        self.frames_written = 0
        self.sound: bytes | None = None
        self.on_whole: Callable[[Path], None] | None = None
        self._metadata = {_as_tag(str(key)): _as_tag(str(value)) for key, value in (metadata or {}).items()}
        self._check_path()
        self._encoder = find_encoder(height, width, self.fps, crf, self._metadata)
        self._file: FileIO | None = None
        self._header = b""
        self._fragments = 0
        self.partial_path, trial = self._create_partial()
        trial.close()
        _remove(self.partial_path)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            if self.frames_written == 0:
                _remove(self.partial_path)
        if error is not None:
            return
        if self.frames_written == 0:
            raise MagiError(f"No frame was written, so {str(self.path)!r} was not made. Ask for at least one frame.")
        self._finish()

    def write(self, frames: torch.Tensor, progress: OnProgress | None = None) -> None:
        """Appends frames, uint8 (T, height, width, 3) RGB from any device; on return they are on the disk.

        `progress(frames done, frames)` is called after each frame and may raise to stop; whole pieces of 48 frames
        before that are kept.

        Raises:
            MagiError: frames of another shape or type, or the disk is full.
        """
        if frames.dtype != torch.uint8 or frames.ndim != 4 or tuple(frames.shape[1:]) != (self.height, self.width, 3):
            raise MagiError(
                f"The frames are {frames.dtype} {tuple(frames.shape)}; "
                f"this video takes torch.uint8 (T, {self.height}, {self.width}, 3)."
            )
        total = len(frames)
        for start in range(0, total, _PIECE):
            piece = frames[start : start + _PIECE].detach().cpu().contiguous()
            step = None if progress is None else (lambda done, start=start: progress(start + done, total))
            self._append(piece, step)

    def _append(self, frames: torch.Tensor, progress: Callable[[int], None] | None) -> None:
        import av

        try:
            piece = self._encoder.encode(frames, self.frames_written, self._fragments, progress)
        except av.error.FFmpegError as error:
            raise MagiError(f"The encoder {self._encoder.name} failed: {error}. {self._kept()}") from error
        if self._header and piece.header != self._header:
            raise MagiError(f"The encoder {self._encoder.name} changed its settings midway. {self._kept()}")
        try:
            if self._file is None:
                self.partial_path, self._file = self._create_partial()
            _append_whole(self._file, b"" if self._header else piece.header, piece.fragments)
        except OSError as error:
            raise self._failed("be written", error) from error
        self._header = piece.header
        self._fragments += piece.count
        self.frames_written += len(frames)

    def _check_path(self) -> None:
        try:
            if os.name == "nt":  # Windows takes names with half a character in them, FFmpeg does not
                str(self.path).encode()
            check_name(self.path, self.overwrite)
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise self._failed("be made", error) from error

    def _create_partial(self) -> tuple[Path, FileIO]:
        """Creates a partial file of a free name: one left by an earlier run holds chunks that nobody may overwrite."""
        for suffix in chain([""], (f"-{number}" for number in count(2))):
            path = self.path.with_name(f"{self.path.stem}.partial{suffix}.mp4")
            try:
                return path, FileIO(path, "x")
            except FileExistsError:
                continue
            except (OSError, ValueError) as error:
                raise self._failed("be written", error) from error
        raise AssertionError("unreachable: the names do not end")

    def _finish(self) -> None:
        # The partial name is ours alone, so this one is too.
        final = self.partial_path.with_suffix(".tmp")
        try:
            frames = self._remux(final)
            if frames != self.frames_written or not _is_whole(final):
                raise MagiError(f"{str(self.path)!r} could not be finished. {self._kept()}")
            if self.on_whole:
                self.on_whole(final)
            put_in_place(final, self.path, overwrite=self.overwrite)
        except FileExistsError as error:
            raise MagiError(
                f"{str(self.path)!r} was made by something else while this video was, and is not replaced. {self._kept()} "
                "That is all of it: give it a name of your own."
            ) from error
        except media_errors() as error:
            raise self._failed("be finished", error) from error
        finally:
            _remove(final)
        _remove(self.partial_path)

    def _remux(self, final: Path) -> int:
        """Copies the packets into an ordinary MP4 with its index first. Returns the number of those of the picture."""
        import av

        flags = "+faststart" + tag_flags(self._metadata)
        frames = 0
        with ExitStack() as files:
            picture = files.enter_context(open_container(self.partial_path)).streams.video[0]
            sources = [picture]
            if self.sound is not None:
                sources.append(files.enter_context(open_container(BytesIO(self.sound))).streams.audio[0])
            target = files.enter_context(av.open(str(final), "w", format="mp4", options={"movflags": flags}))
            target.metadata.update(self._metadata)
            streams = {source: _copy_of(source, target) for source in sources}
            # Side by side in the file as they are in time, so that players need not jump back and forth.
            for packet in merge(*map(_packets, sources), key=lambda packet: packet.dts * packet.time_base):
                frames += packet.stream is picture
                packet.stream = streams[packet.stream]
                target.mux(packet)
        return frames

    def _kept(self) -> str:
        if self.frames_written == 0:
            return "Nothing had been written before."
        return f"The first {self.frames_written} frames are kept, playable, in {str(self.partial_path)!r}."

    def _failed(self, what: str, error: Exception) -> MagiError:
        if type(error) in (
            ValueError,
            UnicodeEncodeError,
        ):  # a zero, half a character; FFmpeg's errors derive from them
            return MagiError(f"The output {str(self.path)!r} is a name that no file can have. Give another one.")
        reason = getattr(error, "strerror", None) or error
        return MagiError(
            f"The video {str(self.path)!r} cannot {what}: {reason}. "
            f"Make room in {str(self.path.parent)!r}, or choose a folder that can be written. {self._kept()}"
        )


def check_name(path: Path, overwrite: bool) -> None:
    """Raises MagiError unless a video may be given the name `path`."""
    if path.suffix.lower() != ".mp4":
        raise MagiError(f"The output {str(path)!r} does not end in .mp4. Give a file name such as clip.mp4.")
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:  # too long, or with a character that no name has
        reason = getattr(error, "strerror", None) or error
        raise MagiError(
            f"The output {str(path)[:200]!r} cannot be a file's name: {reason}. Give another one."
        ) from error
    if is_folder:
        raise MagiError(f"The output {str(path)!r} is a folder. Give a file name in it.")
    if exists and not overwrite:
        raise MagiError(
            f"The output {str(path)!r} exists. Give another name, or allow it to be overwritten (--overwrite)."
        )


def read_metadata(path: str | Path) -> dict[str, str]:
    """Returns the tags that a video was written with, without those that every MP4 has.

    Raises:
        MagiError: there is no such file, or it is not a video.
    """
    from .image import check_file

    path = check_file(path)
    try:
        with open_container(path) as container:
            return {key: value for key, value in container.metadata.items() if key not in _CONTAINER_TAGS}
    except media_errors() as error:
        raise MagiError(f"{str(path)!r} is not a video that can be read ({error}). Give an MP4 file.") from error


def is_partial_of(partial: Path, video: Path) -> bool:
    """Returns whether a name is one that a writer of `video` gives to what it has not finished."""
    return re.fullmatch(rf"{re.escape(video.stem)}\.partial(-\d+)?\.mp4", partial.name) is not None


def _remove(path: Path) -> None:
    with suppress(OSError):  # Windows: a player has it open. The video is finished all the same
        path.unlink(missing_ok=True)


def _as_tag(text: str) -> str:
    """Returns text as a file can hold it: halves of a character are put together or replaced, what ends a text is not."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "\N{REPLACEMENT CHARACTER}")


def _append_whole(file: FileIO, header: bytes, fragments: bytes) -> None:
    """Appends `header` and `fragments` and syncs them; after a failure or crash at any byte the file plays as before.

    Players refuse a file that ends within a fragment's description. So the fragments lie in a box of the type "free",
    which players skip, until all bytes are on the disk; then its first eight bytes become what they should be.
    """
    end = file.seek(0, os.SEEK_END)
    disguise = len(fragments).to_bytes(4, "big") + b"free"
    try:
        data = memoryview(header + disguise + fragments[8:])
        while data:  # a raw file may take less than all, as it does when the disk is about to be full
            data = data[file.write(data) :]
        os.fsync(file.fileno())
        file.seek(end + len(header))
        file.write(fragments[:8])
        os.fsync(file.fileno())
    except BaseException:
        file.truncate(end)
        raise


def _copy_of(source: Any, target: Any) -> Any:
    """Adds a stream like `source` to an open file."""
    if hasattr(target, "add_stream_from_template"):
        return target.add_stream_from_template(source)
    return target.add_stream(template=source)  # PyAV before 14


def _packets(stream: Any) -> Iterator[Any]:
    """Yields a stream's packets but for the empty one at the end."""
    return (packet for packet in stream.container.demux(stream) if packet.dts is not None)


def _is_whole(path: Path) -> bool:
    """Returns whether an MP4 has its index and its data, to the last byte."""
    with path.open("rb") as file:
        parts = list(boxes(file))
    kinds = [kind for kind, _, _ in parts]
    return b"moov" in kinds and b"mdat" in kinds and sum(parts[-1][1:]) == path.stat().st_size

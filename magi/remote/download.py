"""Downloads a finished video: streamed, limited in size, and renamed to its final name only when it is whole."""

import tempfile
import time
import uuid
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, BinaryIO

from ..errors import MagiError
from ..media.video_decoder import VideoFile, open_clip
from ..system.threads import Worker, pause
from ..system.whole_files import put_in_place
from .api import Api
from .deadline import Deadline
from .errors import GoneError, RemoteError, TemporaryError
from .polling import Limits, poll
from .progress import Watch
from .request import RemoteRequest
from .transport import SLOWEST, Lost, content_length, retry_after

if TYPE_CHECKING:
    import requests

_BLOCK = 1 << 16
_LEFT_SECONDS = 3600.0  # without a byte, after which no process writes to a file any more
_PIXELS = {"480p": 480, "720p": 720}  # of the shorter side
_NEAR = 0.1  # relative tolerance of sizes; encoders round


@dataclass(frozen=True)
class Facts:
    """Length and size of a video file, found by decoding all of it."""

    frames: int
    fps: float
    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.frames} frames, {self.fps:g} per second, {self.width}x{self.height}"

    def differences(self, asked: RemoteRequest) -> list[str]:
        """Lists what differs from the request, in sentences."""
        found = []
        if self.frames != asked.num_frames:
            found.append(f"The video has {self.frames} frames instead of {asked.num_frames}.")
        if abs(self.fps - asked.fps) > 0.1:
            found.append(f"The video has {self.fps:g} frames per second instead of {asked.fps}.")
        short, side = min(self.width, self.height), _PIXELS[asked.resolution]
        if abs(short / side - 1) > _NEAR and abs(self.width * self.height / (side * side * 16 / 9) - 1) > 2 * _NEAR:
            found.append(f"The video is {self.width}x{self.height} instead of {asked.resolution}.")
        if asked.aspect_ratio != "auto":
            wide, high = map(int, asked.aspect_ratio.split(":"))
            if abs(self.width / self.height * high / wide - 1) > _NEAR:
                found.append(f"The video is {self.width}x{self.height} instead of {asked.aspect_ratio}.")
        return found


def check_folder(folder: Path) -> None:
    """Creates `folder` and removes what killed downloads left there. Raises MagiError where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for left in folder.glob("magi1_*.mp4.part"):  # by a process that was killed
            with suppress(FileNotFoundError):  # another run has just finished it
                if time.time() - left.stat().st_mtime > _LEFT_SECONDS:
                    _remove(left)
    except OSError as error:
        raise _unwritable(folder, error) from error


def fetch(
    api: Api, task_id: str, outputs: tuple[str, ...], folder: Path, limits: Limits, watch: Watch
) -> tuple[Path, str, Facts]:
    """Downloads a task's video into `folder` and returns (the file, its URL, its facts).

    If its URL has expired, the task is asked for a new one, once.

    Raises:
        RemoteError: the download failed; the task is still there.
    """
    kept = f"The video is kept by the service for about 7 days as task {task_id}: run it again, and it is fetched without a new task."
    url, asked_again, failures = outputs[0], False, 0
    while True:
        watch.phase("download", "downloading")
        try:
            path = _download(api, task_id, url, folder, limits, watch)
            try:
                watch.phase("read", "reading the video")
                return path, url, inspect(path, watch)
            except MagiError as error:
                _remove(path)
                reason = f"What lies at {api.transport.shown_url(url)} is no whole video ({api.transport.redact(str(error))})"
                raise RemoteError(f"{reason} {kept}") from None
            except BaseException:
                _remove(path)
                raise
        except GoneError as error:
            if asked_again:
                raise RemoteError(
                    f"The video could not be downloaded: {error}. {kept} If it is gone for good, another seed makes a new one."
                ) from None
            asked_again = True
            try:
                task = poll(api, task_id, limits, watch)
            except RemoteError as trouble:
                raise RemoteError(f"The video could not be downloaded: {error}; and {trouble}. {kept}") from None
            url = next(iter(task.outputs), url)
        except TemporaryError as error:
            failures += 1
            if failures > limits.retries:
                raise RemoteError(f"The video could not be downloaded: {error}. {kept}") from None
            pause(limits.before_retry(failures, error.wait), watch.update)


def _download(api: Api, task_id: str, url: str, folder: Path, limits: Limits, watch: Watch) -> Path:
    """Downloads once. Raises GoneError for an expired URL, TemporaryError for what may be retried."""
    whole = folder / f"magi1_{task_id}_{uuid.uuid4().hex[:8]}.mp4"
    part = whole.with_suffix(".mp4.part")
    done, stop, deadline = [0.0], Event(), Deadline(limits.answer)

    def work() -> None:
        try:
            with part.open("xb") as file:
                _receive(api, url, file, limits, deadline, done)
        except OSError as error:
            raise _unwritable(folder, error) from error
        finally:
            if stop.is_set():  # the caller no longer waits
                _remove(part)

    try:
        Worker(work).result(lambda: watch.update(done[0] or None))
        _rename(part, whole)
    except Lost as lost:
        raise TemporaryError(str(lost)) from None
    finally:
        stop.set()
        deadline.expire()
        _remove(part)
    return whole


def _receive(api: Api, url: str, file: BinaryIO, limits: Limits, deadline: Deadline, done: list[float]) -> None:
    """Streams `url` into `file`. An OSError from here is the disk's."""
    place = api.transport.shown_url(url)
    too_large = RemoteError(
        f"What lies at {place} is larger than {limits.video:,} bytes, which no video of this model is."
    )
    with api.transport.opened(url, deadline) as response:
        _check_answer(response, place, api.transport.redact)
        length = content_length(response.headers)
        if length > limits.video:
            raise too_large
        for block in response.iter_content(_BLOCK):
            deadline.extend(len(block) / SLOWEST)
            try:
                file.write(block)
                file.flush()  # so that a full disk is noticed here
            except OSError as error:
                raise _unwritable(Path(file.name).parent, error) from error
            done[0] = file.tell() / length if length else 0.0
            if file.tell() > limits.video:
                raise too_large
    if length and file.tell() != length:
        raise TemporaryError(f"{file.tell():,} of {length:,} bytes came")


def _check_answer(response: "requests.Response", place: str, redact: Callable[[str], str]) -> None:
    """Checks status and type of the answer."""
    status, headers = response.status_code, response.headers
    kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if status in (401, 403, 404, 410):
        raise GoneError(f"{place} answers {status}")
    if status != 200:
        raise TemporaryError(f"{place} answers {status}", retry_after(headers.get("Retry-After")))
    if kind.startswith("text/") or kind == "application/json":
        raise GoneError(f"{place} gives {redact(kind)} instead of a video")


def inspect(path: Path, watch: Watch) -> Facts:
    """Decodes a whole video and returns its facts.

    Raises:
        MagiError: it is no video, or damaged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of colours, which do not matter here
        clip = open_clip(path)
        count = 0
        for _ in clip.frames():
            count += 1
            watch.update(count / clip.frame_count if clip.frame_count else None)
    if clip.errors or not isinstance(clip, VideoFile) or (clip.frame_count or count) > count + 1:
        raise MagiError(f"it is damaged: {count} of {clip.frame_count} frames can be read.")
    return Facts(count, float(clip.fps or 0), clip.width, clip.height)


def _rename(part: Path, whole: Path) -> None:
    try:
        put_in_place(part, whole)
    except OSError as error:  # Windows: another program, such as a virus scanner, has it open
        raise _unwritable(whole.parent, error) from error


def _remove(path: Path) -> None:
    with suppress(OSError):  # Windows: an abandoned thread still has it open, and removes it
        path.unlink(missing_ok=True)


def _unwritable(folder: Path, error: OSError) -> MagiError:
    reason = error.strerror or str(error)
    return MagiError(
        f"The video cannot be written to {str(folder)!r} ({reason}). Make room there, or choose another folder, and "
        "run it again: a task that there is already is resumed."
    )

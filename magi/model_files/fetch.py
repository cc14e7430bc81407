"""One file from the web to disk: resumed where it stopped, checked, and given its name only when it is whole."""

import errno
import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ..errors import MagiError
from ..system.owner_lock import OwnerLock
from ..system.threads import Worker
from ..system.whole_files import put_in_place

OnPhase = Callable[[str, int], None]
"""Called with (phase, done): "download" or "verify", and the bytes of the file so far. What it raises ends the work."""

BLOCK = 1 << 18  # bytes between two checks for a stop
TIMEOUTS = (15.0, 30.0)  # seconds to connect, and of silence
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each new attempt; from the first again once bytes have come


def part_of(target: Path) -> Path:
    """Returns the path at which the unfinished download of `target` is kept."""
    return target.with_name(target.name + ".part")


def file_sha256(path: Path, on_progress: OnPhase | None = None) -> str:
    """Reads a file in blocks and returns its sha256 in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(4 * BLOCK):
            digest.update(block)
            done += len(block)
            if on_progress:
                on_progress("verify", done)
    return digest.hexdigest()


def fetch(
    url: str,
    target: Path,
    *,
    size: int,
    sha256: str | None = None,
    on_progress: OnPhase | None = None,
) -> None:
    """Downloads `url` to `target.part`, verifies it and renames it to `target`.

    The `.part` file is kept when anything stops the download, and the next call resumes it. A lost connection is retried, with a
    growing pause as long as no more bytes come. `on_progress` is called in the caller's thread, about ten times per second, however
    silent the network is.

    Args:
        url: http(s) URL.
        target: the finished file; its folder is created; an older file of that name is replaced.
        size: its length in bytes.
        sha256: in hexadecimal, None where it is not known; a file that differs is deleted.
        on_progress: see `OnPhase`.

    Raises:
        MagiError: the server refuses or is out of reach, the disk is full or not writable, size or sha256 differ, or another
            process is downloading the same file.
    """
    part = part_of(target)
    owner = OwnerLock(part.with_name(part.name + ".lock"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not owner.acquire():
            raise MagiError(
                f"{str(target)!r} is being downloaded at this moment, by another process. Wait for that one."
            )
        _download(url, part, size, on_progress or _ignore)
        if sha256 and (found := file_sha256(part, on_progress)) != sha256:
            part.unlink()
            raise MagiError(
                f"The download of {target.name} is damaged (sha256 {found} instead of {sha256}) and was deleted. Run this again; "
                "if it happens twice, a proxy or mirror on the way changes files: use another one."
            )
        put_in_place(part, target)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "The disk is full: free some space" if full else "Choose a folder that can be written"
        raise MagiError(f"{str(target)!r} cannot be written ({error}). {remedy}, then run this again.") from error
    finally:
        owner.release()


@dataclass
class _Transfer:
    """State shared by the thread that downloads and the one that waits for it."""

    done: int = 0
    stop: threading.Event = field(default_factory=threading.Event)


def _ignore(phase: str, done: int) -> None:
    pass


def _download(url: str, part: Path, size: int, on_progress: OnPhase) -> None:
    """Fills `part` in a thread: a read from a silent network cannot be interrupted and reports no progress."""
    transfer = _Transfer()

    def work() -> None:
        with part.open("ab") as file:
            _attempts(url, file, size, transfer)

    worker = Worker(work)
    try:
        worker.result(lambda: on_progress("download", transfer.done))
    finally:
        transfer.stop.set()
        worker.wait(1.0)  # from here on it writes nothing, even where it still waits for the network


def _attempts(url: str, file: BinaryIO, size: int, transfer: _Transfer) -> None:
    import requests

    if file.tell() > size:  # of another version of the file
        _restart(file)
    transfer.done = file.tell()
    failures = 0
    while (before := file.tell()) < size and not transfer.stop.is_set():
        try:
            _receive(url, file, size, transfer)
            reason = "the connection was cut"
        except requests.RequestException as error:
            reason = str(error)
        if file.tell() >= size or transfer.stop.is_set():
            continue
        failures = 0 if file.tell() > before else failures
        if failures == len(WAITS):
            raise MagiError(
                f"{url} could not be downloaded: {reason}. What has arrived is kept: check the network (a proxy goes in HTTPS_PROXY; "
                f"HF_ENDPOINT names a mirror of huggingface.co) and run this again to resume. {_by_hand(file)}"
            )
        transfer.stop.wait(WAITS[failures])
        failures += 1


def _receive(url: str, file: BinaryIO, size: int, transfer: _Transfer) -> None:
    """Sends one request for the bytes that `file` lacks, and appends what the server sends."""
    import requests

    start = transfer.done = file.tell()
    headers = {"Accept-Encoding": "identity"}  # compressed, neither lengths nor ranges would be the file's
    if start:
        headers["Range"] = f"bytes={start}-"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUTS) as response:
        _check_status(url, response.status_code, start, file)
        if start and not (
            response.status_code == 206 and f"bytes {start}-" in response.headers.get("Content-Range", "")
        ):
            _restart(file)
            if response.status_code != 200:
                return
        for block in response.iter_content(BLOCK):
            if transfer.stop.is_set():
                return
            file.write(block)
            file.flush()  # so that an abandoned thread has nothing buffered to write later
            transfer.done = file.tell()
            if transfer.done > size:
                _restart(file)
                raise MagiError(
                    f"{url} sends more than the {size:,} bytes it should. Run this again; if it happens twice, use another mirror."
                )


def _check_status(url: str, status: int, start: int, file: BinaryIO) -> None:
    import requests

    if status in (401, 403, 404, 410):
        raise MagiError(
            f"{url} answers {status}: the file was moved or closed to the public. Update this program. {_by_hand(file)}"
        )
    # 416 to a range request: the bytes on disk are not the start of this file.
    if not (status in (200, 206) or (status == 416 and start)):
        raise requests.HTTPError(f"the server answers {status}")


def _by_hand(file: BinaryIO) -> str:
    return f"By hand: fetch it in a browser and save it as {file.name.removesuffix('.part')!r}."


def _restart(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()

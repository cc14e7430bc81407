"""Records of submitted requests on disk, so that no task is paid for twice, whatever ends this process.

One small JSON file per request, named by the request's digest. It is written before the request is sent, and gets the
task's id as soon as that is known. It is removed only when the service has answered that there will be no video, never for
its age: clocks are wrong now and then. It never holds a key.
"""

import json
import math
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

from filelock import FileLock, Timeout

from ..errors import MagiError
from ..system.whole_files import write_whole
from .answers import TASKS_PAGE, is_id

CONFIRM_PREFIX = "new-"  # of the code by which a user confirms that a request is to be submitted again
KEPT_SECONDS = 7 * 24 * 3600.0  # as long as the service keeps videos


@dataclass(frozen=True)
class Record:
    """State of a request that was sent, or was about to be.

    Attributes:
        sent_at: seconds since 1970.
        base_url: the service.
        api_version: "v2" or "v3".
        settings: the request, for people to read.
        task_id: None where no answer has come.
        cancelled: the user has cancelled it.
        delivered: the caller has the video.
        code: five random digits, for this attempt to be named by; "" in records of earlier versions.
    """

    sent_at: float
    base_url: str
    api_version: str
    settings: dict[str, Any]
    task_id: str | None = None
    cancelled: bool = False
    delivered: bool = False
    code: str = ""

    @property
    def when(self) -> str:
        """Returns the local time of sending, for messages."""
        try:
            return time.strftime("%Y-%m-%d %H:%M", time.localtime(self.sent_at))
        except (OverflowError, OSError, ValueError):  # a clock that was far from right
            return "an unknown day"

    @property
    def expired(self) -> bool:
        """Returns whether the service may no longer keep its video, by this machine's clock.

        A clock can be wrong: this is a reason to ask the service, never one to submit again.
        """
        return not 0 <= time.time() - self.sent_at <= KEPT_SECONDS

    @property
    def confirm_code(self) -> str:
        """Returns the code by which a user confirms that the request is to be submitted again.

        It is valid for this attempt only: left in the node, it submits no later one.
        """
        return CONFIRM_PREFIX + (self.code or f"{int(self.sent_at * 1000) % 100_000:05d}")


class Records:
    """The folder of records. Nothing is read or written before `open`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, digest: str, on_wait: Callable[[], None]) -> "Entry":
        """Locks and reads the record of one request, for this process alone until it is released.

        `on_wait` is called about ten times per second while another run of the same request holds the lock; it may raise.

        Raises:
            MagiError: the folder cannot be written, so that nothing may be sent.
        """
        path = self.folder / f"{digest}.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = _locked(path.with_suffix(".lock"), on_wait)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        try:
            return Entry(path, lock)
        except BaseException:
            if lock is not None:
                lock.release()
            raise


class Entry:
    """One request's locked record, with a reference count: each further user calls `hold`, each user `release` once."""

    def __init__(self, path: Path, lock: FileLock | None) -> None:
        self.path = path
        self.record = _read(path)
        self._lock, self._holders, self._mutex = lock, 1, Lock()

    def hold(self) -> None:
        """Adds a user, such as a thread that outlives its caller."""
        with self._mutex:
            self._holders += 1

    def release(self) -> None:
        """Removes a user; the last one unlocks the record for other runs."""
        with self._mutex:
            self._holders -= 1
            if self._holders == 0 and self._lock is not None:
                self._lock.release()

    def begin(self, base_url: str, api_version: str, settings: dict[str, Any]) -> None:
        """Records that the request is about to be sent.

        Raises:
            MagiError: it cannot be recorded, so it must not be sent.
        """
        try:
            code = f"{secrets.randbelow(100_000):05d}"  # not of the time: two attempts may have the same, by a clock that stands
            self._write(Record(time.time(), base_url, api_version, settings, code=code))
        except OSError as error:
            raise _unwritable(self.path.parent, error) from error

    def update(self, **changes: Any) -> None:
        """Changes the record. A change that cannot be written holds in this process only, and ends nothing."""
        if self.record is not None:
            changed = replace(self.record, **changes)
            self.record = changed
            with suppress(OSError):
                self._write(changed)

    def clear(self) -> None:
        """Removes the record: the same request may be submitted again."""
        self.record = None
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _write(self, record: Record) -> None:
        write_whole(self.path, json.dumps(asdict(record), indent=1).encode())
        self.record = record


def _read(path: Path) -> Record | None:
    """Reads a record, None without a file. Raises MagiError where it is damaged: its task may have been paid for."""
    try:
        return _checked(Record(**json.loads(path.read_bytes())))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise MagiError(
            f"The note of an earlier try of this request, {str(path)!r}, cannot be read. Look at {TASKS_PAGE} whether there is a task; "
            "then remove the file."
        ) from error


def _checked(record: Record) -> Record:
    """Returns the record. Raises ValueError where a value is none that was written."""
    numbers = isinstance(record.sent_at, int | float) and math.isfinite(record.sent_at)
    flags = isinstance(record.cancelled, bool) and isinstance(record.delivered, bool)
    if not (numbers and flags and isinstance(record.code, str) and (record.task_id is None or is_id(record.task_id))):
        raise ValueError("a value is of another kind")
    return record


def _locked(path: Path, on_wait: Callable[[], None]) -> FileLock | None:
    """Acquires a file's lock, which the system releases when this process dies; None where the drive has no locks."""
    lock = FileLock(path, thread_local=False)
    while True:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            on_wait()
            time.sleep(0.1)
        except NotImplementedError:
            return None
        else:
            return lock


def _unwritable(folder: Path, error: OSError) -> MagiError:
    return MagiError(
        f"The task could not be noted in {str(folder)!r} ({error.strerror or error}), so nothing was sent: after a crash it would be lost. "
        "Make room there, or make the folder writable."
    )

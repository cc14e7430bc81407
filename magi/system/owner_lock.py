"""The right to write to a path, of one owner at a time. The system takes it back when a process dies, however it does."""

import os
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

_TRIES = 3


class OwnerLock:
    """A lock file that exists while somebody owns what it stands for; a killed process leaves it, unlocked.

    Where the drive knows no locks, the folder is not there or nothing can be written, everybody gets it.
    """

    def __init__(self, path: Path) -> None:
        """Locks nothing yet; `path` is the lock file."""
        self._path = path
        self._lock: FileLock | None = None

    def acquire(self) -> bool:
        """Returns whether this is the owner now, or was already; False where somebody else is, in this process or another."""
        if self._lock is not None or not self._path.parent.is_dir():
            return True
        for _ in range(_TRIES):
            lock = FileLock(self._path, thread_local=False)
            try:
                lock.acquire(timeout=0)
            except Timeout:  # also where the file cannot be made, so it is there only if somebody else owns it
                if self._path.exists():
                    return False
                continue
            except (OSError, NotImplementedError):
                return True
            if self._path.exists():  # else the one before has just removed it, and the next would make another one
                self._lock = lock
                return True
            lock.release()
        return True

    def release(self) -> None:
        """Gives it back and removes the file; does nothing for one that is not owned."""
        lock, self._lock = self._lock, None
        if lock is None:
            return
        with suppress(OSError):  # Windows removes no file that is open
            self._path.unlink(missing_ok=True)
        with suppress(OSError):
            lock.release()
        if os.name == "nt":
            with suppress(OSError):  # another process may have opened it by now, and owns it
                self._path.unlink(missing_ok=True)

    def __del__(self) -> None:
        self.release()

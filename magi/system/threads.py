"""Work that waits for others, in a thread that can be watched and left behind."""

import math
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

_TICK = 0.1  # seconds between two looks at whether the user has cancelled


class Worker(Generic[T]):
    """Work in a thread of its own: a wait for the network can be neither interrupted nor reported on, but left behind."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._made: list[T] = []
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="magi-worker", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._made.append(self._work())
        except BaseException as error:  # raised again by the thread that waits
            self._failure = error

    def result(self, alive: Callable[[], None], most: float = math.inf) -> T:
        """What the work returns or raises. `alive` is called ten times a second; what it raises leaves the work behind.

        Raises:
            TimeoutError: it takes more than `most` seconds, and is left behind.
        """
        end = time.monotonic() + most
        while self._thread.is_alive():
            self._thread.join(_TICK)
            alive()
            if time.monotonic() > end and self._thread.is_alive():
                raise TimeoutError
        return self.outcome()

    def wait(self, seconds: float) -> None:
        """Waits, but not long, for the work to end."""
        self._thread.join(seconds)

    def outcome(self) -> T:
        """Waits, however long it takes."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._made[0]


def pause(seconds: float, alive: Callable[[], None]) -> None:
    """Waits; `alive` is called ten times a second and may raise."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(_TICK, left))
        alive()

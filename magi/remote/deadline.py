"""A time limit on an HTTP exchange that holds however slowly its bytes drip."""

import socket
import time
from contextlib import suppress
from threading import Condition, Thread

_LONGEST_SLEEP = 3600.0  # seconds; what a lock can wait for is limited


class Deadline:
    """Shuts connections down when their time is up, in a with-block; whoever reads from them then gets an error or an end.

    A socket's own timeout will not do: it begins anew at every byte.

    Attributes:
        seconds: that the with-block may take.
        passed: whether they are over; then an end of the data is none of the server's.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.passed = seconds, False
        self._end: float | None = None  # time.monotonic(); None before the with-block
        self._over = self._expired = False
        self._sockets: list[socket.socket] = []
        self._changed = Condition()

    def __enter__(self) -> "Deadline":
        self._end = time.monotonic() + self.seconds
        Thread(target=self._wait, name="magi-deadline", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()
            for watched in self._sockets:
                watched.close()

    def extend(self, seconds: float) -> None:
        """Allows so much more time."""
        with self._changed:
            self.seconds += seconds
            self._end = None if self._end is None else self._end + seconds

    def expire(self) -> None:
        """Ends the time now, for a caller who no longer waits."""
        with self._changed:
            self._expired = True
            self._changed.notify_all()

    def watch(self, connected: socket.socket) -> None:
        """Adds a connection. Of its socket a duplicate is kept: the shutdown reaches whatever wraps the original, such as TLS."""
        watched = connected.dup()
        with self._changed:
            self._sockets.append(watched)
            if self.passed:
                _shut_down(watched)

    def _wait(self) -> None:
        with self._changed:
            while not self._over and (left := self._left()) > 0:
                self._changed.wait(min(left, _LONGEST_SLEEP))
            if not self._over:
                self.passed = True
                for watched in self._sockets:
                    _shut_down(watched)

    def _left(self) -> float:
        return 0.0 if self._expired or self._end is None else self._end - time.monotonic()


def _shut_down(connected: socket.socket) -> None:
    with suppress(OSError):  # the other side has closed it
        connected.shutdown(socket.SHUT_RDWR)

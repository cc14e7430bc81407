"""Work done ahead of its use, in threads that end with the iteration they work for."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

_T = TypeVar("_T")
_LOOK = 0.2  # seconds between looks at what others tell of anyway: Windows lets no Ctrl-C through to a lock


class ClosedError(RuntimeError):
    """The iteration has ended."""


class Session:
    """What the threads of one iteration share: a lock to wait at, and the word to end."""

    def __init__(self) -> None:
        # Re-entrant: the garbage collector may close an iteration anywhere.
        self._change = threading.Condition(threading.RLock())
        self._closed = False
        self._threads: list[threading.Thread] = []

    def check(self) -> None:
        """Raises ClosedError if the iteration has ended: long work asks often."""
        if self._closed:
            raise ClosedError("This iteration is over: it was closed, or another one has begun.")

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Within it what others wait for may be changed."""
        with self._change:
            yield
            self._change.notify_all()

    def wait(self, attempt: Callable[[], _T | None], poll: float = _LOOK) -> _T:
        """Tries until something comes of it: at every change and every `poll` seconds.

        Raises:
            ClosedError: the iteration has ended.
        """
        with self._change:
            while True:
                self.check()
                found = attempt()
                if found is not None:
                    return found
                self._change.wait(poll)

    def start(self, work: Callable[[], None], name: str) -> None:
        """Runs `work` in a thread that `close` waits for."""
        # A daemon: an iteration that nobody closed must not keep a program from ending.
        thread = threading.Thread(target=work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def close(self) -> None:
        """Ends the threads and waits for them. What they are at in that moment is finished first."""
        with self.changing():
            self._closed = True
        if threading.current_thread() not in self._threads:  # the garbage collector runs in these as well
            for thread in self._threads:
                thread.join()


class Ahead(Iterator[_T], Generic[_T]):
    """What an iterator gives, asked for in a thread: as far ahead as it goes, so it must hold itself back by `Session.wait`."""

    def __init__(self, items: Iterator[_T], session: Session, name: str) -> None:
        self._items = items
        self._session = session
        self._found: deque[_T] = deque()
        self._end: BaseException | None = None
        session.start(self._work, name)

    def _work(self) -> None:
        try:
            for item in self._items:
                with self._session.changing():
                    self._found.append(item)
            self._finish(StopIteration())
        except BaseException as error:
            self._finish(error)

    def _finish(self, end: BaseException) -> None:
        with self._session.changing():
            self._end = end

    def __next__(self) -> _T:
        """The next one; what the iterator raised comes out here, after all that it gave."""
        self._session.wait(lambda: self._found or self._end or None)
        if self._found:
            return self._found.popleft()
        end, self._end = self._end, StopIteration()
        assert end is not None  # noqa: S101 (one of the two)
        try:
            raise end
        finally:
            del end  # whose traceback leads here: nothing that it holds would be freed for a while

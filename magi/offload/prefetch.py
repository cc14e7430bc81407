"""Prefetching in background threads that end with the iteration they belong to."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

_T = TypeVar("_T")
# Seconds between two attempts without a notification. On Windows Ctrl-C does not interrupt waiting for a lock.
_POLL_INTERVAL = 0.2


class ClosedError(RuntimeError):
    """The iteration that a thread works for has been closed."""


class IterationThreads:
    """Runs the background threads of one iteration, which share a condition variable and a closed flag."""

    def __init__(self) -> None:
        # Re-entrant: the garbage collector may close an iteration in a thread that holds the lock.
        self._condition = threading.Condition(threading.RLock())
        self._closed = False
        self._threads: list[threading.Thread] = []

    def raise_if_closed(self) -> None:
        """Raises ClosedError if the iteration has been closed. Long work calls this often.

        Raises:
            ClosedError: the iteration has been closed.
        """
        if self._closed:
            raise ClosedError("This iteration is over: it was closed, or another one has begun.")

    @contextmanager
    def lock_and_notify(self) -> Iterator[None]:
        """Holds the lock for a change of shared state, and wakes the threads in `wait_for` afterwards."""
        with self._condition:
            yield
            self._condition.notify_all()

    def wait_for(self, attempt: Callable[[], _T | None], poll: float = _POLL_INTERVAL) -> _T:
        """Blocks until an attempt succeeds.

        Args:
            attempt: returns None to be called again. It is called with the lock held.
            poll: seconds until the next attempt if no thread notifies before.

        Returns:
            The first result of `attempt` that is not None.

        Raises:
            ClosedError: the iteration has been closed.
        """
        with self._condition:
            while True:
                self.raise_if_closed()
                found = attempt()
                if found is not None:
                    return found
                self._condition.wait(poll)

    def start(self, target: Callable[[], None], name: str) -> None:
        """Starts a daemon thread that runs `target` and that `close` joins."""
        # A daemon, so that an iteration that was never closed does not keep the program from exiting.
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def close(self) -> None:
        """Stops the threads and joins them. Each finishes its current operation first."""
        with self.lock_and_notify():
            self._closed = True
        if threading.current_thread() not in self._threads:  # the garbage collector may call this in one of them
            for thread in self._threads:
                thread.join()


class Prefetcher(Iterator[_T], Generic[_T]):
    """Runs an iterator in a background thread and queues its items.

    The queue is not bounded: an iterator limits how far ahead it runs by calling `IterationThreads.wait_for`.
    """

    def __init__(self, items: Iterator[_T], threads: IterationThreads, name: str) -> None:
        """Starts the thread.

        Args:
            items: the iterator to run; nothing else may use it.
            threads: the threads of the iteration that the items belong to.
            name: of the thread.
        """
        self._items = items
        self._threads = threads
        self._queue: deque[_T] = deque()
        self._end: BaseException | None = None  # StopIteration, or the error that the iterator raised
        threads.start(self._run, name)

    def _run(self) -> None:
        try:
            for item in self._items:
                with self._threads.lock_and_notify():
                    self._queue.append(item)
            self._finish(StopIteration())
        except BaseException as error:
            self._finish(error)

    def _finish(self, end: BaseException) -> None:
        with self._threads.lock_and_notify():
            self._end = end

    def __next__(self) -> _T:
        """Blocks until the next item is there and returns it.

        Raises:
            ClosedError: the iteration has been closed.
            BaseException: the error that the iterator raised, once, after all items before it were returned.
        """
        self._threads.wait_for(lambda: self._queue or self._end or None)
        if self._queue:
            return self._queue.popleft()
        end, self._end = self._end, StopIteration()
        assert end is not None  # noqa: S101 (wait_for returns once there is an item or an end)
        try:
            raise end
        finally:
            del end  # the traceback refers to this frame: without the cycle it is freed at once

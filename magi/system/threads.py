"""Work in a thread of its own, which can be polled and abandoned."""

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

T = TypeVar("T")

_TICK = 0.1  # seconds between two checks whether the user has cancelled


def start(work: Callable[[], T], name: str) -> Future[T]:
    """Runs `work` in a daemon thread of its own and returns the future of its outcome.

    An executor's threads would not do: Python waits for them before it exits, and a wait for the network may take
    minutes.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            outcome = work()
        except BaseException as error:  # raised again by whoever asks for the result
            if done.set_running_or_notify_cancel():
                done.set_exception(error)
        else:
            if done.set_running_or_notify_cancel():
                done.set_result(outcome)

    threading.Thread(target=run, name=name, daemon=True).start()
    return done


class Worker(Generic[T]):
    """Work in a thread of its own: a wait for the network can be abandoned, though not interrupted."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._done = start(work, "magi-worker")

    def result(self, on_tick: Callable[[], None], most: float = math.inf) -> T:
        """Returns or raises what the work does; calls `on_tick` ten times per second, and abandons it if that raises.

        Raises:
            TimeoutError: the work takes more than `most` seconds, and is abandoned.
        """
        end = time.monotonic() + most
        while not self._done.done():
            wait([self._done], _TICK)
            on_tick()
            if time.monotonic() > end and not self._done.done():
                raise TimeoutError
        return self._done.result()

    def wait(self, seconds: float) -> None:
        """Waits at most so long for the work to end."""
        wait([self._done], seconds)

    def outcome(self) -> T:
        """Waits for the work, however long it takes, and returns or raises what it does."""
        return self._done.result()


def pause(seconds: float, on_tick: Callable[[], None]) -> None:
    """Waits for `seconds`; `on_tick` is called ten times per second and may raise."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(_TICK, left))
        on_tick()

"""SIGTERM, as `docker stop` or a service manager sends it: first a cancel, so that work in progress is saved, then the end."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import comfy.model_management
from server import PromptServer

_PATIENCE = 5.0  # seconds for an event loop that is busy


@contextmanager
def saved_on_termination() -> Iterator[None]:
    """While this lasts, SIGTERM cancels what ComfyUI runs, and ends the process only when this is left.

    A second SIGTERM ends it at once. Where ComfyUI's event loop does not run in the main thread, the only one that can
    catch signals, nothing changes.
    """
    handler = _Handler()
    installed = _in_main_thread(handler.install)
    try:
        yield
    finally:
        if installed:
            _in_main_thread(handler.remove, give_up=False)


class _Handler:
    """Cancels at the first SIGTERM. Its methods are for the main thread."""

    def __init__(self) -> None:
        self._before: Any = signal.SIG_DFL
        self._asked = False

    def install(self) -> None:
        """Takes the place of the handler that is there."""
        before = signal.getsignal(signal.SIGTERM)
        self._before = signal.SIG_DFL if before is None else before  # None: not one of Python's
        signal.signal(signal.SIGTERM, self._cancel)

    def remove(self) -> None:
        """Puts that handler back, and ends the process if a SIGTERM has come."""
        signal.signal(signal.SIGTERM, self._before)
        if self._asked:
            signal.raise_signal(signal.SIGTERM)

    def _cancel(self, *_: Any) -> None:
        self._asked = True
        signal.signal(signal.SIGTERM, self._before)
        comfy.model_management.interrupt_current_processing()


def _in_main_thread(call: Callable[[], None], give_up: bool = True) -> bool:
    """Runs `call` in the main thread, through ComfyUI's event loop there; returns whether it did.

    A loop that is busy for too long runs it later, or with `give_up` never.
    """
    if threading.current_thread() is threading.main_thread():
        call()
        return True
    loop = getattr(getattr(PromptServer, "instance", None), "loop", None)
    if loop is None or not loop.is_running():
        return False
    lock, done = threading.Lock(), threading.Event()
    outcome: bool | None = None

    def run() -> None:
        nonlocal outcome
        with lock:
            if outcome is None:  # not given up
                outcome = threading.current_thread() is threading.main_thread()
                if outcome:
                    call()
        done.set()

    with suppress(RuntimeError):  # it has just been closed
        loop.call_soon_threadsafe(run)
        done.wait(_PATIENCE)
    with lock:
        outcome = False if outcome is None and give_up else outcome
        return bool(outcome)

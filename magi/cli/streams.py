"""Standard output that takes any text, and that may be closed by whoever reads it."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PIPE_CLOSED = 141  # the exit status of a program that is ended by SIGPIPE, as shells report it


@contextmanager
def tolerant_streams() -> Iterator[None]:
    """Spells what a terminal's encoding lacks with escapes, and flushes in the end: a reader that has gone is no error.

    File names need not be text, and consoles of Windows know 256 characters.
    """
    before = sys.stdout.errors
    _set_errors("backslashreplace")
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        except (OSError, ValueError):
            drop_stdout()
        _set_errors(before)


def drop_stdout() -> None:
    """Sends standard output nowhere from now on: else Python tries to write the rest when it ends, and complains."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _set_errors(errors: str | None) -> None:
    if errors and hasattr(sys.stdout, "reconfigure"):
        with suppress(OSError, ValueError):
            sys.stdout.reconfigure(errors=errors)

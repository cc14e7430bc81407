"""Mapped files that another program changes: noticed before their numbers are used.

A map shows what a program writes into its file, and reading beyond the end of one that was cut off ends the process. A
file that is replaced or removed is no harm: the map keeps the old one.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import MagiError


class FileGuard:
    """Knows files as they were when this was made; make it before they are mapped."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Notes size and time of each file. Raises OSError where one cannot be looked at."""
        self._known = {file: file.stat() for file in files}

    def check(self) -> None:
        """Takes microseconds.

        Raises:
            MagiError: a file was written to since.
        """
        for file, known in self._known.items():
            try:
                now = file.stat()
            except OSError:  # it was removed, or its drive is gone for a moment
                continue
            if not os.path.samestat(known, now):
                continue
            if (known.st_size, known.st_mtime_ns) != (now.st_size, now.st_mtime_ns):
                cut = (
                    f", and has {now.st_size:,} bytes instead of {known.st_size:,}"
                    if now.st_size != known.st_size
                    else ""
                )
                raise MagiError(
                    f"{str(file)!r} was written to while it was in use{cut}. Its weights are no longer those that were loaded: "
                    "wait until the program that writes it has ended, then start again."
                )

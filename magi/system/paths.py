"""Paths as users write them."""

import os
from pathlib import Path


def user_path(path: str | Path) -> Path:
    """Returns a path with a leading "~" or "~name" in its home folder's place.

    Where there is no such home, as in a container or for a file whose name begins with "~", it is taken literally, as
    shells do; `Path.expanduser` would raise.
    """
    return Path(os.path.expanduser(path))  # noqa: PTH111

"""What lies at a path and in a folder, with its own message where the system does not let one look."""

import stat
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from ..errors import MagiError


def what_is_at(path: Path) -> Literal["file", "folder", "nothing"]:
    """Tells what lies at a path; links are followed.

    Raises:
        MagiError: the system does not let one look (no permission), or the path cannot be one (too long).
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "nothing"
    except (OSError, ValueError) as error:
        raise MagiError(
            f"{_short(path)} cannot be looked at: {_reason(error)}. Check the path and its rights."
        ) from error
    return "folder" if stat.S_ISDIR(mode) else "file"


def is_file(path: Path) -> bool:
    """Tells whether a file lies at a path, as far as the system lets one look: for places to search."""
    try:
        return what_is_at(path) == "file"
    except MagiError:
        return False


def visible(folder: Path, pattern: str) -> list[Path]:
    """Returns what a folder holds under a pattern of names, sorted; nothing where there is no such folder.

    Names that begin with a dot are left out: macOS puts `._model.safetensors` beside a `model.safetensors` on foreign
    disks and into archives, with nothing of the model in it.

    Raises:
        MagiError: the folder cannot be read.
    """
    try:
        names = [entry.name for entry in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        raise MagiError(
            f"The folder {_short(folder)} cannot be read: {_reason(error)}. Allow this user to read it, or choose another."
        ) from error
    return [folder / name for name in sorted(names) if fnmatch(name, pattern) and not name.startswith(".")]


def _short(path: Path) -> str:
    text = str(path)
    return repr(text if len(text) <= 300 else f"{text[:100]} ... {text[-100:]}")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)

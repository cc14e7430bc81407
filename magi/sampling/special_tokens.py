"""The learned token vectors that are prepended to captions for style, duration and unwanted content."""

import hashlib
import io
import math
import warnings
import zipfile
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import MagiError
from ..system.file_kinds import NPZ, file_kind
from ..system.finite import is_finite
from ..system.folders import visible, what_is_at
from ..system.paths import user_path

FILE_NAME = "special_tokens.npz"
SIZE = 3_343_124  # bytes
SHA256 = "b54bc664d5f4a722dfd8bb22201c025df61f22acddc07c0a2529d7b5cd6be5a7"
_OFFICIAL_WIDTH = 4096
_HOW = f"Use the official {FILE_NAME} (`python -m magi download special_tokens` fetches it, 3 MB)."

_MOST_BYTES = 1 << 26  # of an array, many times the official ones: an archive of kilobytes may unpack to gigabytes
_ARRAYS = ("caption_token", "logo_token", "other_tokens")
# zipfile and numpy raise these for files of other kinds, damaged and encrypted ones, and pickles
_UNREADABLE = (
    *(OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error),
)

# Rows of other_tokens
_TRANSITION = 0
_STYLES = {"hq": 1, "static": 2, "dynamic": 3, "borderness": 4, "3d_model": 15, "2d_anime": 16}
_DURATION = 7  # row for one chunk; the seven rows after it are for two to eight
_LONGEST_DURATION = 7
# Prepended one after the other, so that the last one comes first.
_STYLE_ORDER = ("static", "dynamic", "borderness", "hq", "3d_model", "2d_anime")

STYLES = tuple(_STYLES)


@dataclass(frozen=True)
class SpecialTokens:
    """The token vectors, float32 (rounded to float16 first, as the models were trained).

    Attributes:
        caption: (1, width).
        logo: (1, width).
        other: (100, width).
    """

    caption: torch.Tensor
    logo: torch.Tensor
    other: torch.Tensor

    @classmethod
    def load(cls, path: str | Path) -> "SpecialTokens":
        """Reads special_tokens.npz.

        Raises:
            MagiError: the file is missing, is not such an archive, or lacks the tokens.
        """
        path = user_path(path)
        if what_is_at(path) != "file":
            raise MagiError(f"There is no special-token file {str(path)!r}. {_HOW}")
        try:
            with zipfile.ZipFile(path) as archive:
                arrays = {name: _array(archive, name) for name in _ARRAYS}
            with np.errstate(over="ignore"):  # found below
                caption, logo, other = (torch.from_numpy(a.astype(np.float16)).float() for a in arrays.values())
            if not all(map(is_finite, (caption, logo, other))):
                raise ValueError("some of its numbers are NaN or infinite in float16")
        except _UNREADABLE as error:
            raise MagiError(f"{str(path)!r} is not the special-token file ({_reason(path, error)}). {_HOW}") from error
        rows = _STYLES["2d_anime"] + 1
        if not (
            caption.ndim == logo.ndim == other.ndim == 2
            and len(other) >= rows
            and logo.shape == caption.shape == (1, other.shape[1])
        ):
            shapes = ", ".join(f"{k} {a.shape}" for k, a in arrays.items())
            raise MagiError(f"{str(path)!r} is not the special-token file: it holds {shapes}. {_HOW}")
        if other.shape[1] == _OFFICIAL_WIDTH and not is_official(path):
            warnings.warn(f"{str(path)!r} is not the published special-token file; using it as given.", stacklevel=2)
        return cls(caption, logo, other)

    @property
    def width(self) -> int:
        """Returns the length of a token vector, which equals the caption channels of its model."""
        return self.other.shape[1]

    def prefix(self, styles: Iterable[str] = (), chunks_after: int | None = None) -> torch.Tensor:
        """Returns the tokens to prepend to a chunk's caption: (tokens, width).

        Args:
            styles: names from `STYLES`.
            chunks_after: chunks that follow this one, for the duration token; None leaves it out.

        Raises:
            MagiError: a style is unknown.
        """
        styles = set(styles)
        check_styles(styles)
        rows = [_STYLES[name] for name in _STYLE_ORDER if name in styles]
        if chunks_after is not None:
            rows.append(_DURATION + min(chunks_after, _LONGEST_DURATION))
        return self.other[rows[::-1]]

    def negative(self) -> torch.Tensor:
        """Returns the tokens to prepend to the null caption, for content to steer away from: (4, width)."""
        return torch.cat([self.other[[_STYLES["borderness"], _TRANSITION]], self.logo, self.caption])


def find_special_tokens(folders: Iterable[str | Path]) -> Path | None:
    """Finds the published file by its hash among the .npz files of the folders; returns None without one."""
    for folder in folders:
        with suppress(MagiError):  # a folder that cannot be read: others may be meant
            for file in visible(Path(folder), "*.npz"):
                if is_official(file):
                    return file
    return None


def _reason(path: Path, error: Exception) -> str:
    """Says what kind of file it is where that is another one, else what is wrong with it."""
    try:
        kind = file_kind(path)
    except OSError:
        kind = None
    return str(error) if kind in (None, NPZ) else f"it is {kind.name}"


def _array(archive: zipfile.ZipFile, name: str) -> "np.ndarray":
    """Reads an array of floating-point numbers, once its size as declared is known to be reasonable.

    Raises:
        ValueError: it is larger, or no such array; the archive raises others of `_UNREADABLE`.
    """
    member = archive.getinfo(f"{name}.npy")
    if member.file_size > _MOST_BYTES:
        raise ValueError(f"its {name} takes {member.file_size:,} bytes")
    data = io.BytesIO(archive.read(member))
    version = np.lib.format.read_magic(data)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(data)
    if dtype.kind != "f" or math.prod(shape) * dtype.itemsize > member.file_size:
        raise ValueError(f"its {name} is {dtype} {shape}")
    data.seek(0)
    return np.lib.format.read_array(data, allow_pickle=False)


def check_styles(styles: Iterable[str]) -> None:
    """Raises MagiError for a name that is not a style token."""
    for name in styles:
        if name not in _STYLES:
            raise MagiError(f"There is no style token {name!r}. Choose among {', '.join(STYLES)}.")


def is_official(path: Path) -> bool:
    """Tells whether this is the published file, by its size first and then by its hash."""
    try:
        return path.stat().st_size == SIZE and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256
    except OSError:  # a link that leads nowhere, a file of someone else's
        return False

"""What kind of file it is, by its first bytes: for files that are not what they were taken for."""

from dataclasses import dataclass
from pathlib import Path

from .printable import printable

_HEAD = 512  # bytes that are read
_AGAIN = "Download the file itself"
_UNPACK = "Unpack it, and give the file in it"
_SAFETENSORS = "Give the model's .safetensors file; `python -m magi download --list` names the official ones"
_WRONG = "Give the file that was meant"


@dataclass(frozen=True)
class FileKind:
    """A kind of file.

    Attributes:
        name: for messages: "a web page (HTML)".
        remedy: what to do where another kind is needed; a sentence without its full stop.
    """

    name: str
    remedy: str


_TORCH = FileKind("a torch file (as .bin, .pt, .pth and .ckpt files are)", _SAFETENSORS)
_OLD_TORCH = FileKind("a pickle (an old torch file, or other Python data)", _SAFETENSORS)
NPZ = FileKind(
    "a NumPy archive (.npz), as special_tokens.npz is", "Give it as the special tokens, or another file here"
)
_ZEROS = FileKind(
    "a download that broke off after room for it had been reserved (it begins with zeros)", "Download it again"
)
_MAGIC: tuple[tuple[int, bytes, FileKind], ...] = (
    (0, b"GGUF", FileKind("a GGUF file, which no part of MAGI-1 can be read from", _SAFETENSORS)),
    (0, b"\x89HDF\r\n\x1a\n", FileKind("an HDF5 file", _SAFETENSORS)),
    (0, b"\x93NUMPY", FileKind("a NumPy array (.npy)", _WRONG)),
    (0, b"\x00\x05\x16\x07", FileKind("a side file of macOS with nothing of the model in it", f"{_WRONG}, without ._")),
    (0, b"\x1f\x8b", FileKind("a gzip archive", _UNPACK)),
    (0, b"BZh", FileKind("a bzip2 archive", _UNPACK)),
    (0, b"\xfd7zXZ\x00", FileKind("an xz archive", _UNPACK)),
    (0, b"\x28\xb5\x2f\xfd", FileKind("a zstd archive", _UNPACK)),
    (0, b"7z\xbc\xaf\x27\x1c", FileKind("a 7z archive", _UNPACK)),
    (0, b"Rar!\x1a\x07", FileKind("a RAR archive", _UNPACK)),
    (257, b"ustar", FileKind("a tar archive", _UNPACK)),
    (0, b"\x89PNG\r\n\x1a\n", FileKind("a picture (PNG)", _WRONG)),
    (0, b"\xff\xd8\xff", FileKind("a picture (JPEG)", _WRONG)),
    (4, b"ftyp", FileKind("a video (MP4)", _WRONG)),
    (0, b"\x1a\x45\xdf\xa3", FileKind("a video (Matroska or WebM)", _WRONG)),
)


def file_kind(path: Path) -> FileKind | None:
    """Tells the kind of a file; returns None for one that is not known here, as safetensors files are not.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    for at, magic, kind in _MAGIC:
        if head[at:].startswith(magic):
            return kind
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _zip_kind(head)
    if len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5:  # the opcode PROTO and its version
        return _OLD_TORCH
    if head and not any(head):
        return _ZEROS
    return _text_kind(head)


def _zip_kind(head: bytes) -> FileKind:
    """Tells archives apart by the name of their first file, which stands in front: so also one that was cut off."""
    name = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    if name.endswith(b".npy"):
        return NPZ
    if name.endswith((b"/data.pkl", b"/.format_version", b"/byteorder", b"/version")):
        return _TORCH
    return FileKind("a zip archive", _UNPACK)


def _text_kind(head: bytes) -> FileKind | None:
    try:
        text = head.decode("utf-8-sig").lstrip()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # else only its last letter is cut
            return None
        text = head[: error.start].decode("utf-8-sig").lstrip()
    if not text or any(not c.isprintable() and not c.isspace() for c in text):
        return None
    start = text.lower()
    if start.startswith("version https://git-lfs"):
        return FileKind(
            "a pointer of git-lfs, in place of the file", f"Run `git lfs pull` in its folder. Or {_AGAIN.lower()}"
        )
    if start.startswith(("<!doctype html", "<html")):
        return FileKind(
            "a web page (HTML)", f"{_AGAIN}: the link led to a page, as one to log in on, or to an error of the site"
        )
    if start.startswith("<"):
        return FileKind("XML text, perhaps the error of a server", _AGAIN)
    if start.startswith(("{", "[")):
        return FileKind("JSON text, as configs and indices are", _WRONG)
    return FileKind(f"a text that begins {printable(text.splitlines()[0], 60)!r}", _AGAIN)

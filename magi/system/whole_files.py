"""Files that are whole or not there: written under another name, synced and renamed; read with a checksum."""

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

_CONTENT, _CHECKSUM = "content", "sha256"
_SAMPLE_BYTES, _SAMPLES = 1 << 20, 5


class DamagedFileError(ValueError):
    """A file is not as `pack` made it."""


def write_whole(path: Path, data: bytes, *, private: bool = False) -> None:
    """Puts `data` under `path`, replacing what was there; after a crash at any point one of the two is there, whole.

    Args:
        path: the file; its folder must exist.
        data: its bytes.
        private: only the owner may read it, where the system knows owners.

    Raises:
        OSError: it could not be written; what was there still is.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    mode = 0o600 if private else 0o666
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
        put_in_place(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def put_in_place(written: Path, path: Path, *, overwrite: bool = True) -> None:
    """Gives a finished file its final name in the same folder, once its bytes are on the disk.

    Args:
        written: the file.
        path: its final name.
        overwrite: whether it replaces what is there at that moment.

    Raises:
        FileExistsError: there is a file, and it is not to be replaced; both are as before.
        OSError: it could not be synced or renamed; likewise.
    """
    sync_file(written)
    if overwrite:
        written.replace(path)
    else:
        _rename_to_free(written, path)
    _sync_folder(path.parent)


def _rename_to_free(written: Path, path: Path) -> None:
    """Renames a file unless the name is taken, in one step where the system has one."""
    if os.name == "nt":
        written.rename(path)
        return
    try:
        os.link(written, path)
    except FileExistsError:
        raise
    except OSError:  # a drive without hard links
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        written.replace(path)
    else:
        with suppress(OSError):  # it has its name
            written.unlink()


def sync_file(path: Path) -> None:
    """Waits until a file's bytes are on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def pack(tensors: Mapping[str, torch.Tensor], content: Mapping[str, Any]) -> bytes:
    """Returns the bytes of a safetensors file of tensors, with `content`, JSON values, and a checksum in its header."""
    on_cpu = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    text = json.dumps(content, sort_keys=True)
    return save(on_cpu, {_CONTENT: text, _CHECKSUM: _checksum(on_cpu, text)})


def unpack(data: bytes) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Returns the tensors, on the CPU, and the content that `pack` was given.

    Raises:
        DamagedFileError: the bytes are not a file that `pack` made, or not all of it.
    """
    try:
        tensors = {name: x.clone() for name, x in load(data).items()}  # clones, as `load` places them at odd addresses
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        text, checksum = metadata[_CONTENT], metadata[_CHECKSUM]
        content = dict(json.loads(text))
    except Exception as error:  # safetensors raises whatever its parser stumbles over
        raise DamagedFileError("it is cut short or no saved state") from error
    if checksum != _checksum(tensors, text):
        raise DamagedFileError("its bytes have changed")
    return tensors, content


def file_fingerprint(path: str | Path) -> str:
    """Returns 64 hexadecimal digits that identify a file: a hash of its size and of five MB spread evenly over it.

    Raises:
        OSError: it cannot be read.
    """
    path = Path(path)
    size = path.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        if size <= _SAMPLE_BYTES * _SAMPLES:
            digest.update(file.read())
        else:
            for i in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def tensor_digest(*tensors: torch.Tensor) -> str:
    """Returns the SHA-256 of the tensors' types, shapes and values: 64 hexadecimal digits."""
    return _checksum({str(i): x.detach().cpu().contiguous() for i, x in enumerate(tensors)}, "")


def _checksum(tensors: Mapping[str, torch.Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
        digest.update(x.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Syncs a folder, so that a renaming in it survives a crash. Windows cannot, nor can some network drives."""
    if os.name == "nt":
        return
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

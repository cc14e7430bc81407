"""Checkpoints written tensor by tensor, so that a file may be far larger than memory.

The safetensors library wants all tensors at once. Its format is an 8-byte length, a JSON header padded to a multiple of
8 bytes, and the tensors without gaps, the widest types first, which keeps every one of them aligned.
"""

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from ..errors import MagiError
from ..system.folders import visible
from ..system.owner_lock import OwnerLock
from ..system.paths import user_path
from ..system.progress import OnProgress
from ..system.whole_files import put_in_place, sync_file
from .mapped_file import TensorInfo, TensorSource

_PART = 1 << 24  # bytes written between two calls of a progress callback
_PARTIAL = ".partial"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = "model-{:05d}-of-{:05d}.safetensors"
_SHARDS = "model-?????-of-?????.safetensors"


@dataclass(frozen=True)
class _File:
    """A safetensors file to be: its name, its header and the tensors after it, in their order."""

    path: Path
    header: bytes
    names: tuple[str, ...]
    nbytes: int

    @classmethod
    def of(cls, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> "_File":
        """Lays out a file of these tensors."""
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name, info in tensors.items():
            start, end = end, end + info.nbytes
            header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        return cls(path, head, tuple(tensors), len(head) + end)


def write_checkpoint(
    source: TensorSource,
    target: str | Path,
    *,
    metadata: Mapping[str, str] | None = None,
    beside: Mapping[str, bytes] | None = None,
    shard_bytes: int | None = None,
    overwrite: bool = False,
    progress: OnProgress | None = None,
) -> list[Path]:
    """Writes all tensors of a source, holding one at a time.

    Files carry partial names until every one of them is complete and on the disk; whatever ends the work before leaves
    no file behind.

    Args:
        source: the tensors; each is asked for once.
        target: a path that ends in .safetensors, or a folder, which is made: model.safetensors in it, or shards and an
            index.
        metadata: of each file.
        beside: other files of the folder, bytes by name; ignored for a single file.
        shard_bytes: most bytes of tensors in a file; a larger tensor has one to itself. None: all in one.
        overwrite: whether a checkpoint at `target` may be replaced; until the new one is complete it stays as it is.
        progress: called with (bytes written, bytes); what it raises ends the work.

    Returns:
        The safetensors files, without the index.

    Raises:
        MagiError: the target is there, the disk has too little room or cannot be written.
    """
    target = user_path(target)
    in_folder = not target.name.endswith(".safetensors")
    if shard_bytes is not None and not in_folder:
        raise MagiError(f"Shards do not fit into one file {str(target)!r}. Give a folder, or leave out the shard size.")
    extras = dict(beside or {}) if in_folder else {}
    _check_target(target, in_folder, extras, overwrite)
    groups = _groups(source.tensors, shard_bytes)
    folder = target if in_folder else target.parent
    names = [target.name] if not in_folder else [_SINGLE] if shard_bytes is None else _shard_names(len(groups))
    files = [_File.of(folder / name, group, metadata or {}) for name, group in zip(names, groups, strict=True)]
    if shard_bytes is not None:
        extras[_INDEX] = _index(files, source.tensors)
    total = sum(file.nbytes for file in files)
    _check_room(folder, total + sum(map(len, extras.values())))
    owner = OwnerLock(target.with_name(f"{target.name}.lock"))
    if not owner.acquire():
        raise MagiError(f"{str(target)!r} is being written at this moment, by another process. Wait for that one.")
    try:
        _write(source, files, extras, total, progress, overwrite)
        if in_folder and overwrite:  # files of the checkpoint that was there before
            for file in (*folder.glob(_SHARDS), folder / _SINGLE, folder / _INDEX):
                if file.name not in {*names, *extras}:
                    file.unlink(missing_ok=True)
    except OSError as error:
        raise MagiError(
            f"{str(target)!r} cannot be written ({error}). Choose a folder that can be, on a disk with {total / 1e9:.1f} GB free."
        ) from error
    finally:
        owner.release()
    return [file.path for file in files]


def _check_target(target: Path, in_folder: bool, extras: Iterable[str], overwrite: bool) -> None:
    if target.exists() and target.is_dir() != in_folder:
        known = "a file" if in_folder else "a folder"
        raise MagiError(f"{str(target)!r} is {known}. Give a folder, or the name of a file that ends in .safetensors.")
    found = [target] if target.is_file() else []
    if in_folder:
        ours = {_SINGLE, _INDEX, *(file.name for file in target.glob(_SHARDS))}
        weights = [file for file in visible(target, "*.safetensors*") if not file.name.endswith(_PARTIAL)]
        foreign = [file.name for file in weights if file.name not in ours]
        if foreign:
            raise MagiError(f"The folder {str(target)!r} holds another model ({foreign[0]}). Choose another folder.")
        found = [*weights, *(target / name for name in extras if (target / name).exists())]
    if found and not overwrite:
        raise MagiError(f"{str(found[0])!r} is there already. Choose another place, or --overwrite to replace it.")


def _check_room(folder: Path, needed: int) -> None:
    existing = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise MagiError(
            f"The checkpoint takes {needed / 1e9:.2f} GB, and the disk of {str(folder)!r} has {free / 1e9:.2f} GB free. "
            "Free some space, choose another disk, or write fewer layers."
        )


def _groups(tensors: Mapping[str, TensorInfo], most: int | None) -> list[dict[str, TensorInfo]]:
    """Splits the tensors into files of at most `most` bytes; in each the widest types come first, then by name."""
    groups: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in tensors.items():
        if groups[-1] and most is not None and size + info.nbytes > most:
            groups.append({})
            size = 0
        groups[-1][name] = info
        size += info.nbytes
    return [dict(sorted(group.items(), key=lambda item: (-_width(item[1]), item[0]))) for group in groups]


def _width(info: TensorInfo) -> int:
    return info.nbytes // max(1, math.prod(info.shape))


def _shard_names(count: int) -> list[str]:
    return [_SHARD.format(number, count) for number in range(1, count + 1)]


def _index(files: Sequence[_File], tensors: Mapping[str, TensorInfo]) -> bytes:
    places = {name: file.path.name for file in files for name in file.names}
    total = sum(info.nbytes for info in tensors.values())
    return json.dumps(
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}, indent=2
    ).encode()


def _write(
    source: TensorSource,
    files: Sequence[_File],
    extras: Mapping[str, bytes],
    total: int,
    progress: OnProgress | None,
    overwrite: bool,
) -> None:
    folder = files[0].path.parent
    made: dict[Path, Path] = {}
    done = 0
    with ExitStack() as cleanup:

        def partial(path: Path) -> Path:
            made[path] = path.with_name(path.name + _PARTIAL)
            cleanup.callback(made[path].unlink, missing_ok=True)
            return made[path]

        for place in reversed([place for place in (folder, *folder.parents) if not place.exists()]):
            place.mkdir()
            cleanup.callback(_remove_empty, place)
        for file in files:
            with partial(file.path).open("wb") as stream:
                stream.write(file.header)
                done += len(file.header)
                for name in file.names:
                    done = _append(stream, source.tensor(name), done, total, progress)
        for name, content in extras.items():
            with partial(folder / name).open("wb") as stream:
                stream.write(content)
        for written in made.values():  # all of them before the first is renamed: the disk may turn out to be full
            sync_file(written)
        for path, written in made.items():
            put_in_place(written, path, overwrite=overwrite)  # without, one that appeared meanwhile stays
        cleanup.pop_all()


def _append(stream: BinaryIO, tensor: torch.Tensor, done: int, total: int, progress: OnProgress | None) -> int:
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().data
    for start in range(0, len(data), _PART):
        part = data[start : start + _PART]
        stream.write(part)
        done += len(part)
        if progress:
            progress(done, total)
    return done


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # something else is in it
        folder.rmdir()

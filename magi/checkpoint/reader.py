"""Weight files on disk: find the safetensors of a file or folder and read their tensors lazily from the memory map.

Nothing is read into memory until a tensor is used, and on the CPU not even then: tensors returned here are views of the
mapped file, so the operating system may drop and reload their pages at will and no second copy ever exists.
"""

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType

import torch

from ..errors import MagiError
from ..system.folders import visible, what_is_at
from ..system.json_files import read_json
from ..system.paths import user_path
from ..system.printable import printable
from ..system.whole_files import file_fingerprint
from .file_guard import FileGuard
from .mapped_file import MappedFile, TensorInfo, first_few
from .zero_gap import zero_gap

_SHARD = re.compile(r"(.+)[-_]([0-9]{1,5})[-_]of[-_]([0-9]{1,5})((?:\.[a-z0-9]+)?)\.safetensors", re.IGNORECASE)
# What programs put in front of every name: the module in which theirs holds the model
_WRAPPERS = re.compile(
    r"(?:(?:model|module|diffusion_model|first_stage_model|transformer|dit|net|vae|ema|state_dict|_orig_mod)\.)+"
)


def find_weight_files(path: str | Path) -> list[Path]:
    """Returns the safetensors files of a checkpoint: the file itself, a folder's single one, or all shards.

    Shards are those that an index names, or without one those whose names count them: model-00001-of-00003.safetensors.
    A shard stands for all of them.

    Raises:
        MagiError: nothing is there, the folder holds no or several checkpoints, or a shard is missing.
    """
    return _find(user_path(path))[0]


def indexed_files(index: Path, *others: Path) -> list[Path]:
    """Returns the files that a checkpoint's index names.

    Raises:
        MagiError: there are several indices (`others`), it is unreadable, or a file that it names is missing.
    """
    return _indexed(index, *others)[0]


def _find(path: Path) -> tuple[list[Path], Iterable[str]]:
    """Returns the files, and the names of the tensors that an index says are in them."""
    there = what_is_at(path)
    if there == "nothing":
        raise MagiError(
            f"There is no file or folder {str(path)!r}. Check the path; `python -m magi download` fetches the official files."
        )
    if there == "file":
        return _indexed(path) if path.name.endswith(".index.json") else _with_its_shards(path)
    indices = visible(path, "*.safetensors.index.json")
    if indices:
        return _indexed(*indices)
    files = visible(path, "*.safetensors")
    if not files:
        raise MagiError(
            f"The folder {str(path)!r} holds no .safetensors file: {_content(path)}. Give the folder with the weights themselves."
        )
    sets = _sets(files)
    if len(sets) == 1:
        return _whole_set(path, *sets.popitem()), ()
    names = first_few([found[0].name for found in sets.values()])
    raise MagiError(
        f"The folder {str(path)!r} holds several .safetensors files and no index ({names}). Give one of them."
    )


def _content(folder: Path) -> str:
    names = [file.name for file in visible(folder, "*")]
    return f"it holds {first_few(names)}" if names else "nothing that shows is in it"


def _with_its_shards(file: Path) -> tuple[list[Path], Iterable[str]]:
    """Returns a file, or if it is one of several shards all of them."""
    shard = _SHARD.fullmatch(file.name)
    if shard is None:
        return [file], ()
    index = file.with_name(f"{shard[1]}{shard[4]}.safetensors.index.json")
    if index.is_file():
        files, names = _indexed(index)
        if file in files:
            return files, names
    key = _set_of(file)
    return _whole_set(file.parent, key, _sets(visible(file.parent, "*.safetensors")).get(key, [file])), ()


_Set = tuple[str, int]  # what all names of a checkpoint's shards share, and how many they say there are


def _set_of(file: Path) -> _Set:
    shard = _SHARD.fullmatch(file.name)
    return (f"{shard[1]}*{shard[4]}", int(shard[3])) if shard and int(shard[3]) else (file.name, 1)


def _sets(files: Iterable[Path]) -> dict[_Set, list[Path]]:
    """Groups files by the checkpoint that they are part of."""
    sets: dict[_Set, list[Path]] = defaultdict(list)
    for file in files:
        sets[_set_of(file)].append(file)
    return sets


def _whole_set(folder: Path, key: _Set, files: Sequence[Path]) -> list[Path]:
    """Returns the shards in their order. Raises MagiError unless all are there that their names count."""
    _, count = key
    shards = {int(shard[2]): shard for file in files if (shard := _SHARD.fullmatch(file.name))}
    if count == 1 or not shards:
        return list(files)
    one = next(iter(shards.values()))

    def named(number: int) -> str:
        return one[0][: one.start(2)] + str(number).zfill(len(one[2])) + one[0][one.end(2) :]

    missing = [named(number) for number in range(1, count + 1) if number not in shards]
    if missing:
        raise MagiError(
            f"{len(missing)} of {count} shards are missing in {str(folder)!r}: {first_few(missing)}. Download them again."
        )
    return [folder / shards[number][0] for number in range(1, count + 1)]


def _indexed(index: Path, *others: Path) -> tuple[list[Path], Iterable[str]]:
    if others:
        names = ", ".join(printable(file.name) for file in (index, *others))
        raise MagiError(
            f"The folder {str(index.parent)!r} holds {1 + len(others)} checkpoints, each with its index: {names}. "
            "Give one of these indices instead of the folder, or remove what does not belong."
        )
    try:
        places = _places(read_json(index))
    except (OSError, ValueError) as error:
        raise MagiError(f"The index {str(index)!r} is unreadable ({error}). Download it again.") from error
    shards = sorted(set(places.values()))
    missing = [s for s in shards if what_is_at(index.parent / s) != "file"]
    if missing:
        raise MagiError(
            f"{len(missing)} of {len(shards)} shards are missing beside {str(index)!r}: {first_few(missing)}. Download them again."
        )
    return [index.parent / s for s in shards], places


def _places(content: object) -> Mapping[str, str]:
    """Returns the file of each tensor by an index. Raises ValueError where it is none, or a file is not beside it."""
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise ValueError("it has no weight_map that names a file for each tensor")
    for file in set(places.values()):
        for kind in (PurePosixPath(file), PureWindowsPath(file)):
            if not file or kind.anchor or ".." in kind.parts:
                raise ValueError(f"the file {printable(file)!r} that it names is not in its folder")
    return places


class Checkpoint:
    """Tensors by name over one or more mapped safetensors files; a context manager. Its tensors outlive it.

    Names are without what some programs put in front of all of them, as "model.diffusion_model."; that is `prefix`.
    """

    def __init__(self, path: str | Path) -> None:
        """Maps the files of `path` (file, folder or index) and reads their headers only.

        Raises:
            MagiError: a file is missing, empty, truncated, unreadable or not safetensors, or a name is in two files.
        """
        self.path = user_path(path)
        self.files, indexed = _find(self.path)
        self.metadata: dict[str, str] = {}
        self._maps: dict[Path, MappedFile] = {}
        try:
            self._guard = FileGuard(self.files)
        except OSError as error:
            raise MagiError(f"{str(self.path)!r} cannot be read: {error}. Check that it is still there.") from error
        stored: dict[str, TensorInfo] = {}
        for file in self.files:
            mapped = self._maps[file] = MappedFile(file)
            self.metadata |= mapped.metadata
            for name in mapped.tensors.keys() & stored.keys():
                raise MagiError(
                    f"The tensor {printable(name)!r} is in both {stored[name].file.name!r} and {file.name!r}. "
                    "Remove the file that does not belong."
                )
            stored |= mapped.tensors
        self._absent = [name for name in indexed if name not in stored]
        self.prefix = _common_prefix(stored)
        self._stored_names = {name.removeprefix(self.prefix): name for name in stored}
        self.tensors: dict[str, TensorInfo] = {name: stored[there] for name, there in self._stored_names.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def tensor(self, name: str) -> torch.Tensor:
        """Returns the tensor as stored: a view of the mapped file on the CPU. Writing to it ends the process.

        Raises:
            MagiError: torch has no such type, or the file was written to since.
        """
        self.check_unchanged()
        return self._maps[self.tensors[name].file].tensor(self._stored_names[name])

    def check_unchanged(self) -> None:
        """Raises MagiError where a file was written to since it was mapped; to be called before tensors are used again."""
        self._guard.check()

    def check_whole(self) -> None:
        """Looks for what an interrupted download leaves out, by a few samples of the numbers.

        Raises:
            MagiError: a tensor that the index names is in no file, or the numbers give way to zeros.
        """
        if self._absent:
            raise MagiError(
                f"{str(self.path)!r} lacks {len(self._absent)} tensors that its index names: {first_few(self._absent)}. "
                "Download the files and the index again."
            )
        for file, mapped in self._maps.items():
            name = zero_gap(mapped)
            if name is not None:
                raise MagiError(
                    f"{str(file)!r} is not whole: at the tensor {printable(name)} it holds zeros instead of numbers, as in "
                    "a download that broke off after room for it had been reserved. Download it again."
                )

    @property
    def nbytes(self) -> int:
        """Returns the bytes of all files."""
        return sum(file.stat().st_size for file in self.files)

    def fingerprint(self) -> str:
        """Returns 64 hexadecimal digits that identify these weights, wherever they lie: of headers, sizes and samples.

        Raises:
            MagiError: a file cannot be read any more.
        """
        header = [[name, info.dtype, info.shape] for name, info in self.tensors.items()]
        try:
            files = [file_fingerprint(file) for file in self.files]
        except OSError as error:
            raise MagiError(f"{str(self.path)!r} cannot be read: {error}. Check that it is still there.") from error
        return hashlib.sha256(json.dumps([header, files]).encode()).hexdigest()

    def close(self) -> None:
        """Closes the files. Tensors that were returned stay valid: they keep their map open."""
        self._maps.clear()


def _common_prefix(names: Iterable[str]) -> str:
    """Returns what a program put in front of all names; markers of a single word may stand without it."""
    common = os.path.commonprefix([name for name in names if "." in name])  # noqa: RUF071 (these are no paths)
    found = _WRAPPERS.match(common)
    return found[0] if found else ""

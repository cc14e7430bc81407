"""Weight files on disk: find the safetensors of a file or folder and read their tensors lazily from the memory map.

Nothing is read into memory until a tensor is used, and on the CPU not even then: tensors returned here are views of the
mapped file, so the operating system may drop and reload their pages at will and no second copy ever exists.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import torch

from ..errors import MagiError
from ..system.whole_files import file_fingerprint
from .mapped_file import MappedFile, TensorInfo


def find_weight_files(path: str | Path) -> list[Path]:
    """Returns the safetensors files of a checkpoint: the file itself, a folder's single one, or the shards of an index.

    Raises:
        MagiError: nothing is there, the folder holds no or several checkpoints, or a shard is missing.
    """
    path = Path(path).expanduser()
    if path.is_file():
        if path.name.endswith(".index.json"):
            return indexed_files(path)
        return [path]
    if not path.is_dir():
        raise MagiError(
            f"There is no file or folder {str(path)!r}. Check the path; `python -m magi download` fetches the official files."
        )
    indices = sorted(path.glob("*.safetensors.index.json"))
    if indices:
        return indexed_files(*indices)
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if not files:
        raise MagiError(
            f"The folder {str(path)!r} holds no .safetensors file. Give the folder with the weights themselves."
        )
    names = ", ".join(f.name for f in files[:4])
    raise MagiError(
        f"The folder {str(path)!r} holds several .safetensors files and no index ({names} ...). Give one of them."
    )


def indexed_files(index: Path, *others: Path) -> list[Path]:
    """Returns the files that a checkpoint's index names.

    Raises:
        MagiError: there are several indices (`others`), it is unreadable, or a file that it names is missing.
    """
    if others:
        names = ", ".join(file.name for file in (index, *others))
        raise MagiError(
            f"The folder {str(index.parent)!r} holds {1 + len(others)} checkpoints, each with its index: {names}. "
            "Give one of these indices instead of the folder, or remove what does not belong."
        )
    try:
        shards = sorted(set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MagiError(f"The index {str(index)!r} is unreadable ({error}). Download it again.") from error
    missing = [s for s in shards if not (index.parent / s).is_file()]
    if missing:
        raise MagiError(
            f"{len(missing)} of {len(shards)} shards are missing beside {str(index)!r}: {', '.join(missing[:3])}. Download them again."
        )
    return [index.parent / s for s in shards]


class Checkpoint:
    """Tensors by name over one or more mapped safetensors files; a context manager. Its tensors outlive it."""

    def __init__(self, path: str | Path) -> None:
        """Maps the files of `path` (file, folder or index) and reads their headers only.

        Raises:
            MagiError: a file is missing, empty, truncated, unreadable or not safetensors, or a name is in two files.
        """
        self.path = Path(path).expanduser()
        self.files = find_weight_files(self.path)
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._maps: dict[Path, MappedFile] = {}
        for file in self.files:
            mapped = self._maps[file] = MappedFile(file)
            self.metadata |= mapped.metadata
            for name in mapped.tensors.keys() & self.tensors.keys():
                raise MagiError(
                    f"The tensor {name!r} is in both {self.tensors[name].file.name!r} and {file.name!r}. "
                    "Remove the file that does not belong."
                )
            self.tensors |= mapped.tensors

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
            MagiError: torch has no such type.
        """
        return self._maps[self.tensors[name].file].tensor(name)

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

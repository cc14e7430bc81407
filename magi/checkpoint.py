"""Weight files on disk: find the safetensors of a file or folder and read their tensors lazily from the memory map.

Nothing is read into memory until a tensor is used, and on the CPU not even then: tensors returned here are views of the
mapped file, so the operating system may drop and reload their pages at will and no second copy ever exists.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open

from .errors import MagiError

# Header spelling -> torch. float8 is looked up, since a torch build may lack it.
DTYPES: dict[str, torch.dtype | None] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": getattr(torch, "float8_e4m3fn", None),
    "F8_E5M2": getattr(torch, "float8_e5m2", None),
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of one tensor. `dtype` is the header's spelling (F32, BF16, F8_E4M3 ...)."""

    shape: tuple[int, ...]
    dtype: str
    file: Path

    @property
    def nbytes(self) -> int:
        """Bytes in the file. Spellings end in their bits (BF16) or name them (F8_E4M3)."""
        bits = {"BOOL": 8}.get(self.dtype) or int("".join(c for c in self.dtype.split("_")[0] if c.isdigit()))
        return math.prod(self.shape) * bits // 8


def find_weight_files(path: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint: the file itself, or a folder's index, single file or shards.

    Raises:
        MagiError: nothing is there, the folder holds no or several checkpoints, or a shard is missing.
    """
    path = Path(path).expanduser()
    if path.is_file():
        if path.name.endswith(".index.json"):
            return _indexed(path)
        return [path]
    if not path.is_dir():
        raise MagiError(
            f"There is no file or folder {str(path)!r}. Check the path; `python -m magi download` fetches the official files."
        )
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return _indexed(indices[0])
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


def _indexed(index: Path) -> list[Path]:
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
    """Tensors by name over one or more mapped safetensors files. Use as a context manager, or keep it as long as its tensors."""

    def __init__(self, path: str | Path) -> None:
        """Maps the files of `path` (file, folder or index) and reads their headers only.

        Raises:
            MagiError: a file is empty, truncated, unreadable or not safetensors, or a name stands in two files.
        """
        self.path = Path(path).expanduser()
        self.files = find_weight_files(self.path)
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._handles = {}
        for file in self.files:
            handle = self._handles[file] = _open(file)
            self.metadata |= handle.metadata() or {}
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                if name in self.tensors:
                    raise MagiError(
                        f"The tensor {name!r} is in both {self.tensors[name].file.name!r} and {file.name!r}. Remove the file that does not belong."
                    )
                part = handle.get_slice(name)
                self.tensors[name] = TensorInfo(tuple(part.get_shape()), part.get_dtype(), file)

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
        """The tensor as stored: a view of the mapped file on the CPU. Never write to it."""
        info = self.tensors[name]
        if DTYPES.get(info.dtype) is None:
            raise MagiError(
                f"The tensor {name!r} has the type {info.dtype}, which torch {torch.__version__} cannot hold. Update torch, or use a bf16 checkpoint."
            )
        return self._handles[info.file].get_tensor(name)

    @property
    def nbytes(self) -> int:
        """Size of the files in bytes."""
        return sum(file.stat().st_size for file in self.files)

    def close(self) -> None:
        """Forgets the file handles. Tensors handed out stay valid: they hold the map."""
        self._handles.clear()


def _open(file: Path) -> safe_open:
    try:
        size = file.stat().st_size
        if size == 0:
            raise MagiError(f"The file {str(file)!r} is empty: a download that failed. Download it again.")
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise MagiError(
            f"{str(file)!r} ({size:,} bytes) is not a whole safetensors file ({error}). "
            "It is truncated or of another kind: download it again, or choose another file."
        ) from error
    except OSError as error:
        raise MagiError(f"{str(file)!r} cannot be read: {error}.") from error

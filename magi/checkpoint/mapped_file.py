"""One safetensors file, mapped read-only.

The safetensors library maps files privately and writably, which counts against the machine's memory: a system may
refuse to map a file larger than its RAM. Reading such files is the point here, so the map is made by hand. The format
is an 8-byte length, a JSON header of that length, and the tensors.
"""

import json
import math
import mmap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from ..errors import MagiError

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
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LENGTH = 8
_LONGEST_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorInfo:
    """One tensor by a file's header. `dtype` is the header's spelling (F32, BF16, F8_E4M3 ...)."""

    shape: tuple[int, ...]
    dtype: str
    file: Path

    @property
    def nbytes(self) -> int:
        """Returns its bytes in the file."""
        # A spelling begins with its kind and bits: BF16, F8_E4M3
        bits = {"BOOL": 8}.get(self.dtype) or int("".join(c for c in self.dtype.split("_")[0] if c.isdigit()))
        return math.prod(self.shape) * bits // 8


class TensorSource(Protocol):
    """Named tensors, read one at a time: a mapped checkpoint, or one made of random numbers."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Returns the header of every tensor by name."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """Returns the tensor as stored, on the CPU; it must not be written to."""
        ...


class TensorFaults(NamedTuple):
    """Names of tensors that keep a file from being what is wanted."""

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]


def compare_shapes(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> TensorFaults:
    """Returns the names of tensors that are missing, unexpected or of another shape than is wanted."""
    return TensorFaults(
        missing=[name for name in wanted if name not in found],
        unexpected=[name for name in found if name not in wanted],
        misshapen=[name for name, shape in wanted.items() if name in found and tuple(found[name]) != shape],
    )


def first_few(names: Sequence[str]) -> str:
    """Returns the first three names, for a message."""
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


class MappedFile:
    """Header and tensors of a file. Tensors are views of the map and keep it alive."""

    def __init__(self, path: Path) -> None:
        """Maps the file and checks its header against its size.

        Raises:
            MagiError: the file is empty, truncated, unreadable or not safetensors.
        """
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._starts: dict[str, int] = {}
        try:
            size = path.stat().st_size
            if size == 0:
                raise MagiError(f"The file {str(path)!r} is empty: a download that failed. Download it again.")
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise MagiError(f"{str(path)!r} cannot be read: {error}.") from error
        try:
            self._read_header(size)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise MagiError(
                f"{str(path)!r} ({size:,} bytes) is not a whole safetensors file ({error}). "
                "It is truncated or of another kind: download it again, or choose another file."
            ) from error

    def _read_header(self, size: int) -> None:
        length = int.from_bytes(self._map[:_LENGTH], "little")
        data = _LENGTH + length
        if length > _LONGEST_HEADER or data > size:
            raise ValueError(f"a header of {length:,} bytes")
        header = json.loads(self._map[_LENGTH:data])
        self.metadata = dict(header.pop("__metadata__", None) or {})
        end_of_all = data
        for name, entry in header.items():
            info = TensorInfo(tuple(int(n) for n in entry["shape"]), str(entry["dtype"]), self.path)
            start, end = (data + int(offset) for offset in entry["data_offsets"])
            if not data <= start <= end or end - start != info.nbytes or min(info.shape, default=0) < 0:
                raise ValueError(f"the tensor {name!r} has offsets that cannot be")
            self.tensors[name] = info
            self._starts[name] = start
            end_of_all = max(end_of_all, end)
        if end_of_all != size:
            raise ValueError(f"its tensors end at byte {end_of_all:,}")

    def tensor(self, name: str) -> torch.Tensor:
        """Returns the tensor as stored, a read-only view of the map on the CPU: writing to it ends the process.

        Raises:
            MagiError: torch has no such type.
        """
        info = self.tensors[name]
        dtype = DTYPES.get(info.dtype)
        if dtype is None:
            raise MagiError(
                f"The tensor {name!r} has the type {info.dtype}, which torch {torch.__version__} cannot hold. "
                "Update torch, or use a bf16 checkpoint."
            )
        if not info.nbytes:
            return torch.empty(info.shape, dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable")
            raw = torch.frombuffer(self._map, dtype=torch.uint8, count=info.nbytes, offset=self._starts[name])
        if raw.data_ptr() % dtype.itemsize:  # unaligned, which the format allows
            raw = raw.clone()
        return raw.view(dtype).reshape(info.shape)

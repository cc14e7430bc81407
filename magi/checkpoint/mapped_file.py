"""One safetensors file, mapped read-only.

The safetensors library maps files privately and writably, which counts against the machine's memory: a system may
refuse to map a file larger than its RAM. Reading such files is the point here, so the map is made by hand. The format
is an 8-byte length, a JSON header of that length, and the tensors.
"""

import json
import math
import mmap
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from ..errors import MagiError
from ..system.file_kinds import file_kind
from ..system.json_files import parse_json
from ..system.printable import printable

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
_LONGEST_HEADER = 1 << 25  # bytes: of a hundred thousand tensors. The format's own limit is three times as much
_SPELLING = re.compile(r"[A-Z]+([0-9]{1,3})(?:_[A-Z0-9]+)?")  # the kind of a type and its bits: BF16, F8_E4M3
_MOST_AXES, _LONGEST_AXIS = 32, 1 << 40


@dataclass(frozen=True)
class TensorInfo:
    """One tensor by a file's header. `dtype` is the header's spelling (F32, BF16, F8_E4M3 ...)."""

    shape: tuple[int, ...]
    dtype: str
    file: Path

    @property
    def nbytes(self) -> int:
        """Returns its bytes in the file.

        Raises:
            ValueError: the type is none that a file can have.
        """
        if self.dtype == "BOOL":
            return math.prod(self.shape)
        spelling = _SPELLING.fullmatch(self.dtype)
        if spelling is None:
            raise ValueError(f"there is no type {printable(self.dtype, 40)!r}")
        return math.prod(self.shape) * int(spelling[1]) // 8


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
    """Returns the first three names, for a message: short, and nothing in them that a terminal obeys."""
    return ", ".join(map(printable, names[:3])) + (" ..." if len(names) > 3 else "")


class MappedFile:
    """Header and tensors of a file. Tensors are views of the map and keep it alive."""

    def __init__(self, path: Path) -> None:
        """Maps the file and checks its header against its size.

        Raises:
            MagiError: the file is empty, truncated, unreadable or not safetensors; it says what it is instead.
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
            kind = None if _may_be_safetensors(self._map) else file_kind(path)
        except OSError as error:
            raise MagiError(f"{str(path)!r} cannot be read: {error}.") from error
        if kind is not None:
            raise MagiError(
                f"{str(path)!r} ({size:,} bytes) is not a safetensors file: it is {kind.name}. {kind.remedy}."
            )
        try:
            self._read_header(size)
        except ValueError as error:
            raise MagiError(
                f"{str(path)!r} ({size:,} bytes) is not a whole safetensors file ({error}). "
                "It is truncated or of another kind: download it again, or choose another file."
            ) from error

    def _read_header(self, size: int) -> None:
        """Reads names, types, shapes and places. Raises ValueError where they contradict each other or the size."""
        length = int.from_bytes(self._map[:_LENGTH], "little")
        data = _LENGTH + length
        if length > _LONGEST_HEADER or data > size:
            raise ValueError(f"a header of {length:,} bytes")
        header = parse_json(self._map[_LENGTH:data])
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        self.metadata = _metadata(header.pop("__metadata__", None))
        for name, entry in header.items():
            try:
                self.tensors[name], start = _entry(entry, self.path)
            except ValueError as error:
                raise ValueError(f"the tensor {printable(name)!r}: {error}") from error
            self._starts[name] = data + start
        at = data
        for name in sorted(self.tensors, key=lambda name: (self._starts[name], self.tensors[name].nbytes)):
            if self._starts[name] != at:
                raise ValueError(f"the tensor {printable(name)!r} does not begin where the one before it ends")
            at += self.tensors[name].nbytes
        if at != size:
            raise ValueError(f"its tensors end at byte {at:,}")

    def raw(self, name: str, first: int, last: int) -> bytes:
        """Returns a copy of the bytes `first` to `last`, exclusive, of a tensor; fewer where it ends before."""
        start = self._starts[name]
        return self._map[start + first : start + min(last, self.tensors[name].nbytes)]

    def in_order(self) -> list[str]:
        """Returns the tensors' names as they follow each other in the file."""
        return sorted(self._starts, key=self._starts.__getitem__)

    def tensor(self, name: str) -> torch.Tensor:
        """Returns the tensor as stored, a read-only view of the map on the CPU: writing to it ends the process.

        Raises:
            MagiError: torch has no such type.
        """
        info = self.tensors[name]
        dtype = DTYPES.get(info.dtype)
        if dtype is None:
            raise MagiError(
                f"The tensor {printable(name)!r} has the type {info.dtype}, which torch {torch.__version__} cannot hold. "
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


def _may_be_safetensors(data: mmap.mmap) -> bool:
    """Tells whether a file begins as one must: with a length that fits into it, and a brace."""
    length = int.from_bytes(data[:_LENGTH], "little")
    return 0 < length <= len(data) - _LENGTH and data[_LENGTH : _LENGTH + 1] == b"{"


def _metadata(found: Any) -> dict[str, str]:
    """Returns a header's metadata; values that are no texts, as the format has it, become their JSON."""
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError("its metadata is no JSON object")
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in found.items()}


def _entry(entry: Any, file: Path) -> tuple[TensorInfo, int]:
    """Returns what a header says of a tensor, and where its data begin. Raises ValueError for what cannot be."""
    if not isinstance(entry, dict):
        raise ValueError("it has no type, shape and place")
    dtype, shape, place = entry.get("dtype"), _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
    if not isinstance(dtype, str):
        raise ValueError("its type is no text")
    if shape is None or len(shape) > _MOST_AXES or max(shape, default=0) > _LONGEST_AXIS:
        raise ValueError(f"it cannot have the shape {printable(entry.get('shape'))}")
    info = TensorInfo(shape, dtype, file)
    if place is None or len(place) != 2 or place[1] - place[0] != info.nbytes:
        raise ValueError(f"it cannot lie at {printable(entry.get('data_offsets'))}")
    return info, place[0]


def _counts(found: Any) -> tuple[int, ...] | None:
    return tuple(found) if isinstance(found, list) and all(type(n) is int and n >= 0 for n in found) else None

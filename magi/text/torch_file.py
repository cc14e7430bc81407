"""Tensors of a torch file (`.bin`, `.pt`), mapped from disk, without running what is in the file.

Such a file is a zip archive: the numbers of each storage as a member of their own, and a pickle that says how tensors lie
in them. A pickle is a program: unpickling runs it, and the checks of `torch.load(weights_only=True)` could be got round
before torch 2.10 (CVE-2025-32434, CVE-2026-24747). So it is not unpickled at all. Its instructions are read one by one,
and only those that build names, numbers and tensors are known here; what asks for anything else is refused. That is the
same for every torch, and as members are stored as they are, the numbers are mapped like those of safetensors files.
"""

import mmap
import pickletools
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..errors import MagiError
from ..system.file_kinds import file_kind
from ..system.printable import printable

_PICKLE = "data.pkl"
_MOST_INSTRUCTIONS = 1 << 20  # bytes of the pickle; T5's have 40 kB
_MOST_AXES, _MOST_VALUES = 32, 1 << 48
_LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")  # how torch.save began before 1.6
_MEMBER = b"PK\x03\x04"  # how a member of a zip archive begins
_LOCAL_HEADER = 30  # bytes before a member's name, whose length and that of what follows are the last four
_STORAGES = {
    f"torch {name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}
_UNTYPED = "torch.storage UntypedStorage"  # of bytes; the type stands at the tensor, as that of float8 does
_DTYPES = {
    f"torch {name}": getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
} | {f"torch {name}": getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2") if hasattr(torch, name)}


class _RefusedError(Exception):
    """The pickle asks for something that tensors do not need; its text says what, after "it"."""


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype | None
    member: str
    values: int


@dataclass(frozen=True)
class _Layout:
    """Where a tensor's values lie: `start` and `strides` in values of its storage."""

    storage: _Storage
    dtype: torch.dtype
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def map_torch_file(file: Path) -> dict[str, torch.Tensor]:
    """Maps the tensors of a torch file by name: views of the file on the CPU, never to be written to.

    Raises:
        MagiError: the file is missing, cut off or of another kind, or holds anything but tensors by name.
    """
    try:
        return _map(file)
    except MagiError:
        raise
    except _RefusedError as error:
        raise MagiError(
            f"{str(file)!r} holds more than plain tensors by name: it {error}. That may be code, and none of the file is run. "
            "Give T5 weights as transformers saves them, or a .safetensors file."
        ) from error
    except (OSError, MemoryError) as error:
        raise MagiError(f"{str(file)!r} cannot be read: {error}. Check the disk that it is on.") from error
    # What zipfile and pickletools raise over damaged bytes: BadZipFile, NotImplementedError (another compression), struct.error
    except Exception as error:
        raise MagiError(
            f"{str(file)!r} is damaged ({printable(error)}). Download it again, or use a .safetensors file."
        ) from error


def _map(file: Path) -> dict[str, torch.Tensor]:
    if not zipfile.is_zipfile(file):
        raise MagiError(_not_torch(file))
    with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
        members = {member.filename: member for member in archive.infolist()}
        folders = [name.removesuffix(_PICKLE) for name in members if name.endswith(f"/{_PICKLE}")]
        if len(folders) != 1 or f"{folders[0]}constants.pkl" in members:
            what = "a TorchScript program" if folders else "a zip archive of something else"
            raise MagiError(
                f"{str(file)!r} holds no weights by name: it is {what}. Give T5 weights, as .bin or .safetensors."
            )
        folder = folders[0]
        if f"{folder}byteorder" in members and archive.open(f"{folder}byteorder").read(9) == b"big":
            raise MagiError(
                f"{str(file)!r} was saved on another kind of machine (big-endian). Use a .safetensors file."
            )
        if members[folder + _PICKLE].file_size > _MOST_INSTRUCTIONS:
            raise _RefusedError(f"describes its content in {members[folder + _PICKLE].file_size:,} bytes")
        layouts = _layouts(archive.read(folder + _PICKLE))
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    return {
        name: _tensor(layout, members[f"{folder}data/{layout.storage.member}"], data)
        for name, layout in layouts.items()
    }


def _not_torch(file: Path) -> str:
    size = file.stat().st_size
    if not size:
        return f"{str(file)!r} is empty: a download that failed. Download it again."
    with file.open("rb") as stream:
        head = stream.read(64)
    start = f"{str(file)!r} ({size:,} bytes) is not a whole torch file: "
    if head.startswith(_MEMBER):
        return f"{start}its end is missing. The download broke off: download it again."
    if head.startswith(_LEGACY):
        return (
            f"{start}it was saved by a torch older than 1.6, in a form that cannot be read without running it. "
            "Use a .safetensors file, or the official files: `python -m magi download t5` fetches them."
        )
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return f"{start}it is a safetensors file. Rename it to {file.with_suffix('.safetensors').name!r}."
    kind = file_kind(file)
    if kind is None:
        return f"{start}it is damaged or of another kind. Download it again, or use a .safetensors file."
    return f"{start}it is {kind.name}. {kind.remedy}."


def _tensor(layout: _Layout, member: zipfile.ZipInfo, data: mmap.mmap) -> torch.Tensor:
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise ValueError("it was packed anew, compressed or encrypted")
    if data[member.header_offset : member.header_offset + 4] != _MEMBER:
        raise ValueError("a part of it is missing")
    size = layout.storage.values * (layout.storage.dtype or torch.uint8).itemsize
    name = member.header_offset + _LOCAL_HEADER
    start = name + sum(int.from_bytes(data[at : at + 2], "little") for at in (name - 4, name - 2))
    if size > member.file_size or start + size > len(data):
        raise ValueError(f"{size:,} bytes of numbers are not in it")
    values = size // layout.dtype.itemsize
    last = layout.start + sum((n - 1) * stride for n, stride in zip(layout.shape, layout.strides, strict=True))
    if prod(layout.shape) == 0:
        return torch.empty(layout.shape, dtype=layout.dtype)
    # The second: by a stride of 0, a single number would make a huge tensor
    if last >= values or prod(layout.shape) > values:
        raise ValueError("a tensor is larger than its storage")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")
        raw = torch.frombuffer(data, dtype=torch.uint8, count=values * layout.dtype.itemsize, offset=start)
    if raw.data_ptr() % layout.dtype.itemsize:  # torch aligns what it saves
        raw = raw.clone()
    return raw.view(layout.dtype).as_strided(layout.shape, layout.strides, layout.start)


# -- the pickle -------------------------------------------------------------------------------------------------------


def _layouts(pickled: bytes) -> dict[str, _Layout]:
    content = _built(pickled)
    if not isinstance(content, dict) or not all(isinstance(value, _Layout) for value in content.values()):
        raise _RefusedError("is no plain table of tensors")
    return content


def _built(pickled: bytes) -> Any:
    """Returns what a pickle builds of names, numbers, tuples, dictionaries and tensors."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        taken = stack[start:]
        del stack[start:]
        return taken

    value: Any
    for instruction, value, _ in pickletools.genops(pickled):
        match instruction.name:
            case "PROTO" | "FRAME":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[instruction.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(value)
            case "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(value)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(instruction.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "GLOBAL":
                stack.append(_Global(value))
            case "STACK_GLOBAL":
                if not all(isinstance(part, str) for part in stack[-2:]):
                    raise _RefusedError("refers to something without a name")
                stack[-2:] = [_Global(" ".join(stack[-2:]))]
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                function, arguments = stack[-2:]
                stack[-2:] = [_call(function, arguments)]
            case "SETITEM" | "SETITEMS":
                items = since_mark() if instruction.name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                _set_items(stack[-1], items)
            case "BUILD":  # attributes of the table: the versions of the modules, which nobody needs
                if not isinstance(stack.pop(), dict) or not isinstance(stack[-1], dict):
                    raise _RefusedError("sets attributes of an object")
            case "STOP":
                return stack.pop()
            case other:
                raise _RefusedError(f"builds objects of another kind ({other})")
    raise ValueError("its description has no end")


def _set_items(target: Any, items: list[Any]) -> None:
    keys = items[::2]
    if not isinstance(target, dict) or not all(isinstance(key, str) for key in keys):
        raise _RefusedError("holds entries without a name")
    target.update(zip(keys, items[1::2], strict=True))


def _storage(found: Any) -> _Storage:
    match found:
        case ("storage", _Global(name), str(member), str(), int(values)) if values >= 0:
            if name in _STORAGES or name == _UNTYPED:
                return _Storage(_STORAGES.get(name), member, values)
            raise _RefusedError(f"holds numbers of the type {_spelled(name)}")
    raise _RefusedError("refers to other objects than storages of numbers")


def _call(function: Any, arguments: Any) -> Any:
    """Returns the result of one of the few functions that tensors are saved with."""
    made = _FUNCTIONS.get(function.name) if isinstance(function, _Global) else None
    if made is None:
        raise _RefusedError(f"calls {_spelled(function.name) if isinstance(function, _Global) else 'an object'}")
    return made(*arguments)


def _rebuilt(storage: Any, start: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any) -> _Layout:
    return _layout(storage, storage.dtype, start, shape, strides)


def _rebuilt_with_type(
    storage: Any, start: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, metadata: Any = None
) -> _Layout:
    if metadata:
        raise _RefusedError("holds tensors with attributes")
    return _layout(storage, _DTYPES.get(dtype.name), start, shape, strides)


def _layout(storage: Any, dtype: Any, start: Any, shape: Any, strides: Any) -> _Layout:
    if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype):
        raise _RefusedError("holds tensors of an unknown type")
    if len(shape) != len(strides) or len(shape) > _MOST_AXES:
        raise _RefusedError("holds tensors without a shape")
    if not all(type(n) is int and 0 <= n <= _MOST_VALUES for n in (start, *shape, *strides)):
        raise _RefusedError("holds tensors of impossible sizes")
    return _Layout(storage, dtype, start, shape, strides)


def _parameter(tensor: Any, _grad: Any, _hooks: Any) -> Any:
    return tensor


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": lambda: {},
    "torch._utils _rebuild_tensor_v2": _rebuilt,
    "torch._utils _rebuild_tensor_v3": _rebuilt_with_type,
    "torch._utils _rebuild_parameter": _parameter,
}


def _spelled(name: str) -> str:
    return printable(name.replace(" ", "."))

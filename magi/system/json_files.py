"""JSON that others wrote: read strictly, with a reason in plain words where it cannot be."""

import json
import math
from pathlib import Path
from typing import Any

from .file_kinds import file_kind
from .printable import printable

_MOST_BYTES = 100_000_000


def read_json(path: Path) -> Any:
    """Reads a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte-order mark.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds no JSON; the reason stands alone.
    """
    size = path.stat().st_size
    if not size:
        raise ValueError("it is empty")
    if size > _MOST_BYTES:
        raise ValueError(f"it has {size:,} bytes, too many for what it should be")
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        kind = file_kind(path)
        if kind is None or kind.name.startswith("JSON"):
            raise
        raise ValueError(f"it is {kind.name}") from error


def parse_json(data: bytes) -> Any:
    """Parses JSON, and refuses what Python's parser lets pass: names that stand twice, NaN and infinity.

    Raises:
        ValueError: it is no JSON; the reason stands alone.
    """
    try:
        return json.loads(data, object_pairs_hook=_object, parse_float=_number, parse_constant=_number)
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError("its text is in another encoding than UTF-8: save it as UTF-8") from error
    except json.JSONDecodeError as error:
        is_cut = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string")
        what = "it is cut off" if is_cut else "it is no JSON"
        raise ValueError(f"{what}: {printable(error.msg)} in line {error.lineno}, column {error.colno}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {printable(twice)!r} stands in it twice")
    return found


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{printable(text)} is no number that JSON can hold")
    return number

"""Values as they are typed on the command line: sizes of pictures and of memory, and released models with fewer layers."""

import re

from ..config import PRESETS, MagiConfig
from ..errors import MagiError
from ..media.frames import AREAS

_UNITS = {"MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> tuple[int, int] | str:
    """Returns (height, width) in pixels of "1280x720"; or the name of an area, such as "480p", as it is.

    Raises:
        MagiError: the text is neither.
    """
    if text in AREAS:
        return text
    match = re.fullmatch(r"(\d{1,9})[x×*](\d{1,9})", text.strip().lower())
    if not match:
        raise MagiError(
            f"The size {text[:40]!r} is not understood. Write it as WIDTHxHEIGHT, e.g. 1280x720, or one of {', '.join(AREAS)}."
        )
    return int(match[2]), int(match[1])


def parse_bytes(text: str) -> int:
    """Returns the bytes of "5GB" or "500MB", in units of 1000.

    Raises:
        MagiError: the text is no such size, or 0.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([MG]B)", text.strip().upper())
    nbytes = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if not nbytes:
        raise MagiError(f"The size {text[:40]!r} is not understood. Write it as 5GB or 500MB.")
    return nbytes


def preset_config(preset: str, layers: int | None) -> MagiConfig:
    """Returns a released model's config, with fewer layers where their number is given.

    Raises:
        MagiError: the model cannot have so few or so many.
    """
    config = PRESETS[preset]
    if layers is None:
        return config
    least = 3 if config.engine.fp8_quant else 1  # the first and the last layer are never float8
    if not least <= layers <= config.model.num_layers:
        raise MagiError(f"{preset} cannot have {layers} layers. Choose {least} to {config.model.num_layers}.")
    return config.with_layers(layers)

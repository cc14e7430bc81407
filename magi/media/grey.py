"""Grey pictures of more than eight bits, whole numbers or floats: which number is meant to be white."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

# TIFF's tags, and the value of the second that stands for numbers below zero too
_PHOTOMETRIC, _SAMPLE_FORMAT, _SIGNED = 262, 339, 2

_SAMPLES = 512  # a side: enough to see what range a picture's numbers are in


@dataclass(frozen=True)
class GreyRange:
    """What the numbers of a picture mean: 0 is black and `white` white, or the reverse where they are `inverted`.

    PIL holds 32 bits as signed numbers; `unsigned` ones are to be taken as what they were in the file.
    """

    white: float
    inverted: bool = False
    unsigned: bool = False

    def to_8_bits(self, values: np.ndarray) -> np.ndarray:
        """Converts a picture's numbers, of any type and shape, to uint8; those out of range are clipped."""
        if self.unsigned:
            values = values.view(np.uint32)
        with np.errstate(all="ignore"):
            scaled = values.astype(np.float32) * np.float32(255 / self.white)
        grey = np.clip(np.rint(np.nan_to_num(scaled, posinf=255)), 0, 255).astype(np.uint8)
        return 255 - grey if self.inverted else grey


def is_deep_grey(mode: str) -> bool:
    """Returns whether a PIL mode is grey of more than eight bits."""
    return mode.startswith("I") or mode == "F"


def grey_range(image: Image.Image, raw_mode: str) -> GreyRange:
    """Finds the range of a loaded picture of such a mode; `raw_mode` is what PIL called its file's numbers.

    16-bit modes say it. 32-bit ones hold 8, 16 or 32 bits: the least that the numbers need. Floats are in 0..1, where a
    few above are highlights; only where half of all that is not black is above 1 they are in 0..255 or 0..65535.
    """
    tags: Any = getattr(image, "tag_v2", {})
    inverted = tags.get(_PHOTOMETRIC) == 0
    if image.mode.startswith("I;16"):
        return GreyRange(4095 if raw_mode == "I;12" else 65535, inverted)
    if image.mode == "I":
        if image.format != "TIFF":  # PNG and PGM hold 16 bits
            return GreyRange(65535, inverted)
        extrema: Any = image.getextrema()
        least, most = extrema
        unsigned = tags.get(_SAMPLE_FORMAT, (1,))[0] != _SIGNED
        full = 2**32 - 1 if unsigned else 2**31 - 1
        return GreyRange(_least_white(full if unsigned and least < 0 else most, 255, 65535, full), inverted, unsigned)
    values = np.asarray(image.resize([min(side, _SAMPLES) for side in image.size], Image.Resampling.NEAREST))
    light = values[np.isfinite(values) & (values > 0)]
    level = float(np.median(light)) if light.size else 0.0
    if level > 1 and (light == np.rint(light)).all():  # whole numbers: what holds them all
        level = float(light.max())
    return GreyRange(_least_white(level, 1, 255, 65535, 2**32 - 1), inverted)


def _least_white(level: float, *whites: int) -> int:
    return next((white for white in whites if level <= white), whites[-1])

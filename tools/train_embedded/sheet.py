"""Contact sheets: several videos of the world in one picture, a row of frames each, with the captions below."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .world import CHUNK, SIZE

_GAP, _LINE = 4, 14  # pixels between pictures, and of a line of text


def contact_sheet(
    videos: Sequence[NDArray[np.uint8]], captions: Sequence[Sequence[str]], *, every: int = 6, scale: int = 1
) -> NDArray[np.uint8]:
    """Returns one picture (height, width, 3) of videos, one below the other.

    Args:
        videos: frames (T, SIZE, SIZE, 3) each.
        captions: of each video, one per chunk; a caption stands once where it holds for several chunks.
        every: which frames are shown, from the first on.
        scale: by which the frames are enlarged.
    """
    rows = []
    for video, texts in zip(videos, captions, strict=True):
        lines = [f"{second} s: {text}" for second, text in enumerate(texts) if not second or text != texts[second - 1]]
        rows.append((video[::every].repeat(scale, axis=1).repeat(scale, axis=2), lines))
    step = SIZE * scale + _GAP
    width = max(len(shown) for shown, _ in rows) * step + _GAP
    height = sum(step + _LINE * len(lines) + 2 * _GAP for _, lines in rows)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = _GAP
    for shown, lines in rows:
        for number, frame in enumerate(shown):
            left = _GAP + number * step
            sheet.paste(Image.fromarray(frame), (left, top))
            if number and number * every % CHUNK == 0:  # a second begins
                draw.line([(left - _GAP // 2, top), (left - _GAP // 2, top + step - _GAP)], fill="red")
        top += step
        for line in lines:
            draw.text((_GAP, top), line, fill="black")
            top += _LINE
        top += 2 * _GAP
    return np.asarray(sheet)

"""Makes the README's pictures of what the embedded model makes: `python -m tools.train_embedded.gallery --out docs`."""

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from magi import MagiPipeline
from magi.cli.demo import TEXT

from . import world
from .evaluate import Maker
from .sheet import contact_sheet

# Prompts per second, and a seed.
VIDEOS: tuple[tuple[tuple[str, ...], int], ...] = (
    (TEXT, 0),
    (("A large yellow star turns on a dark blue background.",) * 4, 1),
    (
        ("The large blue square moves up on a beige background.",) * 2
        + ("Now the large square is green and moves down.",) * 2,
        2,
    ),
    (
        ("A small orange triangle stays still on a black background.", "Now the orange triangle grows.")
        + ("Then the orange triangle moves to the right on black.",) * 2,
        3,
    ),
    (
        ("A large purple ring moves to the left on a white background.",) * 2
        + ("The large purple ring now moves to the right on a white background.",) * 2,
        4,
    ),
    (
        ("A large white cross moves down on a dark green background.",) * 2
        + ("Then the large white cross turns on dark green.",) * 2,
        6,
    ),
)
_COLUMNS, _SCALE, _SKIP = 3, 2, 2  # of the animation; every second frame


def palette() -> Image.Image:
    """Returns an image with the palette of the world: its colours, what lies between each and a background, and black and white."""
    mixed = [
        np.array(background) + share * (np.array(colour) - background)
        for colour in world.COLOURS.values()
        for background in world.BACKGROUNDS.values()
        for share in (1, 0.75, 0.5, 0.25)
    ]
    colours = [*world.BACKGROUNDS.values(), (0, 0, 0), (255, 255, 255), (255, 0, 0), *mixed]
    image = Image.new("P", (1, 1))
    image.putpalette(np.unique(np.array(colours, dtype=np.uint8), axis=0).flatten().tolist())
    return image


def reduced(frame: NDArray[np.uint8], colours: Image.Image) -> Image.Image:
    """Returns a picture in the colours of a palette."""
    return Image.fromarray(frame).quantize(palette=colours, dither=Image.Dither.NONE)


def animation(videos: list[NDArray[np.uint8]], colours: Image.Image) -> list[Image.Image]:
    """Returns the frames of all videos side by side."""
    rows = [np.concatenate(videos[i : i + _COLUMNS], axis=2) for i in range(0, len(videos), _COLUMNS)]
    every = np.concatenate(rows, axis=1)[::_SKIP].repeat(_SCALE, axis=1).repeat(_SCALE, axis=2)
    return [reduced(frame, colours) for frame in every]


def main() -> None:
    """Makes the pictures."""
    parser = argparse.ArgumentParser(description="Makes the README's pictures of what the embedded model makes.")
    parser.add_argument("--out", type=Path, required=True, help="folder for embedded.gif and embedded.png")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    maker = Maker(MagiPipeline.embedded())
    videos = [maker.video(prompts, seed) for prompts, seed in VIDEOS]
    colours = palette()
    first, *others = animation(videos, colours)
    pause = 1000 * _SKIP // world.FPS
    first.save(args.out / "embedded.gif", save_all=True, append_images=others, duration=pause, loop=0, optimize=True)
    sheet = contact_sheet(videos, [prompts for prompts, _ in VIDEOS], every=8, scale=1)
    reduced(sheet, colours).save(args.out / "embedded.png", optimize=True)


if __name__ == "__main__":
    main()

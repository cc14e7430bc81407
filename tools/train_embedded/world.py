"""The world that the embedded model is trained on: one flat object on a plain background, which does what a caption says.

A `Scene` is drawn from a seed and rendered by `frames`; `captions.py` says it in English. Every picture is `SIZE` x `SIZE` pixels,
a clip has `FPS` frames per second and `CHUNK` frames (one second) per chunk. Motion and colour may change where a chunk begins.
An object that comes to the last place of a row or column stops there, and one that has grown or shrunk to the limit keeps its size, so every
sequence of motions can be shown, however long. x points right and y down; lengths are in pixels, times in seconds.

Chunks begin with few different pictures, as on a board of 3 x 3: the object is at one of nine places, has one of three sizes and
stands upright. Motions take it to the next such picture in a second. A small model can learn these with all their edges; of a world
in which every number may have any value it learned only blurred ones (docs/embedded-model.md).

Some combinations of shape, colour and motion are never in a training scene (`is_held_out`): evaluation asks for those.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from magi.config import FPS

SIZE = 64
CHUNK = FPS  # frames of a second

Array = NDArray[np.float32]
RGB = tuple[int, int, int]
T = TypeVar("T")

# The order of these four is part of the rule of what is held out: append, never insert.
SHAPES = ("circle", "square", "triangle", "ring", "cross", "star")
COLOURS: dict[str, RGB] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 90, 230),
    "yellow": (245, 215, 40),
    "orange": (245, 135, 25),
    "purple": (150, 60, 190),
    "cyan": (40, 200, 215),
    "white": (245, 245, 245),
}
BACKGROUNDS: dict[str, RGB] = {
    "black": (15, 15, 15),
    "white": (240, 240, 240),
    "grey": (128, 128, 128),
    "dark blue": (20, 30, 90),
    "dark green": (15, 65, 35),
    "beige": (225, 205, 165),
}
MOTIONS = ("left", "right", "up", "down", "still", "grows", "shrinks", "turns")

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
RESIZING = {"grows": 1, "shrinks": -1}
SYMMETRY = {
    "square": 4,
    "triangle": 3,
    "cross": 4,
    "star": 5,
}  # how often a full turn repeats the shape; others never turn

# The numbers of scenes.
PLACES = (16.0, 32.0, 48.0)  # x and y at which objects are as a second begins; none goes beyond the outer ones
SPEED = 16.0  # pixels per second: from a place to the next
GROWTH = 2**0.5  # of the radius in a second: from a size to the next
RADII = (7.5, 15 / GROWTH, 15.0)  # of the circle around the shape, as a second begins
RADIUS = {"small": RADII[1], "large": RADII[2]}  # when the scene begins
MIN_RADIUS, MAX_RADIUS = RADII[0], RADII[-1]

CLEAR = 0.2  # least distance in OKLab of an object's colour from the background
CHANGES = 0.3  # share of the chunks, but for the first, that bring a change
RECOLOURED = 0.3  # share of these changes that are of colour


@dataclass(frozen=True)
class Scene:
    """A clip in numbers: what there is to see, and in every chunk its motion and colour.

    Attributes:
        shape: a name of `SHAPES`.
        size: "small" or "large", as the clip begins.
        background: a name of `BACKGROUNDS`.
        motions: a name of `MOTIONS` per chunk.
        colours: a name of `COLOURS` per chunk.
        start: centre of the object in the first frame, (x, y) in pixels.
    """

    shape: str
    size: str
    background: str
    motions: tuple[str, ...]
    colours: tuple[str, ...]
    start: tuple[float, float]

    @property
    def turn(self) -> float:
        """Returns degrees per second, clockwise, where it turns: once to the next angle at which the shape looks the same."""
        return 360 / SYMMETRY.get(self.shape, 1)

    @property
    def chunks(self) -> int:
        """Returns how many chunks the clip has."""
        return len(self.motions)


@dataclass(frozen=True)
class Path:
    """Where the object is in every frame: centre (T, 2) as x, y in pixels, radius (T,) in pixels, angle (T,) in degrees."""

    centre: NDArray[np.float64]
    radius: NDArray[np.float64]
    angle: NDArray[np.float64]


def is_held_out(shape: str, colour: str, motion: str) -> bool:
    """Returns whether a combination is kept from training.

    One in seven is, and so evenly that training still has every pair of shape and colour, shape and motion, colour and motion.
    """
    numbers = SHAPES.index(shape), list(COLOURS).index(colour), MOTIONS.index(motion)
    return (numbers[0] + 2 * numbers[1] + 3 * numbers[2]) % 7 == 0


@cache
def combinations(held_out: bool) -> tuple[tuple[str, str, str], ...]:
    """Returns every (shape, colour, motion) of the training scenes, or of those held out. Round shapes do not turn."""
    return tuple(
        (shape, colour, motion)
        for shape in SHAPES
        for colour in COLOURS
        for motion in MOTIONS
        if is_held_out(shape, colour, motion) == held_out and (motion != "turns" or shape in SYMMETRY)
    )


def oklab(rgb: NDArray) -> NDArray[np.float64]:
    """Returns sRGB values (..., 3) from 0 to 255 in OKLab, whose distances are about as the eye sees them (black to white: 1)."""
    srgb = np.clip(np.asarray(rgb, dtype=np.float64) / 255, 0, 1)
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _RGB_TO_LMS.T) @ _LMS_TO_LAB.T


_RGB_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_LMS_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


@cache
def clear_backgrounds(*colours: str) -> tuple[str, ...]:
    """Returns the backgrounds that objects of all these colours stand out from."""
    objects = oklab(np.array([COLOURS[colour] for colour in colours]))
    return tuple(
        name
        for name, rgb in BACKGROUNDS.items()
        if np.linalg.norm(objects - oklab(np.array(rgb)), axis=-1).min() >= CLEAR
    )


def draw(seed: int, chunks: int, *, held_out: bool = False, changes: float = CHANGES) -> Scene:
    """Returns the scene of a seed: the same on every machine.

    What is drawn for a chunk does not depend on what follows, as the model, which sees no later caption, could not know it.

    Args:
        seed: any number from 0 on; scenes that are held out have seeds of their own.
        chunks: length of the clip, in seconds.
        held_out: start with a combination of `combinations(True)`. Other scenes have none of these in any chunk.
        changes: probability that motion or colour changes where a chunk begins (more often where the object cannot go on).
    """
    random = Draws(seed, int(held_out))
    shape, colour, motion = random.choice(combinations(held_out))
    background = random.choice(clear_backgrounds(colour))
    size = random.choice([name for name in RADIUS if motion != "grows" or RADIUS[name] < MAX_RADIUS])
    start = _start(random, motion)
    motions: tuple[str, ...] = (motion,)
    colours: tuple[str, ...] = (colour,)
    while True:
        scene = Scene(shape, size, background, motions, colours, start)
        if scene.chunks == chunks:
            return scene
        free = [name for name in MOTIONS if _allowed(scene, name, colours[-1], held_out) and _can_go_on(scene, name)]
        motion, colour = motions[-1], colours[-1]
        if random.between(0, 1) < (changes if motion in free else max(changes, 0.8) if changes else 0):
            others = [
                name
                for name in COLOURS
                if name != colour and background in clear_backgrounds(name) and _allowed(scene, motion, name, held_out)
            ]
            if motion in free and others and random.between(0, 1) < RECOLOURED:
                colour = random.choice(others)
            else:
                motion = random.choice([name for name in free if name != motion] or [motion])
        motions, colours = (*motions, motion), (*colours, colour)


class Draws:
    """Seeded draws, made of numpy's plain uniform numbers alone, which are the same in every version and on every machine."""

    def __init__(self, *seed: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(seed))

    def between(self, low: float, high: float) -> float:
        """Returns a number from `low` to `high`, rounded, so that a scene reads well when printed."""
        return round(low + (high - low) * float(self._generator.random()), 3)

    def choice(self, options: Sequence[T]) -> T:
        """Returns one of the options."""
        return options[int(self._generator.random() * len(options))]


def _start(random: Draws, motion: str) -> tuple[float, float]:
    """Returns a place from which the motion has room for a second."""
    x, y = (
        random.choice([place for place in PLACES if place + SPEED * way in PLACES])
        for way in DIRECTIONS.get(motion, (0, 0))
    )
    return x, y


def _allowed(scene: Scene, motion: str, colour: str, held_out: bool) -> bool:
    turnable = motion != "turns" or scene.shape in SYMMETRY
    return turnable and (held_out or not is_held_out(scene.shape, colour, motion))


def _can_go_on(scene: Scene, motion: str) -> bool:
    """Returns whether the object has room for one more second of a motion."""
    return shown_motions(_with(scene, motion))[-1] == motion


def _with(scene: Scene, motion: str) -> Scene:
    """Returns the scene with a chunk more."""
    return replace(scene, motions=(*scene.motions, motion), colours=(*scene.colours, scene.colours[-1]))


def path(scene: Scene) -> Path:
    """Returns where the object is, how large and how far turned in each of the scene's CHUNK * chunks frames."""
    states = _states(scene)
    return Path(*(np.concatenate([part[:-1] for part in parts]) for parts in zip(*states, strict=True)))


def shown_motions(scene: Scene) -> list[str | None]:
    """Returns the motion that there is to see in each chunk.

    Where the object is stopped by the last place or a limit that is "still", and None if it is stopped halfway.
    """
    shown: list[str | None] = []
    for motion, (centre, radius, _) in zip(scene.motions, _states(scene), strict=True):
        if motion in DIRECTIONS:
            done = float((centre[-1] - centre[0]) @ np.array(DIRECTIONS[motion])) / SPEED
        elif motion in RESIZING:
            done = float(np.abs(np.log(radius[-1] / radius[0]))) / np.log(GROWTH)
        else:
            done = 1.0
        shown.append(motion if done > 0.95 else "still" if done < 0.05 else None)
    return shown


def shown_or_asked(scene: Scene) -> list[str]:
    """Returns the motion that there is to see in each chunk, or the one that was asked for where that is none clearly."""
    return [shown or asked for shown, asked in zip(shown_motions(scene), scene.motions, strict=True)]


def _states(scene: Scene) -> list[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]]:
    """Returns (centre, radius, angle) per chunk, each with the first frame of the next chunk at its end."""
    time = np.arange(CHUNK + 1) / FPS
    centre, radius, angle = np.array(scene.start), np.float64(RADIUS[scene.size]), np.float64(0)
    states = []
    for motion in scene.motions:
        sizes = np.clip(radius * GROWTH ** (RESIZING.get(motion, 0) * time), MIN_RADIUS, MAX_RADIUS)
        way = np.outer(time, DIRECTIONS.get(motion, (0, 0))) * SPEED
        centres = np.clip(centre + way, PLACES[0], PLACES[-1])
        angles = angle + time * (scene.turn if motion == "turns" else 0)
        states.append((centres, sizes, angles))
        centre, radius, angle = centres[-1], sizes[-1], angles[-1]
    return states


def frames(scene: Scene) -> NDArray[np.uint8]:
    """Returns a scene's frames (CHUNK * chunks, SIZE, SIZE, 3) in sRGB, with smooth edges."""
    colours = np.array([COLOURS[colour] for colour in scene.colours], dtype=np.float32)
    return render(scene.shape, path(scene), np.repeat(colours, CHUNK, axis=0), BACKGROUNDS[scene.background])


def render(shape: str, where: Path, colours: Array, background: RGB) -> NDArray[np.uint8]:
    """Returns frames (T, SIZE, SIZE, 3) of a shape along a path, in colours (T, 3), on a background."""
    # Only the pixels of a window around the object are computed; the window has the same size in every frame.
    width = min(int(np.ceil(2 * where.radius.max())) + 3, SIZE)
    corner = np.clip(np.round(where.centre - width / 2).astype(np.int64), 0, SIZE - width)
    columns, rows = (corner[:, axis, None] + np.arange(width) for axis in (0, 1))
    x = (columns + 0.5 - where.centre[:, 0, None]).astype(np.float32)[:, None, :]
    y = (rows + 0.5 - where.centre[:, 1, None]).astype(np.float32)[:, :, None]
    covered = coverage(shape, x, y, where.radius, where.angle)[..., None]
    back = np.array(background, dtype=np.float32)
    pixels = covered * (colours[:, None, None] - back) + (back + 0.5)
    result = np.empty((len(colours), SIZE, SIZE, 3), dtype=np.uint8)
    result[:] = np.array(background, dtype=np.uint8)
    result[np.arange(len(colours))[:, None, None], rows[:, :, None], columns[:, None, :]] = pixels.astype(np.uint8)
    return result


def coverage(shape: str, x: Array, y: Array, radius: NDArray, angle: NDArray) -> Array:
    """Returns how much of each pixel a shape covers, from 0 to 1.

    Args:
        shape: a name of `SHAPES`.
        x: of the pixels' centres from the object's centre, (T, ...).
        y: as x; the two broadcast.
        radius: (T,) of the circle around the shape.
        angle: (T,) degrees clockwise.
    """
    per_frame = (-1, *(1,) * (x.ndim - 1))
    radius = radius.astype(np.float32).reshape(per_frame)
    if shape in SYMMETRY and angle.any():
        turned = np.deg2rad(angle)
        cos, sin = (part.astype(np.float32).reshape(per_frame) for part in (np.cos(turned), np.sin(turned)))
        x, y = x * cos + y * sin, y * cos - x * sin
    x, y = x / radius, y / radius
    distance = np.maximum(_DISTANCES[shape](x, y), np.hypot(x, y) - 1)
    covered: Array = np.clip(0.5 - distance * radius, 0, 1)
    return covered


# Signed distances from the outlines of shapes that fit the unit circle, negative inside. Beyond a corner they are too small, which
# keeps it sharp; `coverage` cuts it off at the circle, or the smooth edge of a corner would reach far beyond.


def _circle(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - np.float32(0.85)


def _square(x: Array, y: Array) -> Array:
    return np.maximum(abs(x), abs(y)) - np.float32(0.7)


def _triangle(x: Array, y: Array) -> Array:
    return np.maximum(y, np.float32(3**0.5 / 2) * abs(x) - y / 2) - np.float32(0.5)


def _ring(x: Array, y: Array) -> Array:
    return abs(np.hypot(x, y) - np.float32(0.72)) - np.float32(0.22)


def _cross(x: Array, y: Array) -> Array:
    x, y = abs(x), abs(y)
    arm, length = np.float32(0.28), np.float32(0.94)
    return np.minimum(np.maximum(x - arm, y - length), np.maximum(x - length, y - arm))


def _star(x: Array, y: Array) -> Array:
    # A tenth of the star: angles are counted from the direction of a notch, whose neighbouring tips are 36 degrees away.
    notch, tip = np.float32(0.45), np.float32(np.pi / 5)
    radius = np.hypot(x, y)
    angle = abs(np.mod(np.arctan2(x, -y), 2 * tip) - tip)
    along, across = np.cos(tip) - notch, np.sin(tip)
    return ((radius * np.cos(angle) - notch) * across - radius * np.sin(angle) * along) / np.hypot(along, across)


_DISTANCES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "ring": _ring,
    "cross": _cross,
    "star": _star,
}

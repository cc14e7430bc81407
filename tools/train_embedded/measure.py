"""Measures what there is to see in a video of the world of `world.py`, such as a small model makes: blurred, noisy, a little off.

`measure` looks at every second of a video on its own, so nothing is known from the prompt or from the seconds before. Of each it
tells the background, the object's colour, shape, place, size and turning, and which motion that is. All is plain image measurement:
the object is what differs from the frame's border; shapes are compared in polar coordinates, where a turn is a shift.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .world import (
    BACKGROUNDS,
    CHUNK,
    COLOURS,
    DIRECTIONS,
    FPS,
    GROWTH,
    MAX_RADIUS,
    MIN_RADIUS,
    RESIZING,
    RGB,
    SHAPES,
    SIZE,
    SPEED,
    SYMMETRY,
    coverage,
    oklab,
)

Floats = NDArray[np.float64]

_LEAST_FRAMES = 6  # a shorter rest of a video tells no motion
_LEAST_CONTRAST = 0.1  # of the object from the background, in OKLab
_LEAST_TURN = 360 / max(SYMMETRY.values())  # degrees per second
_UNSTEADY = 4.0  # degrees that angles are off a steady turn, where there is none to see
_LEAST_FOUND = 0.5  # share of all that differs from the background that lies in one place, where there is an object
_WORST_FIT = 0.15  # of a shape, above which it is none: those of much blurred, noisy objects are below 0.1
_RINGS, _ANGLES = 20, 120  # of the polar grid on which shapes are compared
_REACH = 2.2  # of the polar grid, in radii of the disc with the object's area
_BLURS = (0.0, 1.0, 2.0)  # standard deviations in pixels, of which the best is taken
_SCALES = (0.88, 0.94, 1.0, 1.06, 1.13, 1.2)  # errors of the area's root, likewise


@dataclass(frozen=True)
class Seen:
    """What is seen of the object in one second of a video.

    Attributes:
        background: the name of `BACKGROUNDS` that is nearest.
        background_rgb: its colour, from 0 to 255.
        colour: the name of `COLOURS` that is nearest.
        colour_rgb: its colour, from 0 to 255.
        colour_error: distance of the two in OKLab.
        shape: the name of `SHAPES` that fits best.
        shape_error: 1 less the correlation with that shape: 0 for a perfect fit.
        centre: (T, 2), x and y of the object in pixels, per frame.
        radius: (T,) of the circle around the shape in pixels, per frame.
        velocity: pixels per second, to the right and down.
        growth: change of the radius' natural logarithm per second.
        turn: degrees per second, clockwise; 0 for round shapes, and where the angle cannot be told.
        motion: the name of `MOTIONS` that this is.
    """

    background: str
    background_rgb: RGB
    colour: str
    colour_rgb: RGB
    colour_error: float
    shape: str
    shape_error: float
    centre: Floats
    radius: Floats
    velocity: tuple[float, float]
    growth: float
    turn: float
    motion: str

    @property
    def speed(self) -> float:
        """Returns pixels per second, in any direction."""
        return float(np.hypot(*self.velocity))


def measure(frames: NDArray[np.uint8]) -> list[Seen | None]:
    """Returns what is seen in each second of a video, None where there is no object.

    Args:
        frames: (T, SIZE, SIZE, 3) in sRGB at FPS. A rest of fewer than six frames is left out.

    Raises:
        ValueError: the frames have another shape or type.
    """
    if frames.ndim != 4 or frames.shape[1:] != (SIZE, SIZE, 3) or frames.dtype != np.uint8:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, must be uint8 (T, {SIZE}, {SIZE}, 3)")
    chunks = [frames[start : start + CHUNK] for start in range(0, len(frames), CHUNK)]
    return [_measure(chunk.astype(np.float32)) for chunk in chunks if len(chunk) >= _LEAST_FRAMES]


def _measure(frames: NDArray[np.float32]) -> Seen | None:
    background = _border(frames)
    found = _object(frames, background)
    if found is None:
        return None
    cover, centre, area = found
    shape, error, radius, angle, blur = _shape(cover, centre, area)
    if error > _WORST_FIT:
        return None
    colour = _colour(frames, background, _expected(shape, centre, radius, angle, blur))
    time = np.arange(len(frames)) / FPS
    velocity = _slope(time, centre[:, 0]), _slope(time, centre[:, 1])
    growth = _slope(time, np.log(radius))
    turn = _slope(time, angle)
    if shape not in SYMMETRY or np.median(abs(angle - np.median(angle - turn * time) - turn * time)) > _UNSTEADY:
        turn = 0.0
    colour_name, colour_error = _nearest(colour, COLOURS)
    return Seen(
        background=_nearest(background, BACKGROUNDS)[0],
        background_rgb=_rgb(background),
        colour=colour_name,
        colour_rgb=_rgb(colour),
        colour_error=colour_error,
        shape=shape,
        shape_error=error,
        centre=centre,
        radius=radius,
        velocity=velocity,
        growth=growth,
        turn=turn,
        motion=_motion(velocity, growth, turn),
    )


def _border(frames: NDArray[np.float32]) -> Floats:
    """Returns the background's colour: the median of the outermost two pixels of all frames."""
    inside = np.zeros((SIZE, SIZE), dtype=bool)
    inside[2:-2, 2:-2] = True
    return np.median(frames[:, ~inside].reshape(-1, 3), axis=0).astype(np.float64)


def _object(frames: NDArray[np.float32], background: Floats) -> tuple[Floats, Floats, Floats] | None:
    """Returns how much of each pixel the object covers (T, SIZE, SIZE), its centre (T, 2) and area (T,)."""
    difference = frames - background.astype(np.float32)
    distance = np.linalg.norm(_blurred(difference, 0.7), axis=-1)
    # The pixels that differ most tell its colour, but for blur and the noise that has made them differ.
    core = distance >= np.partition(distance.reshape(len(frames), -1), -20, axis=1)[:, -20, None, None]
    contrast = np.median(difference[core], axis=0).astype(np.float64)
    if np.linalg.norm(oklab(background + contrast) - oklab(background)) < _LEAST_CONTRAST:
        return None
    cover = difference @ (contrast / (contrast @ contrast)).astype(np.float32)
    cover = cover.astype(np.float64)
    clean = np.where(_blurred(cover[..., None], 0.7)[..., 0] > 0.3, np.clip(cover, 0, 1), 0)
    centre, area = _moments(clean)
    if (area < 8).any():
        return None
    for _ in range(3):  # what lies elsewhere does not belong to it
        near = _near(centre, np.clip(1.9 * np.sqrt(area / np.pi), MIN_RADIUS, 1.3 * MAX_RADIUS) + 3)
        centre, area = _moments(clean * near)
        if (area < 8).any():
            return None
    if area.sum() < _LEAST_FOUND * clean.sum() or np.median(area) > SIZE**2 / 2:
        return None
    return cover * near, centre, area


def _moments(cover: Floats) -> tuple[Floats, Floats]:
    """Returns centre (T, 2) and area (T,) of what is covered."""
    pixels = np.arange(SIZE) + 0.5
    area = cover.sum(axis=(1, 2))
    x, y = ((cover.sum(axis=axis) @ pixels) / np.maximum(area, 1e-6) for axis in (1, 2))
    return np.stack([x, y], axis=1), area


def _near(centre: Floats, reach: Floats) -> NDArray[np.bool_]:
    """Returns which pixels (T, SIZE, SIZE) lie within `reach` of the centre."""
    pixels = np.arange(SIZE) + 0.5
    x, y = (pixels - centre[:, axis, None] for axis in (0, 1))
    near: NDArray[np.bool_] = x[:, None, :] ** 2 + y[:, :, None] ** 2 <= reach[:, None, None] ** 2
    return near


def _expected(shape: str, centre: Floats, radius: Floats, angle: Floats, blur: float) -> Floats:
    """Returns how much of each pixel (T, SIZE, SIZE) a blurred shape covers."""
    pixels = np.arange(SIZE) + 0.5
    x, y = ((pixels - centre[:, axis, None]).astype(np.float32) for axis in (0, 1))
    cover = coverage(shape, x[:, None, :], y[:, :, None], radius, angle)
    return (_blurred(cover[..., None], blur)[..., 0] if blur else cover).astype(np.float64)


def _colour(frames: NDArray[np.float32], background: Floats, expected: Floats) -> Floats:
    """Returns the colour (3,) that, covering what is expected, comes nearest to the frames: the median of all frames'."""
    difference = np.einsum("thwc,thw->tc", frames - background, expected)
    colour: Floats = background + np.median(difference / (expected**2).sum(axis=(1, 2))[:, None], axis=0)
    return colour


def _shape(cover: Floats, centre: Floats, area: Floats) -> tuple[str, float, Floats, Floats, float]:
    """Returns the shape's name, its error, radius (T,), angle (T,) in degrees, counted on over full turns, and blur."""
    unit = np.sqrt(area / np.pi)  # the radius of a disc of that area
    seen = _polar(cover, centre, unit)
    names, radii, templates = _templates(tuple(round(float(blur / np.median(unit)), 1) for blur in _BLURS))
    # Correlation at every turn of every template.
    turned = np.einsum("trf,nrf->tnf", np.fft.rfft(seen * _WEIGHTS, axis=-1), np.fft.rfft(templates, axis=-1).conj())
    product = np.fft.irfft(turned, n=_ANGLES, axis=-1)
    power = np.outer((seen**2 * _WEIGHTS).sum(axis=(1, 2)), (templates**2 * _WEIGHTS).sum(axis=(1, 2)))
    match = (product.max(axis=-1) / np.sqrt(power)).mean(axis=0)
    best = int(match.argmax())
    angle = _angles(product[:, best], SYMMETRY.get(names[best], 1))
    return names[best], 1 - float(match[best]), unit * radii[best], angle, _BLURS[best % len(_BLURS)]


def _polar(cover: Floats, centre: Floats, radius: Floats) -> Floats:
    """Returns the cover (T, rings, angles) around the centre, in units of the radius."""
    along = np.linspace(0, 2 * np.pi, _ANGLES, endpoint=False)
    x = centre[:, 0, None, None] + np.multiply.outer(radius, np.outer(_RING, np.cos(along)))
    y = centre[:, 1, None, None] + np.multiply.outer(radius, np.outer(_RING, np.sin(along)))
    padded = np.pad(cover, ((0, 0), (1, 1), (1, 1)))
    limit = padded.shape[1] - 1.001
    x, y = np.clip(x + 0.5, 0, limit), np.clip(y + 0.5, 0, limit)
    column, row = x.astype(np.int64), y.astype(np.int64)
    x, y = x - column, y - row
    frame = np.arange(len(cover))[:, None, None]
    upper = padded[frame, row, column] * (1 - x) + padded[frame, row, column + 1] * x
    lower = padded[frame, row + 1, column] * (1 - x) + padded[frame, row + 1, column + 1] * x
    sampled: Floats = upper * (1 - y) + lower * y
    return sampled


_RING = (np.arange(_RINGS) + 0.5) / _RINGS * _REACH
_WEIGHTS = (_RING / _RING.sum() / _ANGLES)[:, None]  # a ring counts by its area


@cache
def _templates(blurs: tuple[float, ...]) -> tuple[list[str], list[float], Floats]:
    """Returns the names, radii and polar pictures (n, rings, angles) of all shapes, in several sizes and blurs.

    The unit of length is the radius of the disc with the same area, which is not known exactly.
    """
    variants = [(shape, scale * float(np.sqrt(np.pi / _area(shape)))) for shape in SHAPES for scale in _SCALES]
    pictures = [_template(shape, radius, blur) for shape, radius in variants for blur in blurs]
    names, radii = (list(part) for part in zip(*(variant for variant in variants for _ in blurs), strict=True))
    return names, radii, np.stack(pictures)


@cache
def _template(shape: str, radius: float, blur: float) -> Floats:
    unit, size = 14, 80
    pixels = (np.arange(-size // 2, size // 2) + 0.5).astype(np.float32)
    cover = coverage(shape, pixels[None, None], pixels[None, :, None], np.array([unit * radius]), np.zeros(1))
    cover = _blurred(cover[..., None], unit * float(np.hypot(blur, 0.06)))[..., 0]  # at least what sampling softens
    return _polar(cover.astype(np.float64), np.full((1, 2), size / 2), np.array([float(unit)]))[0]


@cache
def _area(shape: str) -> float:
    """Returns the area of a shape whose circle has radius 1."""
    pixels = (np.arange(-100, 100) + 0.5).astype(np.float32)
    cover = coverage(shape, pixels[None, None], pixels[None, :, None], np.array([99.0]), np.zeros(1))
    return float(cover.sum()) / 99**2


def _angles(product: Floats, symmetry: int) -> Floats:
    """Returns the angle (T,) in degrees at which the product (T, angles) is greatest, to a part of a step."""
    folded = product.reshape(len(product), symmetry, -1).sum(axis=1)
    steps, frame = folded.shape[1], np.arange(len(folded))
    peak = folded.argmax(axis=1)
    before, at, after = (folded[frame, (peak + step) % steps] for step in (-1, 0, 1))
    curve = np.minimum(before + after - 2 * at, -1e-9)
    position = peak + np.clip(0.5 * (before - after) / curve, -0.5, 0.5)
    angle: Floats = np.unwrap(position * 360 / _ANGLES, period=360 / symmetry)
    return angle


def _slope(time: Floats, value: Floats) -> float:
    """Returns the median slope between frames that are at least a quarter of the time apart, which outliers do not move."""
    early, late = np.triu_indices(len(time), k=max(len(time) // 4, 1))
    return float(np.median((value[late] - value[early]) / (time[late] - time[early])))


def _motion(velocity: tuple[float, float], growth: float, turn: float) -> str:
    """Returns the motion that is nearest to its least speed in the world, "still" where all are below half of it."""
    strength = {name: float(np.dot(velocity, way)) / SPEED for name, way in DIRECTIONS.items()}
    strength |= {name: sign * growth / np.log(GROWTH) for name, sign in RESIZING.items()}
    strength["turns"] = abs(turn) / _LEAST_TURN
    strength["still"] = 0.5
    return max(strength, key=lambda name: strength[name])


def _nearest(rgb: Floats, names: dict[str, RGB]) -> tuple[str, float]:
    """Returns the name of the nearest colour, and how far that is in OKLab."""
    distance = np.linalg.norm(oklab(np.array(list(names.values()))) - oklab(rgb), axis=1)
    return list(names)[int(distance.argmin())], float(distance.min())


def _rgb(colour: Floats) -> RGB:
    red, green, blue = (int(value) for value in np.clip(np.round(colour), 0, 255))
    return red, green, blue


def _blurred(pictures: NDArray, sigma: float) -> NDArray:
    """Returns pictures (T, height, width, channels) with a Gaussian blur, the border repeated."""
    reach = max(int(np.ceil(3 * sigma)), 1)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).astype(pictures.dtype)
    for axis in (1, 2):
        width = [(0, 0)] * pictures.ndim
        width[axis] = (reach, reach)
        padded, size = np.pad(pictures, width, mode="edge"), pictures.shape[axis]
        pictures = sum(weight * padded.take(range(i, i + size), axis) for i, weight in enumerate(kernel))
    return pictures

"""The evaluator says of true renderings what the scene says, also where they are blurred, noisy and pale; and sees no object in none."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

from tools.train_embedded.measure import measure
from tools.train_embedded.world import (
    BACKGROUNDS,
    CHUNK,
    COLOURS,
    DIRECTIONS,
    FPS,
    GROWTH,
    RESIZING,
    SHAPES,
    SPEED,
    SYMMETRY,
    Path,
    Scene,
    draw,
    frames,
    path,
    render,
    shown_motions,
)

SCENE = Scene("star", "large", "grey", ("left",), ("red",), (48.0, 32.0))


def spoiled(video: np.ndarray, seed: int) -> np.ndarray:
    """A video with a blur of one pixel, noise of 8 and 5 % less contrast, as a small model may make it."""
    kernel = torch.exp(-(torch.arange(-3.0, 4.0) ** 2) / 2)
    kernel = (kernel / kernel.sum())[None, None].expand(3, 1, 7)
    pictures = torch.from_numpy(video).permute(0, 3, 1, 2).float()
    for axis, padding in ((2, (0, 0, 3, 3)), (3, (3, 3, 0, 0))):
        padded = torch.nn.functional.pad(pictures, padding, mode="replicate")
        pictures = torch.nn.functional.conv2d(padded, kernel[..., None] if axis == 2 else kernel[:, :, None], groups=3)
    pictures = (pictures - 128) * 0.95 + 128
    noise = np.random.default_rng(seed).normal(0, 8, video.shape)
    return np.clip(np.round(pictures.permute(0, 2, 3, 1).numpy() + noise), 0, 255).astype(np.uint8)


def scores(seeds: range, spoil: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Shares of chunks that are measured right, by attribute, and the errors that 95 % stay below."""
    right, error = defaultdict(list), defaultdict(list)
    for seed in seeds:
        scene = draw(seed, 2)
        video, where = frames(scene), path(scene)
        for chunk, seen in enumerate(measure(spoiled(video, seed) if spoil else video)):
            shown = shown_motions(scene)[chunk]
            right["found"].append(seen is not None)
            if seen is None:
                continue
            part = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
            right["background"].append(seen.background == scene.background)
            right["colour"].append(seen.colour == scene.colours[chunk])
            right["shape"].append(seen.shape == scene.shape)
            if shown:
                right["motion"].append(seen.motion == shown)
            error["centre"].append(np.abs(seen.centre - where.centre[part]).max())
            error["radius"].append(np.abs(seen.radius / where.radius[part] - 1).max())
            if shown in DIRECTIONS:
                true = np.array(DIRECTIONS[shown]) * SPEED
                error["velocity"].append(np.linalg.norm(np.array(seen.velocity) - true) / SPEED)
            if shown in RESIZING:
                error["growth"].append(abs(seen.growth / np.log(GROWTH) - RESIZING[shown]))
            if shown == "turns":
                error["turn"].append(abs(seen.turn / scene.turn - 1))
    shares = {name: float(np.mean(values)) for name, values in right.items()}
    return shares, {name: float(np.quantile(values, 0.95)) for name, values in error.items()}


ATTRIBUTES = {"found", "background", "colour", "shape", "motion"}


def test_true_renderings_are_measured_right():
    shares, error = scores(range(100, 140), spoil=False)
    assert set(shares) == ATTRIBUTES
    assert min(shares.values()) >= 0.99, shares
    assert error["centre"] < 0.2
    assert error["radius"] < 0.05
    assert max(error["velocity"], error["turn"]) < 0.02
    assert error["growth"] < 0.06


def test_blurred_noisy_pale_renderings_are_measured_right():
    shares, error = scores(range(200, 240), spoil=True)
    assert set(shares) == ATTRIBUTES
    assert min(shares.values()) >= 0.97, shares
    assert error["centre"] < 0.4
    assert error["radius"] < 0.1
    assert max(error["velocity"], error["turn"]) < 0.05
    assert error["growth"] < 0.15


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [7.0, 12.0])
@pytest.mark.parametrize("centre", [(31.0, 30.0), (44.6, 25.3)])
def test_shapes_are_told_apart_however_they_are_turned_and_wherever(shape, radius, centre):
    """A model's objects are where it puts them, not where the world would."""
    angle = 77.0 * np.arange(CHUNK) / FPS + 20
    where = Path(np.tile(centre, (CHUNK, 1)), np.full(CHUNK, radius), angle)
    colours = np.tile(np.array(COLOURS["red"], np.float32), (CHUNK, 1))
    (seen,) = measure(spoiled(render(shape, where, colours, BACKGROUNDS["grey"]), 1))
    assert seen.shape == shape
    assert seen.motion == ("turns" if shape in SYMMETRY else "still")
    assert seen.turn == pytest.approx(77 if shape in SYMMETRY else 0, rel=0.05)
    assert seen.shape_error < 0.05
    assert np.abs(seen.centre - centre).max() < 0.4


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_are_told_apart(colour):
    (seen,) = measure(spoiled(frames(replace(SCENE, colours=(colour,), background="black")), 2))
    assert (seen.colour, seen.background) == (colour, "black")
    assert seen.colour_error < 0.06
    assert np.abs(np.subtract(seen.colour_rgb, COLOURS[colour])).max() < 25
    assert np.abs(np.subtract(seen.background_rgb, BACKGROUNDS["black"])).max() < 12


def test_a_change_is_seen_in_its_second():
    scene = replace(SCENE, motions=("left", "up", "still"), colours=("red", "red", "blue"))
    seen = measure(frames(scene))
    assert [one.motion for one in seen] == ["left", "up", "still"]
    assert [one.colour for one in seen] == ["red", "red", "blue"]
    assert seen[0].velocity == pytest.approx((-16, 0), abs=0.2)
    assert seen[1].velocity == pytest.approx((0, -16), abs=0.2)
    assert seen[2].speed < 0.2


def test_a_spot_elsewhere_is_not_the_object():
    video = frames(SCENE).copy()
    video[:, 54:58, 6:10] = COLOURS["red"]
    (seen,) = measure(video)
    assert (seen.shape, seen.colour, seen.motion) == ("star", "red", "left")
    assert np.abs(seen.centre - path(SCENE).centre).max() < 0.5


def test_a_frame_that_is_torn_does_not_turn_the_motion():
    video = frames(SCENE).copy()
    video[[5, 17]] = np.roll(video[[5, 17]], 9, axis=1)
    (seen,) = measure(video)
    assert seen.motion == "left"
    assert seen.velocity == pytest.approx((-16, 0), abs=1)


def empty(kind: str) -> np.ndarray:
    random = np.random.default_rng(0)
    shape = (2 * CHUNK, 64, 64, 3)
    if kind == "plain":
        return np.full(shape, 90, np.uint8)
    if kind == "grain":
        return np.clip(90 + random.normal(0, 8, shape), 0, 255).astype(np.uint8)
    if kind == "gradient":
        return np.broadcast_to(np.linspace(20, 200, 64)[:, None], shape).astype(np.uint8)
    return random.integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("kind", ["plain", "grain", "gradient", "noise"])
def test_no_object_is_seen_where_there_is_none(kind):
    assert measure(empty(kind)) == [None, None]


def test_a_rest_is_measured_if_it_tells_a_motion():
    video = frames(replace(SCENE, motions=("left",) * 2, colours=("red",) * 2))
    assert [len(seen.centre) for seen in measure(video[: CHUNK + 8])] == [CHUNK, 8]
    assert [len(seen.centre) for seen in measure(video[: CHUNK + 5])] == [CHUNK]
    assert measure(video[: CHUNK + 8])[1].velocity == pytest.approx((-16, 0), abs=1)


def test_other_frames_are_refused():
    with pytest.raises(ValueError, match=r"float32 \(24, 64, 64, 3\), must be uint8 \(T, 64, 64, 3\)"):
        measure(np.zeros((24, 64, 64, 3), np.float32))
    with pytest.raises(ValueError, match=r"uint8 \(24, 32, 64, 3\)"):
        measure(np.zeros((24, 32, 64, 3), np.uint8))

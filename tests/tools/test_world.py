"""The world of the embedded model: every scene can be seen and is told truly, and what is held out stays out of training."""

import hashlib
import re
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tools.train_embedded import captions as language
from tools.train_embedded.captions import NOUNS, captions, phrases, vocabulary, words
from tools.train_embedded.sheet import contact_sheet
from tools.train_embedded.world import (
    BACKGROUNDS,
    CHUNK,
    COLOURS,
    DIRECTIONS,
    FPS,
    MOTIONS,
    SHAPES,
    SIZE,
    SPEED,
    SYMMETRY,
    Scene,
    clear_backgrounds,
    combinations,
    draw,
    frames,
    is_held_out,
    path,
    shown_motions,
)

STILL = Scene("circle", "large", "black", ("still",), ("white",), (32.0, 32.0))


def scenes(count: int, held_out: bool = False) -> list[Scene]:
    return [draw(seed, 1 + seed % 5, held_out=held_out) for seed in range(count)]


@pytest.fixture(scope="module")
def drawn() -> list[Scene]:
    return scenes(2000)


def differing(picture, scene) -> np.ndarray:
    """Which pixels are not the background."""
    return (picture != np.array(BACKGROUNDS[scene.background], np.uint8)).any(axis=-1)


def test_a_seed_is_the_same_scene_everywhere():
    assert draw(7, 3) == draw(7, 3) != draw(8, 3)
    told = repr([draw(seed, 4) for seed in range(50)]) + repr([captions(draw(seed, 4), seed) for seed in range(50)])
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "689c23587e0177bd"


def test_the_beginning_does_not_depend_on_the_length():
    for seed in range(50):
        long, short = draw(seed, 5), draw(seed, 2)
        assert replace(long, motions=long.motions[:2], colours=long.colours[:2]) == short
        assert np.array_equal(frames(long)[: 2 * CHUNK], frames(short))


def test_every_combination_occurs(drawn):
    firsts = {(scene.shape, scene.colours[0], scene.motions[0]) for scene in drawn}
    assert firsts == set(combinations(False))
    assert {(scene.size, scene.background) for scene in drawn} == {
        (size, name) for size in ("small", "large") for name in BACKGROUNDS
    }
    changes = Counter()
    for scene in drawn:
        for before, after in zip(scene.motions, scene.motions[1:], strict=False):
            changes[before, after] += 1
    assert len(changes) == len(MOTIONS) ** 2
    assert 0.05 < np.mean([len(set(scene.colours)) > 1 for scene in drawn]) < 0.3


def test_what_is_held_out_is_in_no_training_scene(drawn):
    for scene in drawn:
        assert not any(is_held_out(scene.shape, *pair) for pair in zip(scene.colours, scene.motions, strict=True))
    out = {(scene.shape, scene.colours[0], scene.motions[0]) for scene in scenes(600, held_out=True)}
    assert out == set(combinations(True))


def test_what_is_held_out_is_spread_evenly():
    trained, out = combinations(False), combinations(True)
    assert 0.1 < len(out) / (len(trained) + len(out)) < 0.2
    for first, second in ((0, 1), (0, 2), (1, 2)):
        pairs = {(one[first], one[second]) for one in trained}
        assert pairs == {(one[first], one[second]) for one in trained + out}
    for part, names in enumerate((SHAPES, COLOURS, MOTIONS)):
        assert {one[part] for one in out} == set(names)


def test_objects_stand_out_and_only_visible_turns_turn(drawn):
    for scene in drawn:
        assert all(scene.background in clear_backgrounds(colour) for colour in scene.colours)
        assert scene.shape in SYMMETRY or "turns" not in scene.motions
    assert all(colour not in clear_backgrounds(colour) for colour in set(COLOURS) & set(BACKGROUNDS))
    assert "dark blue" in clear_backgrounds("blue")


def test_objects_are_wholly_inside_every_frame():
    for seed in range(150):
        scene = draw(seed, 5)
        shown = differing(frames(scene), scene)
        assert shown.any(axis=(1, 2)).all()
        assert not shown[:, [0, -1]].any()
        assert not shown[:, :, [0, -1]].any()
    forever = replace(STILL, motions=("grows",) * 8 + ("left",) * 12, colours=("white",) * 20)
    shown = differing(frames(forever), forever)
    assert not shown[:, [0, -1]].any()
    assert not shown[:, :, [0, -1]].any()
    assert shown.any(axis=(1, 2)).all()


def test_motions_are_smooth_and_as_fast_as_the_scene_says():
    for seed in range(100):
        scene = draw(seed, 4)
        where = path(scene)
        assert abs(np.diff(where.centre, axis=0)).max() <= SPEED / FPS + 1e-6
        for chunk, motion in enumerate(shown_motions(scene)):
            part = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
            moved = (where.centre[part][-1] - where.centre[part][0]) * FPS / (CHUNK - 1)
            if motion in DIRECTIONS:
                assert moved == pytest.approx(np.array(DIRECTIONS[motion]) * SPEED, abs=1e-6)
            if motion == "grows":
                assert where.radius[part][-1] > 1.35 * where.radius[part][0]
            if motion == "shrinks":
                assert where.radius[part][-1] < 0.75 * where.radius[part][0]
            if motion == "turns":
                assert 68 < where.angle[part][-1] - where.angle[part][0] < 120


def test_every_second_begins_with_one_of_few_pictures(drawn):
    """What a small model has to learn is as finite as that: nine places, three sizes, nothing askew."""
    for scene in drawn:
        where = path(scene)
        assert not (where.centre[::CHUNK] % 16).any(), scene
        assert {round(radius, 3) for radius in where.radius[::CHUNK]} <= {7.5, 10.607, 15.0}, scene
        if scene.shape in SYMMETRY:
            turned = where.angle[::CHUNK] * SYMMETRY[scene.shape] / 360
            assert turned == pytest.approx(np.round(turned)), scene
    starts = Counter(scene.start for scene in drawn if scene.motions[0] == "still")
    assert len(starts) == 9


def test_nearly_every_motion_that_is_told_can_be_seen(drawn):
    told = [name for scene in drawn for name in scene.motions]
    shown = [name for scene in drawn for name in shown_motions(scene)]
    assert all(scene.motions[0] == shown_motions(scene)[0] for scene in drawn)
    for before, name, seen in zip(told, told[1:], shown[1:], strict=False):
        assert seen in (name, None, "still"), (before, name)
    assert np.mean([name == seen for name, seen in zip(told, shown, strict=True)]) > 0.93


def test_an_object_stops_at_the_edge():
    scene = replace(STILL, motions=("right",) * 3 + ("left",), colours=("white",) * 4, start=(24.0, 32.0))
    assert shown_motions(scene) == ["right", None, "still", "left"]
    assert path(scene).centre[:, 0].max() == SIZE - 16


def test_shapes_are_drawn_where_they_are_and_have_smooth_edges():
    for shape in SHAPES:
        scene = replace(STILL, shape=shape, start=(30.3, 27.8))
        cover = frames(scene)[0, ..., 0].astype(float) - BACKGROUNDS["black"][0]
        cover /= COLOURS["white"][0] - BACKGROUNDS["black"][0]
        pixels = np.arange(SIZE) + 0.5
        assert (cover.sum(0) @ pixels / cover.sum(), cover.sum(1) @ pixels / cover.sum()) == pytest.approx(
            (30.3, 27.8), abs=0.1
        )
        assert ((cover > 0.1) & (cover < 0.9)).sum() > 8
        reach = np.hypot(pixels - 30.3, (pixels - 27.8)[:, None])[cover > 0.5].max()
        assert 12.5 < reach < 15.5
    assert len({frames(replace(STILL, shape=shape)).tobytes() for shape in SHAPES}) == len(SHAPES)


def test_colour_changes_where_a_chunk_begins():
    scene = replace(STILL, motions=("still",) * 2, colours=("red", "blue"))
    middle = frames(scene)[:, 32, 32]
    assert (middle[:CHUNK] == COLOURS["red"]).all()
    assert (middle[CHUNK:] == COLOURS["blue"]).all()


def test_rendering_is_fast():
    scene = replace(draw(3, 4), shape="star")
    least = min(_seconds(scene) for _ in range(10))
    assert least < 0.04


def _seconds(scene: Scene) -> float:
    start = time.perf_counter()
    assert len(frames(scene)) == 96
    return time.perf_counter() - start


# What a caption may call each motion, and no other motion's words.
SAID = {
    "left": r"\bleft\b",
    "right": r"\bright\b",
    "up": r"\b(up|upwards|rises|rising)\b",
    "down": r"\b(down|downwards|sinks|sinking)\b",
    "still": r"\b(still|not mov\w+|not move|in its place|rests|resting)\b",
    "grows": r"\b(grows|growing|larger|bigger)\b",
    "shrinks": r"\b(shrinks|shrinking|smaller)\b",
    "turns": r"\b(turns|turning|spins|spinning|rotates|rotating)\b",
}


@pytest.mark.parametrize("held_out", [False, True])
def test_captions_tell_shape_colour_and_motion_and_nothing_false(held_out):
    for seed, scene in enumerate(scenes(1000, held_out)):
        told = captions(scene, seed, held_out=held_out)
        assert len(told) == scene.chunks
        for text, motion, colour in zip(told, scene.motions, scene.colours, strict=True):
            low = text.lower()
            assert [name for name, said in SAID.items() if re.search(said, low)] == [motion], text
            shapes = {name for name, nouns in NOUNS.items() for noun in nouns if re.search(rf"\b{noun}\b", low)}
            assert shapes == {scene.shape}, text
            named = {name for name, said in language.COLOUR_WORDS.items() for word in said if _has(low, word)}
            named -= {"blue"} if "dark blue" in low and not re.search(r"(?<!dark )\bblue\b", low) else set()
            named -= {"green"} if "dark green" in low and not re.search(r"(?<!dark )\bgreen\b", low) else set()
            assert colour in named
            assert named <= {colour, scene.background}, text
            assert not re.search(r"  | [.,:]|\ba [aeiou]|\ban [^aeiou]|[{}]", low), text
            assert text[0].isupper()


def _has(text: str, word: str) -> bool:
    return re.search(rf"\b{word}\b", text) is not None


def test_a_size_is_told_only_while_it_is_so():
    scene = replace(STILL, motions=("grows", "left"), colours=("white", "white"))
    for seed in range(200):
        first, second = captions(scene, seed)
        assert not re.search(r"\b(large|big)\b", second)
        assert not re.search(r"\b(small|little)\b", first)


def test_a_change_may_be_told_as_one_and_what_stays_is_repeated():
    scene = replace(STILL, motions=("left", "left", "up"), colours=("white",) * 3, start=(48.0, 48.0))
    told = [captions(scene, seed) for seed in range(200)]
    assert 0.7 < np.mean([first == second for first, second, _ in told]) < 0.95
    assert 0.3 < np.mean([bool(re.search(r"\b(now|then)\b", third.lower())) for *_, third in told]) < 0.7
    assert not any(re.search(r"\b(now|then)\b", first.lower()) for first, *_ in told)


def test_phrasings_are_many_and_some_are_held_out():
    assert len(set(language.TEMPLATES)) >= 12
    assert len(set(language.HELD_OUT_TEMPLATES)) >= 4
    for kind in ("TEMPLATES", "MOTION_CHANGES", "COLOUR_CHANGES"):
        assert not set(getattr(language, kind)) & set(getattr(language, f"HELD_OUT_{kind}"))
    for shape, motion in {(shape, motion) for shape, _, motion in combinations(False)}:
        trained, out = phrases(shape, motion, False), phrases(shape, motion, True)
        assert trained
        assert out
        assert not set(trained) & set(out)
    trained = {text for seed, scene in enumerate(scenes(800)) for text in captions(scene, seed)}
    out = {text for seed, scene in enumerate(scenes(800)) for text in captions(scene, seed, held_out=True)}
    assert not trained & out


def test_the_vocabulary_is_exactly_the_words_of_training_captions():
    """A held-out caption has no word that training has not: a model trained from nothing could not know it."""
    told = {word for seed, scene in enumerate(scenes(2500)) for text in captions(scene, seed) for word in words(text)}
    assert sorted(told) == vocabulary()
    out = {w for seed, s in enumerate(scenes(500, True)) for c in captions(s, seed, held_out=True) for w in words(c)}
    assert out <= set(vocabulary())


def test_a_contact_sheet_shows_videos_and_captions():
    several = [draw(seed, 2) for seed in range(3)]
    told = [captions(scene, 0) for scene in several]
    sheet = contact_sheet([frames(scene) for scene in several], told, every=12, scale=2)
    assert sheet.dtype == np.uint8
    assert sheet.shape[1:] == (4 * (2 * SIZE + 4) + 4, 3)
    assert np.array_equal(sheet[4 : 4 + 2 * SIZE : 2, 4 : 4 + 2 * SIZE : 2], frames(several[0])[0])
    below = sheet[4 + 2 * SIZE + 4 :][:14]
    assert (below < 100).any(), "no text"

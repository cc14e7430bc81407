"""The evaluator, told what the world itself would show: everything is right, and what is wrong is found."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from tools.train_embedded import evaluate, world


@dataclass
class Perfect:
    """Makes what was asked for, as it knows the scene that the prompt was taken from."""

    scenes: dict = field(default_factory=dict)
    change: object = None
    pace: float = 1.0

    def video(self, prompts, seed, *, video=None, image=None, continue_seconds=None):
        scene = self.scenes[prompts[0]]
        if self.change:
            scene = self.change(scene)
        frames = world.frames(scene)
        start = 0 if video is None else len(video)
        if image is not None and not self.change:
            assert np.array_equal(image[0].numpy(), frames[0])
        times = start + self.pace * np.arange(world.CHUNK * len(prompts))
        return frames[np.minimum(times.astype(int), len(frames) - 1)]


@pytest.fixture
def perfect(monkeypatch):
    maker = Perfect()
    captions = evaluate.captions

    def remember(scene, seed, *, held_out):
        told = captions(scene, seed, held_out=held_out)
        maker.scenes |= dict.fromkeys(told, scene)
        return told

    monkeypatch.setattr(evaluate, "captions", remember)
    return maker


@pytest.mark.parametrize("task", [name for name in evaluate.TASKS if name not in ("elsewhere", "long")])
def test_the_world_itself_is_right(task, perfect):
    score = evaluate.TASKS[task](perfect, 8)
    assert len(score.videos) == 8
    assert set(score.shares().values()) == {1.0}


def test_another_colour_and_another_way_are_wrong(perfect):
    perfect.change = lambda scene: replace(
        scene, colours=("blue" if scene.colours[0] != "blue" else "red",) * scene.chunks
    )
    assert evaluate.text(perfect, 6).shares()["colour"] < 0.2
    perfect.change = lambda scene: replace(scene, motions=("still",) * scene.chunks)
    assert evaluate.change(perfect, 4).shares()["turned"] == 0
    perfect.change = None
    perfect.pace = 1.3
    assert evaluate.clip(perfect, 4, 8).shares()["velocity"] == 0
    perfect.pace = 1.0
    perfect.change = lambda scene: replace(scene, start=(64.0 - scene.start[0], 64.0 - scene.start[1]))
    assert evaluate.picture(perfect, 6).shares()["place"] < 0.5

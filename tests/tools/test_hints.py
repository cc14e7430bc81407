"""What tokens are asked in training: numbers and names of the scene, seen from each of them."""

import pytest
import torch

from tools.train_embedded import hints, world
from tools.train_embedded.world import MOTIONS, SHAPES

SCENE = world.Scene("star", "small", "black", ("right", "grows"), ("red", "red"), (16.0, 32.0))


def test_the_numbers_of_a_scene():
    numbers = hints.numbers(SCENE)
    assert numbers.shape == (2, 6, 7)
    # Four frames of two thirds of a pixel each: the mean of the first patch is a pixel further.
    assert numbers[0, 0, :2].tolist() == pytest.approx([17 / 16, 32 / 16], abs=1e-4)
    assert numbers[0, :, 0].diff().tolist() == pytest.approx([8 / 3 / 16] * 5, abs=1e-4)
    assert numbers[0, 0, 3:].tolist() == pytest.approx([1, 0, 0, 0])
    assert numbers[1, 0, 3:].tolist() == pytest.approx([0, 0, 1, 0])
    assert numbers[1, -1, 2] > numbers[1, 0, 2] > 0


def test_the_names_of_a_scene():
    first, second = hints.labels(SCENE).tolist()
    assert first == [SHAPES.index("star"), 0, 0, MOTIONS.index("right"), 1, 0, 1]  # small is the second of three sizes
    assert second == [SHAPES.index("star"), 0, 0, MOTIONS.index("grows"), 1, 1, 1]


class Answer(torch.nn.Module):
    """Says what it is told to, whatever it is asked."""

    def __init__(self, said):
        super().__init__()
        self.said = said

    def forward(self, hidden):
        return self.said


def answers():
    """What all tokens would have to say of the scene: (2, 6, 16, numbers and scores)."""
    numbers, names = hints.numbers(SCENE), hints.labels(SCENE)
    said = torch.zeros(2, 6, 16, 7 + sum(hints.TOLD) + 12 + 6)
    said[..., :7] = numbers[:, :, None]
    starts = 7 + torch.tensor([0, *hints.TOLD]).cumsum(0)
    for chunk in range(2):
        for start, name in zip(starts, names[chunk, :5], strict=False):
            said[chunk, ..., start + name] = 50
    for frame in range(6):
        said[:, frame, :, starts[5] + 12 + frame] = 50
    for token in range(16):  # in rows of four, 16 pixels wide
        column, row = token % 4, token // 4
        said[:, :, token, 0] -= column + 0.5
        said[:, :, token, 1] -= row + 0.5
        for chunk in range(2):  # six places to each side, from 40 pixels to the left on
            x, y = 16 * (names[chunk, 5:] + 1) - torch.tensor([16 * column + 8, 16 * row + 8])
            said[chunk, :, token, starts[5] + (x + 40) // 16] = 50
            said[chunk, :, token, starts[5] + 6 + (y + 40) // 16] = 50
    return said


def test_right_answers_cost_nothing_and_only_learned_chunks_count():
    numbers, names, model = hints.numbers(SCENE), hints.labels(SCENE), hints.Hints(8, 2, 4)
    said = answers()
    model.head = Answer(said.flatten(1, 2))
    hidden, both, first = torch.zeros(2, 96, 8), torch.tensor([True, True]), torch.tensor([True, False])
    assert model.loss(hidden, numbers, names, both) == pytest.approx(0, abs=1e-6)
    said[1, ..., 0] += 3
    assert model.loss(hidden, numbers, names, both) > 0.1
    assert model.loss(hidden, numbers, names, first) == pytest.approx(0, abs=1e-6)
    for name in range(hints.LABELS):
        other = names.clone()
        other[0, name] = (other[0, name] + 1) % 3
        assert model.loss(hidden, numbers, other, first) == pytest.approx(0.1 * 50, rel=0.01), name


def test_only_the_tokens_of_captions_are_asked_what_these_say():
    names, model = hints.labels(SCENE), hints.Hints(8, 2, sum(hints.TOLD))
    model.text_head = torch.nn.Identity()
    embeds = torch.zeros(2, 5, sum(hints.TOLD))
    starts = torch.tensor([0, *hints.TOLD]).cumsum(0)
    for chunk in range(2):
        embeds[chunk, 1:4, starts[:5] + names[chunk, :5]] = 50
    asked = torch.tensor([[False, True, True, True, False], [False, True, True, False, False]])
    assert model.text_loss(embeds, asked, names) == pytest.approx(0, abs=1e-6)
    assert model.text_loss(embeds, torch.ones_like(asked), names) > 1
    assert model.text_loss(embeds, asked, names + torch.eye(7, dtype=torch.long)[3]) == pytest.approx(50)

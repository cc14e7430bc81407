"""What hidden states are asked in training: numbers of the scene, seen from each token."""

import pytest
import torch

from tools.train_embedded import hints, world

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


class Answer(torch.nn.Module):
    """Says what it is told to, whatever it is asked."""

    def __init__(self, said):
        super().__init__()
        self.said = said

    def forward(self, hidden):
        return self.said


def test_right_answers_cost_nothing_and_only_learned_chunks_count():
    numbers, model = hints.numbers(SCENE), hints.Hints(8, 2)
    said = torch.zeros(2, 6, 16, 7 + len(world.SHAPES))
    said[..., :7] = numbers[:, :, None]
    for token in range(16):  # in rows of four, 16 pixels wide
        said[:, :, token, 0] -= token % 4 + 0.5
        said[:, :, token, 1] -= token // 4 + 0.5
    said[..., 7 + world.SHAPES.index("star")] = 50
    model.head = Answer(said.flatten(1, 2))
    shapes, both = torch.tensor([5, 5]), torch.tensor([True, True])
    assert model.loss(torch.zeros(2, 96, 8), numbers, shapes, both) == pytest.approx(0, abs=1e-6)
    said[1, ..., 0] += 3
    wrong = model.loss(torch.zeros(2, 96, 8), numbers, shapes, both)
    assert wrong > 0.1
    first = torch.tensor([True, False])
    assert model.loss(torch.zeros(2, 96, 8), numbers, shapes, first) == pytest.approx(0, abs=1e-6)
    named = model.loss(torch.zeros(2, 96, 8), numbers, torch.tensor([0, 5]), first)
    assert named == pytest.approx(0.1 * 50, rel=0.01)

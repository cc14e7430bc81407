import math

import pytest
import torch

from magi.attention import attend
from magi.rope import rope_angles, rotate

BANDS = torch.tensor([1.0, 0.3, 0.07, 0.013])  # head size 32


def angle(bands, frame, row, column, height, width) -> list[float]:
    """Reference section 3.4 for one token, number by number."""

    def centred(index, n):
        r = n / math.sqrt(height * width / 256)
        return (index - (n - 1) / 2) * (r - 1) / (n - 1)

    return [x * band for x in (frame, centred(row, height), centred(column, width)) for band in bands.tolist()]


@pytest.mark.parametrize(("height", "width"), [(16, 16), (2, 2), (3, 4), (45, 80), (2, 9)])
@pytest.mark.parametrize("first", [0, 18])
def test_angles_by_the_formula(first, height, width):
    got = rope_angles(BANDS, first, 2, height, width)
    wanted = [
        angle(BANDS.double(), first + t, h, w, height, width)
        for t in range(2)
        for h in range(height)
        for w in range(width)
    ]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_sixteen_tokens_square_are_the_plain_grid():
    got = rope_angles(torch.ones(1), 0, 1, 16, 16).reshape(16, 16, 3)
    torch.testing.assert_close(got[:, 0, 1], torch.arange(16) - 7.5)
    torch.testing.assert_close(got[0, :, 2], torch.arange(16) - 7.5)


def test_rotation_pairs_the_halves_and_leaves_the_rest(randn):
    x, angles = randn(5, 3, 32), randn(5, 12, seed=1)
    got = rotate(x, angles.cos(), angles.sin())
    pairs = torch.complex(x[..., :12], x[..., 12:24]) * torch.polar(torch.ones(5, 1, 12), angles[:, None])
    torch.testing.assert_close(got, torch.cat([pairs.real, pairs.imag, x[..., 24:]], dim=-1))


def test_only_the_distance_in_time_counts(randn):
    q, k = randn(1, 1, 32).double(), randn(1, 1, 32, seed=1).double()

    def score(frame_q, frame_k):
        a, b = (rope_angles(BANDS, f, 1, 4, 6)[7:8].double() for f in (frame_q, frame_k))
        return float((rotate(q, a.cos(), a.sin()) * rotate(k, b.cos(), b.sin())).sum())

    assert score(3, 1) == pytest.approx(score(40, 38), abs=1e-4)
    assert score(3, 1) != pytest.approx(score(3, 2), abs=1e-2)


def explicit(q, k, v):
    """Softmax over every key, each group's key repeated for its consecutive query heads."""
    repeat = q.shape[0] // k.shape[0]
    k, v = (x.double().repeat_interleave(repeat, dim=0) for x in (k, v))
    scores = q.double() @ k.mT / math.sqrt(q.shape[-1])
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


@pytest.mark.parametrize(("heads", "groups"), [(8, 8), (8, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (7, 3), (24, 72)])
def test_attention_equals_the_explicit_softmax(heads, groups, tokens, keys, randn):
    q, k, v = randn(heads, tokens, 16), randn(groups, keys, 16, seed=1), randn(groups, keys, 16, seed=2)
    got = attend(q, k, v)
    assert got.shape == (tokens, heads * 16)
    torch.testing.assert_close(got.double(), explicit(q, k, v), rtol=1e-5, atol=1e-5)


def test_attention_takes_any_strides(randn):
    q = randn(24, 8, 16).transpose(0, 1)
    k, v = randn(2, 4, 90, 16)[:, :, 10:50]
    torch.testing.assert_close(attend(q, k, v).double(), explicit(q, k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_attention_on_the_gpu(randn):
    q, k, v = randn(8, 24, 64), randn(4, 72, 64, seed=1), randn(4, 72, 64, seed=2)
    got = attend(*(x.cuda().bfloat16() for x in (q, k, v)))
    torch.testing.assert_close(got.cpu().double(), explicit(q, k, v), rtol=0, atol=2e-2)

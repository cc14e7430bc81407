from fractions import Fraction

import pytest
import torch

from magi.media.sound import Sound, lasting, silence


@pytest.mark.parametrize("frames", [1, 5, 24, 31])
def test_cut_or_followed_by_silence(frames: int):
    sound = Sound(torch.ones(2, 44100), 44100)
    made = lasting(sound, Fraction(frames, 24))
    assert (made.waveform.shape, made.rate) == ((2, round(frames / 24 * 44100)), 44100)
    assert made.waveform[:, :44100].all()
    assert not made.waveform[:, 44100:].any()


@pytest.mark.parametrize("samples", [-5, 0, 1, 65536, 200_000])
def test_silence_comes_in_blocks(samples: int):
    blocks = list(silence(6, samples))
    assert sum(block.shape[1] for block in blocks) == max(0, samples)
    assert all(len(block) == 6 and block.shape[1] <= 65536 and not block.any() for block in blocks)

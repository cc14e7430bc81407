"""Sound as samples, in step with a video's frames; silence where there is none.

Sound is mono, stereo or 5.1, at a rate that AAC knows: every player takes it, and so does ComfyUI.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F

# By the number of channels.
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}

# Samples per second.
RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)

_BLOCK = 1 << 16  # samples


@dataclass(frozen=True)
class Sound:
    """The sound of a video from its first frame on: float32 (channels, samples), `rate` samples per second."""

    waveform: torch.Tensor
    rate: int


def lasting(sound: Sound, seconds: Fraction) -> Sound:
    """Returns a sound of exactly `seconds`, to the nearest sample: cut, or followed by silence."""
    samples = round(seconds * sound.rate)
    kept = sound.waveform[:, :samples]
    return Sound(F.pad(kept, (0, samples - kept.shape[1])), sound.rate)


def silence(channels: int, samples: int) -> Iterator[torch.Tensor]:
    """Yields silence, float32 (channels, n), in blocks that make `samples` together; none where that is not above 0."""
    for start in range(0, samples, _BLOCK):
        yield torch.zeros(channels, min(_BLOCK, samples - start))

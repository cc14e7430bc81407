"""Sound to AAC, as a track of its own that `VideoWriter` puts into the finished video."""

import warnings
from collections.abc import Iterable
from fractions import Fraction
from io import BytesIO

import torch

from .sound import LAYOUTS

ENCODER = "aac"

# Bits per second and channel: transparent for most ears. Low rates of samples cannot use as much.
_BIT_RATE = 96_000


def encode_sound(blocks: Iterable[torch.Tensor], rate: int, channels: int) -> bytes | None:
    """Encodes sound to an MP4 without pictures; a second takes some 12 kB a channel.

    Args:
        blocks: float32 (channels, n) on the CPU, one after the other, each taken when its turn comes.
        rate: samples per second, one of `sound.RATES`.
        channels: 1, 2 or 6.

    Returns:
        The file; None, with a warning, where this PyAV cannot encode it.
    """
    import av

    file = BytesIO()
    try:
        with av.open(file, "w", format="mp4") as container:
            stream = container.add_stream(ENCODER, rate=rate)
            stream.codec_context.layout = LAYOUTS[channels]
            stream.codec_context.bit_rate = channels * min(_BIT_RATE, 2 * rate)
            samples = 0
            for block in blocks:
                if not block.shape[1]:
                    continue
                frame = av.AudioFrame.from_ndarray(block.contiguous().numpy(), format="fltp", layout=LAYOUTS[channels])
                frame.sample_rate, frame.pts, frame.time_base = rate, samples, Fraction(1, rate)
                container.mux(stream.encode(frame))
                samples += block.shape[1]
            container.mux(stream.encode(None))
    except (av.error.FFmpegError, ValueError) as error:  # ValueError: it has no such encoder
        warnings.warn(
            f"This PyAV cannot encode AAC ({error}): the video is written without sound. Install the official wheel "
            "(pip install av).",
            stacklevel=2,
        )
        return None
    return file.getvalue()

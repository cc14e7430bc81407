"""The sound of a video's file, in step with its frames and as long as they are, whatever the file has of it."""

import warnings
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ..system.progress import OnProgress
from .clip_clock import LONGEST
from .containers import main_stream, media_errors, open_container
from .sound import LAYOUTS, RATES, Sound, silence
from .video_decoder import VideoFile, open_clip

# Seconds that a time may run ahead of the samples before it. Clocks jitter, and a pause within a tone is heard as a
# click; sound that is late by less than a frame is not.
_TOLERANCE = Fraction(1, 24)

# A header may promise a little more than there is: seconds.
_MISSING = Fraction(1, 2)


@dataclass(frozen=True)
class SoundTrack:
    """The sound of a video's file, which is read when it is asked for.

    Attributes:
        path: the video.
        start: when its first frame is shown, in seconds on the file's own clock.
        rate: samples per second: the file's, or 48000 where AAC does not know that.
        channels: 1, 2 or 6, as in the file; any other number is mixed to 2.
    """

    path: Path
    start: Fraction
    rate: int
    channels: int

    def blocks(self, seconds: Fraction, progress: OnProgress | None = None) -> Generator[torch.Tensor, None, None]:
        """Yields the sound from the first frame on, float32 (channels, n), in blocks that last exactly `seconds`.

        Sound before the first frame is cut off. Where the file has none there is silence, and where it is damaged there
        is silence and a warning. `progress(samples so far, samples)` is called after each block and may raise to stop.
        """
        total, done = round(seconds * self.rate), 0
        with closing(self._continuous()) as pieces:
            for piece in chain(pieces, silence(self.channels, total)):
                block = piece[:, : total - done]
                yield block
                done += block.shape[1]
                if progress:
                    progress(done, total)
                if done == total:
                    return

    def _continuous(self) -> Generator[torch.Tensor, None, None]:
        """Yields the sound from the first frame to the file's last sample, with silence in the gaps."""
        to_floats, clock = _ToFloats(self.rate, self.channels), _SoundClock(self.start, self.rate)
        damaged = lost = False
        with closing(_decoded(self.path)) as frames:
            for frame in frames:
                block = None if frame is None else to_floats(frame)
                if block is None:
                    if not damaged:
                        warnings.warn(
                            f"The sound of {str(self.path)!r} is damaged: silence stands in for what cannot be read.",
                            stacklevel=2,
                        )
                    damaged = lost = True
                    continue
                end = clock.end or 0
                begin = clock.place(frame, block.shape[1], lost)
                yield from silence(self.channels, begin - max(0, end))
                yield block[:, max(0, -begin) :]
                lost = False


class _SoundClock:
    """Where frames belong, in samples from the first picture on: at their times, or each after the one before."""

    def __init__(self, start: Fraction, rate: int) -> None:
        self._start, self._rate = start, rate
        self._left_out = 0  # samples by which the file's clock has jumped, as the picture's has (see `ClipClock`)
        self.end: int | None = None  # of the frame before; below 0 is before the first picture

    def place(self, frame: Any, samples: int, lost: bool) -> int:
        """Returns where a frame begins; `lost` tells whether something before it could not be read."""
        begin = self._begin(frame, lost)
        self.end = begin + samples
        return begin

    def _begin(self, frame: Any, lost: bool) -> int:
        end = self.end
        if frame.pts is None:
            return end or 0
        at = round((frame.pts * frame.time_base - self._start) * self._rate) - self._left_out
        if at - (end or 0) > LONGEST * self._rate:
            self._left_out += at - (end or 0)
            at = end or 0
        if end is None:
            return at
        # A time that jumps back is no time: as in the picture, the frame follows the one before.
        return at if at - end > (0 if lost else _TOLERANCE * self._rate) else end


def open_sound(path: str | Path) -> SoundTrack | None:
    """Opens the sound of a video: the track that players take, see `main_stream`. Returns None where there is none.

    Sound of which nothing can be read is a warning.

    Raises:
        MagiError: as `open_clip`.
    """
    clip = open_clip(path)
    if not isinstance(clip, VideoFile):
        return None
    unreadable = False
    with closing(_decoded(clip.path)) as frames:
        for frame in frames:
            if frame is not None:
                rate = frame.sample_rate if frame.sample_rate in RATES else 48000
                channels = len(frame.layout.channels)
                return SoundTrack(clip.path, clip.start, rate, channels if channels in LAYOUTS else 2)
            unreadable = True
    if unreadable:
        warnings.warn(f"The sound of {str(path)!r} cannot be read, and is left out.", stacklevel=2)
    return None


def read_sound(path: str | Path, seconds: Fraction, progress: OnProgress | None = None) -> Sound | None:
    """Reads the first `seconds` of a video's sound, exactly; None where it has none. See `SoundTrack.blocks`.

    Raises:
        MagiError: as `open_clip`.
    """
    track = open_sound(path)
    if track is None:
        return None
    blocks = list(track.blocks(seconds, progress))
    return Sound(torch.cat(blocks, 1) if blocks else torch.zeros(track.channels, 0), track.rate)


class _ToFloats:
    """Converts decoded frames to float32 (channels, samples) of one rate and layout; a stream may change its own."""

    def __init__(self, rate: int, channels: int) -> None:
        self._rate, self._channels = rate, channels
        self._source: tuple[str, str, int] | None = None
        self._resampler: Any = None

    def __call__(self, frame: Any) -> torch.Tensor | None:
        """Returns what can be had of a frame by now, all of it but for a change of rate; None where it is damaged."""
        import av

        source = (frame.format.name, frame.layout.name, frame.sample_rate)
        try:
            if source != self._source:
                self._source = source
                self._resampler = av.AudioResampler("fltp", LAYOUTS[self._channels], self._rate)
            parts = [torch.from_numpy(part.to_ndarray()) for part in self._resampler.resample(frame)]
        except media_errors():
            self._source = None
            return None
        return torch.cat([torch.zeros(self._channels, 0), *parts], 1)


def _decoded(path: Path) -> Generator[Any, None, None]:
    """Yields the decoded frames of a file's sound in order, and None where something is damaged or missing."""
    try:
        container = open_container(path)
    except media_errors():
        yield None
        return
    with container:
        streams = container.streams.audio
        stream = main_stream(streams)
        if stream is None:
            if streams:  # of a kind that this FFmpeg does not know
                yield None
            return
        end: Fraction | None = None
        packets = container.demux(stream)
        while True:
            try:
                frames = next(packets).decode()
            except (StopIteration, EOFError):
                break
            except media_errors():
                frames = [None]  # decoders go on with the next packet
            for frame in frames:
                if frame is not None and frame.pts is not None:
                    end = frame.pts * frame.time_base + Fraction(frame.samples, frame.sample_rate)
                yield frame
        promised = _promised_end(container, stream)
        if end is not None and promised is not None and promised - end > _MISSING:
            yield None


def _promised_end(container: Any, stream: Any) -> Fraction | None:
    """Returns when a stream ends by the header, in seconds on the file's clock; None where the header does not say."""
    if not stream.duration or not container.duration:
        return None
    of_stream = ((stream.start_time or 0) + stream.duration) * stream.time_base
    of_file = Fraction((container.start_time or 0) + container.duration, 1_000_000)
    return min(of_stream, of_file)  # a trimmed clip keeps its full stream behind an edit list

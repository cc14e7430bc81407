"""`--join`: the clip that is continued goes in front of the result, with its sound."""

import argparse
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain

import torch

from ..errors import MagiError
from ..media.sound import silence
from ..media.sound_encoder import encode_sound
from ..media.sound_reader import open_sound
from ..media.video_reader import probe, read_pieces
from ..media.video_writer import VideoWriter
from ..pipeline.phases import OnPhase, Phase


def check_join(args: argparse.Namespace) -> None:
    """Raises MagiError where --join is given and nothing to put in front."""
    if args.join and not args.video:
        raise MagiError(
            "--join puts the video that is continued in front, and none is given. Name it (--video), or leave out --join."
        )


def joined_clip(
    video: str, mode: str, writer: VideoWriter, frames_after: int, progress: OnPhase
) -> Iterator[torch.Tensor]:
    """Yields a clip's frames for the writer, piece by piece, then gives it the clip's sound with silence behind.

    Args:
        video: the file.
        mode: "crop", "pad" or "stretch", for a clip of another shape.
        writer: of the video that the clip belongs in front of.
        frames_after: the frames that follow the clip.
        progress: called after each piece with the phase "join".

    Raises:
        MagiError: the file cannot be read.
    """
    expected, frames = round((probe(video).seconds or 0) * writer.fps), 0
    for piece in read_pieces(video, writer.fps, writer.height, writer.width, mode):
        yield piece
        frames += len(piece)
        progress(Phase("join", frames, max(frames, expected)))
    track = open_sound(video)
    if track is not None:
        seconds, whole = (Fraction(n) / writer.fps for n in (frames, frames + frames_after))
        rest = round(whole * track.rate) - round(seconds * track.rate)
        blocks = chain(track.blocks(seconds), silence(track.channels, rest))
        writer.sound = encode_sound(blocks, track.rate, track.channels)

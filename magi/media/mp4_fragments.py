"""Frames to fragments of an MP4: pieces encoded on their own, that can be appended to one another byte by byte."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from io import BytesIO
from typing import Any, BinaryIO

import torch

from ..errors import MagiError

# In the order of preference. Only the first knows a CRF; PyAV builds without it get a bit rate of about that quality.
ENCODERS = ("libx264", "libopenh264", "h264_nvenc", "h264_qsv", "h264_amf", "h264_videotoolbox", "h264_mf", "mpeg4")

_BT709 = {"color_primaries": "bt709", "color_trc": "bt709", "colorspace": "bt709", "color_range": "tv"}

# Tags with a place of their own in MP4, which players and file managers show. Others need the list of free keys.
_COMMON_TAGS = {"title", "artist", "album", "comment", "genre", "copyright", "description", "synopsis", "date"}


@dataclass(frozen=True)
class Piece:
    """A piece of a fragmented MP4: the file's header, the same for every piece, and the fragments to append to it."""

    header: bytes
    fragments: bytes
    count: int


@dataclass(frozen=True)
class FragmentEncoder:
    """Encodes pieces of one video: yuv420p, BT.709, starting with a key frame, without B-frames.

    B-frames would save some bytes, but make the first frame start late behind an edit list that players treat
    differently, and tie a piece to its neighbours.
    """

    name: str
    height: int
    width: int
    fps: Fraction
    crf: int
    metadata: dict[str, str] = field(default_factory=dict)

    def encode(
        self, frames: torch.Tensor, first: int, fragment: int, progress: Callable[[int], None] | None = None
    ) -> Piece:
        """Encodes frames, uint8 (T, H, W, 3) on the CPU, T > 0, to a piece.

        `first` is the number of frames before this piece, `fragment` that of fragments. `progress(frames done)` may
        raise.
        """
        import av

        options = {
            "movflags": "+frag_keyframe+empty_moov+default_base_moof+frag_discont" + tag_flags(self.metadata),
            "fragment_index": str(fragment + 1),
            "avoid_negative_ts": "disabled",  # the muxer would let every piece begin at 0
        }
        buffer = BytesIO()
        with av.open(buffer, "w", format="mp4", options=options) as container:
            container.metadata.update(self.metadata)
            stream = self._add_stream(container)
            for index, frame in enumerate(frames.numpy()):
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
                picture.pts, picture.time_base = first + index, 1 / self.fps
                container.mux(stream.encode(picture))
                if progress:
                    progress(index + 1)
            container.mux(stream.encode(None))
        return _split(buffer.getvalue())

    def _add_stream(self, container: Any) -> Any:
        options = dict(_BT709)
        if self.name == "libx264":
            options |= {"crf": str(self.crf), "preset": "medium"}
        stream = container.add_stream(self.name, rate=self.fps, options=options)
        stream.width, stream.height, stream.pix_fmt = self.width, self.height, "yuv420p"
        context = stream.codec_context
        context.time_base = 1 / self.fps
        context.max_b_frames = 0
        context.gop_size = 250  # a constant: the header depends on it, and must be the same for every piece
        if self.name != "libx264":
            context.bit_rate = int(self.height * self.width * self.fps * 0.15 * 2 ** ((23 - self.crf) / 6))
        return stream


def find_encoder(height: int, width: int, fps: Fraction, crf: int, metadata: dict[str, str]) -> FragmentEncoder:
    """Returns the first of `ENCODERS` that can encode a frame of this size on this machine; warns if it is not H.264.

    Raises:
        MagiError: none does.
    """
    import av

    black = torch.zeros(1, height, width, 3, dtype=torch.uint8)
    reason: Exception | None = None
    for name in ENCODERS:
        encoder = FragmentEncoder(name, height, width, fps, crf, metadata)
        try:
            encoder.encode(black, 0, 0)  # encoders are listed that lack their hardware or driver
        except (av.error.FFmpegError, ValueError, OSError) as error:
            reason = reason or error
            continue
        if name == "mpeg4":
            warnings.warn(
                "This PyAV has no working H.264 encoder: the video is written as MPEG-4 Part 2, which browsers do not "
                "play. Install the official wheel (pip install av) for H.264.",
                stacklevel=3,
            )
        return encoder
    raise MagiError(
        f"No encoder of this PyAV can write {width}x{height} at {fps} frames per second ({reason}). "
        "Choose another size, or install the official wheel (pip install av)."
    )


def tag_flags(metadata: dict[str, str]) -> str:
    """Returns the muxer flag that free keys need; "" without such keys, as it hides the common tags from players."""
    return "" if metadata.keys() <= _COMMON_TAGS else "+use_metadata_tags"


def boxes(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Yields (type, offset, size) in bytes of an MP4's top-level boxes; the last may reach beyond a cut-off file."""
    offset = 0
    while True:
        file.seek(offset)
        head = file.read(16)
        if len(head) < 8:
            return
        size = int.from_bytes(head[:4], "big")
        if size == 1:
            size = int.from_bytes(head[8:], "big")
        yield head[4:8], offset, size
        if size < 8:
            return
        offset += size


def _split(data: bytes) -> Piece:
    parts = [(kind, data[offset : offset + size]) for kind, offset, size in boxes(BytesIO(data))]
    header = b"".join(part for kind, part in parts if kind in (b"ftyp", b"moov"))
    fragments = b"".join(part for kind, part in parts if kind in (b"moof", b"mdat"))
    return Piece(header, fragments, sum(kind == b"moof" for kind, _ in parts))

"""Which picture of a file is shown: tracks, transparency beside the picture, fields, palettes."""

import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from magi.media import deinterlacing
from magi.media.sound_reader import read_sound
from magi.media.video_reader import probe, read_video

HEIGHT, WIDTH = 64, 96


def flat(*colour: int) -> np.ndarray:
    return np.full((HEIGHT, WIDTH, len(colour)), colour, np.uint8)


def encode(out, stream, pictures: list[np.ndarray], pix_fmt: str = "yuv420p") -> None:
    for index, picture in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(picture, format="rgba" if picture.shape[2] == 4 else "rgb24")
        frame = frame.reformat(format=pix_fmt)
        frame.pts = index
        out.mux(stream.encode(frame))
    out.mux(stream.encode(None))


def add_video(out, codec: str = "libx264", pix_fmt: str = "yuv420p", rate: int = 24, **options: str):
    stream = out.add_stream(codec, rate=rate, options=options)
    stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, pix_fmt
    return stream


# Tracks


def set_default(stream, on: bool) -> None:
    flag = type(stream.disposition).default
    stream.disposition = flag if on else type(stream.disposition)(0)


needs_dispositions = pytest.mark.skipif(
    not hasattr(av.stream, "Disposition"), reason="this PyAV does not tell tracks apart"
)


@needs_dispositions
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov"])
@pytest.mark.parametrize(("default", "colour"), [((True, False), 0), ((False, True), 2), ((False, False), 0)])
def test_the_default_track_is_read(tmp_path: Path, name: str, default: tuple[bool, bool], colour: int):
    with av.open(str(tmp_path / name), "w") as out:
        streams = [add_video(out, crf="1") for _ in range(2)]
        for stream, on in zip(streams, default, strict=True):
            set_default(stream, on)
        encode(out, streams[0], [flat(220, 0, 0)] * 12)
        encode(out, streams[1], [flat(0, 0, 220)] * 48)
    if name != "a.mkv" and default == (False, False):
        return  # MP4 cannot say that
    with pytest.warns(UserWarning, match=f"2 video tracks: number {1 + colour // 2} is read"):
        frames = read_video(tmp_path / name)
    assert len(frames) == (48 if colour else 12)
    assert frames[3, 5, 5].argmax() == colour


@needs_dispositions
def test_the_default_sound_is_read(tmp_path: Path):
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        video, sounds = add_video(out), [out.add_stream("pcm_s16le", rate=48000) for _ in range(2)]
        for sound, on in zip(sounds, (False, True), strict=True):
            set_default(sound, on)
        encode(out, video, [flat(9, 9, 9)] * 24)
        for sound, level in zip(sounds, (1000, 20000), strict=True):
            frame = av.AudioFrame.from_ndarray(np.full((1, 48000), level, np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts = 48000, 0
            out.mux(sound.encode(frame))
            out.mux(sound.encode(None))
    assert read_sound(tmp_path / "a.mkv", Fraction(1)).waveform.mean() > 0.3, "the loud one"


# Transparency that lies beside the picture


@pytest.mark.parametrize("codec", ["libvpx-vp9", "libvpx"])
@pytest.mark.parametrize("start", [0, 1])
def test_transparency_of_webm_is_laid_over_white(tmp_path: Path, codec: str, start: int):
    picture = flat(200, 0, 0, 0)
    picture[:, WIDTH // 2 :, 3] = 255
    with av.open(str(tmp_path / "a.webm"), "w") as out:
        stream = add_video(out, codec, "yuva420p", g="6", **{"auto-alt-ref": "0"})
        stream.metadata["alpha_mode"] = "1"
        encode(out, stream, [picture] * 36, "yuva420p")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame = read_video(tmp_path / "a.webm", start=start)[4]
    assert (frame[:, :32] > 245).all(), "what is transparent is white"
    assert (frame[10:-10, 60:] - torch.tensor([200, 0, 0])).abs().max() < 20


def test_transparency_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with av.open(str(tmp_path / "a.webm"), "w") as out:
        stream = add_video(out, "libvpx-vp9", "yuva420p", **{"auto-alt-ref": "0"})
        stream.metadata["alpha_mode"] = "1"
        encode(out, stream, [flat(200, 0, 0, 0)] * 12, "yuva420p")
    create = av.CodecContext.create
    lacking = lambda name, mode: create(name if mode != "r" else "no such codec", mode)  # noqa: E731
    monkeypatch.setattr(av, "CodecContext", type("Lacking", (), {"create": staticmethod(lacking)}))
    with pytest.warns(UserWarning, match="transparency that this PyAV cannot read"):
        assert len(read_video(tmp_path / "a.webm")) == 12


# Fields


def combed(index: int) -> np.ndarray:
    """A bar that moves by eight pixels from field to field."""
    picture = flat(0, 0, 0)
    for row in range(HEIGHT):
        left = 8 * (2 * index + row % 2) % (WIDTH - 24)
        picture[row, left : left + 16] = 255
    return picture


def combing(frames: torch.Tensor) -> float:
    """How much more a row differs from its neighbour than from the one after that."""
    rows = frames.float().mean(3)
    near, far = ((rows[:, n:] - rows[:, :-n]).abs().mean() for n in (1, 2))
    return float(near - far)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mpg", "mpeg2video", {"flags": "+ildct+ilme", "g": "6", "b": "8000000"}),
        ("a.mp4", "libx264", {"flags": "+ildct+ilme", "crf": "1", "g": "6"}),
    ],
)
def test_interlaced_clips_are_deinterlaced_and_it_is_said(tmp_path: Path, name: str, codec: str, options: dict):
    pictures = [combed(index) for index in range(30)]
    with av.open(str(tmp_path / name), "w") as out:
        encode(out, add_video(out, codec, rate=25, **options), pictures)
    assert combing(torch.from_numpy(np.stack(pictures))) > 20, "they were combed"
    with pytest.warns(UserWarning, match="is interlaced: each two fields are made one frame"):
        frames = read_video(tmp_path / name, fps=25)
    assert len(frames) == 30, "not a frame more or less"
    assert combing(frames) < 5
    assert any("is interlaced" in notice for notice in probe(tmp_path / name).notices)
    assert len(read_video(tmp_path / name, fps=25, tail_seconds=0.4)) == 10
    assert len(read_video(tmp_path / name, fps=25, start=0.4, seconds=0.4)) == 10


def test_interlaced_clips_without_a_filter_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with av.open(str(tmp_path / "a.mpg"), "w") as out:
        stream = add_video(out, "mpeg2video", rate=25, flags="+ildct+ilme", b="8000000")
        encode(out, stream, [combed(index) for index in range(12)])
    monkeypatch.setattr(deinterlacing, "_FILTERS", ("no such filter",))
    with pytest.warns(UserWarning, match="interlaced, and this PyAV cannot change that"):
        assert len(read_video(tmp_path / "a.mpg", fps=25)) == 12


def test_colours_pass_the_filter(tmp_path: Path):
    with av.open(str(tmp_path / "a.mpg"), "w") as out:
        stream = add_video(out, "mpeg2video", rate=25, flags="+ildct+ilme", b="8000000")
        encode(out, stream, [flat(20, 200, 60)] * 12)
    with pytest.warns(UserWarning, match="interlaced"):
        frames = read_video(tmp_path / "a.mpg")
    assert (frames[5, 20, 20].int() - torch.tensor([20, 200, 60])).abs().max() < 8


def test_progressive_clips_are_left_alone(tmp_path: Path):
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        encode(out, add_video(out, crf="1"), [combed(index) for index in range(12)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert combing(read_video(tmp_path / "a.mp4")) > 20


# Palettes


def test_a_palette_holds_until_the_next_one(tmp_path: Path):
    """AVI tells a palette once, whatever comes next, and marks each frame as one to begin with."""
    indices = np.zeros((HEIGHT, WIDTH), np.uint8)
    indices[:, WIDTH // 2 :] = 1
    with av.open(str(tmp_path / "a.avi"), "w") as out:
        stream = add_video(out, "rawvideo", "pal8")
        for index in range(96):
            palette = np.zeros((256, 4), np.uint8)
            palette[:, 0] = 255
            palette[0, 1:] = (200, 0, 0) if index < 12 else (0, 0, 200)
            frame = av.VideoFrame.from_ndarray((indices, palette), format="pal8")
            frame.pts = index
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    whole = read_video(tmp_path / "a.avi")
    assert whole[0, 5, 5].tolist() != whole[-1, 5, 5].tolist()
    for part in (
        read_video(tmp_path / "a.avi", tail_seconds=0.5),
        read_video(tmp_path / "a.avi", start=3, seconds=0.5),
    ):
        assert torch.equal(part[-1], whole[-1])

import warnings
import wave
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from magi.errors import MagiError
from magi.media.video_decoder import TimedFrame, VideoFile
from magi.media.video_reader import probe, read_pieces, read_video, resample

MATRICES = {
    "upright": (1, 0, 0, 1),
    "90": (0, 1, -1, 0),
    "180": (-1, 0, 0, -1),
    "270": (0, -1, 1, 0),
    "mirror": (-1, 0, 0, 1),
}


def grey(level: int, height: int = 32, width: int = 48) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def ramp(count: int) -> list[np.ndarray]:
    """Flat frames whose level tells their number: see `numbers`."""
    return [grey(20 + 4 * (index % 55)) for index in range(count)]


def numbers(frames: torch.Tensor) -> list[int]:
    return [round((level - 20) / 4) for level in frames.float().mean((1, 2, 3)).tolist()]


def make(
    path: Path,
    frames: Sequence[np.ndarray],
    rate: Fraction | int = 24,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    times: Sequence[float] | None = None,
    aspect: Fraction | None = None,
    gop: int = 250,
    **container: Any,
) -> Path:
    """Writes a video; `times` (seconds) makes its frame rate variable."""
    base = Fraction(1, 1000) if times else 1 / Fraction(rate)
    with av.open(str(path), "w", **container) as out:
        stream = out.add_stream(codec, rate=Fraction(rate), options={"crf": "1", "preset": "ultrafast"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.time_base = pix_fmt, base
        stream.codec_context.time_base, stream.codec_context.gop_size = base, gop
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgba" if picture.shape[2] == 4 else "rgb24")
            frame = frame.reformat(format=pix_fmt)
            frame.time_base = base
            frame.pts = round(times[index] * 1000) if times else index
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def turn(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Writes the display matrix that a phone writes into the track header."""
    data = bytearray(path.read_bytes())
    a, b, c, d = (value * 65536 for value in matrix)
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in (a, b, 0, c, d, 0, 0, 0, 1 << 30))
    path.write_bytes(data)


# Rates


@pytest.mark.parametrize(
    ("rate", "count", "expected"),
    [
        (24, 24, list(range(24))),
        (Fraction(24000, 1001), 48, list(range(48))),
        (12, 12, [n // 2 for n in range(24)]),
        (30, 15, [0, 1, 2, 4, 5, 6, 7, 9, 10, 11, 12, 14]),
        (60, 10, [0, 2, 5, 7]),
    ],
)
def test_constant_rates_become_24(tmp_path: Path, rate: Fraction, count: int, expected: list[int]):
    frames = read_video(make(tmp_path / "a.mp4", ramp(count), rate))
    assert frames.shape == (len(expected), 32, 48, 3)
    assert frames.dtype == torch.uint8
    got = numbers(frames)
    assert len(got) == len(expected)
    assert all(abs(a - b) <= (rate in (30, 60)) for a, b in zip(got, expected, strict=True)), got
    assert got == sorted(got)


def test_another_rate_can_be_asked_for(tmp_path: Path):
    path = make(tmp_path / "a.mp4", ramp(24))
    assert numbers(read_video(path, fps=8)) == list(range(0, 24, 3))


def test_a_jittering_clock_loses_no_frame(tmp_path: Path):
    times = [n / 24 + (0.012 if n % 2 else 0) for n in range(24)]
    assert numbers(read_video(make(tmp_path / "a.mkv", ramp(24), times=times))) == list(range(24))


def test_a_slide_stays_until_the_next(tmp_path: Path):
    got = numbers(read_video(make(tmp_path / "a.mp4", ramp(3), times=[0, 2.0, 2.5])))
    assert got[:60] == [0] * 48 + [1] * 12
    assert set(got[60:]) == {2}


def test_resample_takes_the_nearest_frame_and_ends_with_the_last():
    frames = [TimedFrame(Fraction(n, 30), Fraction(1, 30), lambda: torch.empty(0)) for n in range(30)]
    out = list(resample(frames, Fraction(24)))
    assert len(out) == 24
    assert all(abs(frame.time - Fraction(k, 24)) <= Fraction(1, 60) for k, frame in enumerate(out))
    held = [TimedFrame(Fraction(0), Fraction(3), frames[0].load)]
    assert len(list(resample(held, Fraction(24), Fraction(1)))) == 48
    assert list(resample([], Fraction(24))) == []


# Parts


def test_start_and_seconds_with_and_without_seeking(tmp_path: Path):
    frames = ramp(55)
    for path in (
        make(tmp_path / "often.mp4", frames, gop=6),
        make(tmp_path / "once.mp4", frames),
    ):
        assert numbers(read_video(path, start=1, seconds=0.5)) == list(range(24, 36)), path
        assert numbers(read_video(path, seconds=0.25)) == list(range(6)), path
        assert numbers(read_video(path, start=2)) == list(range(48, 55)), path
        assert numbers(read_video(path, tail_seconds=0.5)) == list(range(43, 55)), path
        assert len(read_video(path, tail_seconds=60)) == len(read_video(path, seconds=60)) == 55


def test_a_bare_stream_without_times_index_or_duration(tmp_path: Path):
    path = make(tmp_path / "a.h264", ramp(55), 25, format="h264")
    assert probe(path).seconds is None
    assert numbers(read_video(path, fps=25)) == list(range(55))
    assert numbers(read_video(path, fps=25, start=1, seconds=0.4)) == list(range(25, 35))
    assert numbers(read_video(path, fps=25, tail_seconds=0.4)) == list(range(45, 55))


def test_a_clip_that_starts_late_starts_at_its_first_frame(tmp_path: Path):
    times = [100 + n / 24 for n in range(48)]
    for name in ("late.mkv", "late.ts", "late.mp4"):
        path = make(tmp_path / name, ramp(48), times=times, gop=12)
        assert numbers(read_video(path)) == list(range(48)), name
        assert numbers(read_video(path, start=1.5, seconds=0.25)) == list(range(36, 42)), name
        assert numbers(read_video(path, tail_seconds=0.25)) == list(range(42, 48)), name


def test_the_tail_of_a_long_clip_is_found_by_seeking(tmp_path: Path):
    path = make(tmp_path / "a.mp4", ramp(50) * 10, gop=24)
    calls: list[tuple[int, int | None]] = []
    tail = read_video(path, tail_seconds=1, progress=lambda *call: calls.append(call))
    assert numbers(tail) == list(range(26, 50))
    assert len(calls) < 100  # of 500 frames
    assert calls[-1] == (24, 24)


@pytest.mark.parametrize("rate", [24, 30])
def test_pieces_are_the_whole_clip_in_order(tmp_path: Path, rate: int):
    path = make(tmp_path / "a.mp4", ramp(50) * 3, rate)
    pieces = list(read_pieces(path, 24, 20, 30, "pad"))
    assert [len(piece) for piece in pieces] == ([48, 48, 48, 6] if rate == 24 else [48, 48, 24])
    assert torch.equal(torch.cat(pieces), read_video(path, 24, height=20, width=30, mode="pad"))


def test_the_first_piece_is_there_before_the_last_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loaded: list[object] = []
    load = VideoFile._load
    monkeypatch.setattr(VideoFile, "_load", lambda clip, frame: loaded.append(frame) or load(clip, frame))
    pieces = read_pieces(make(tmp_path / "a.mp4", ramp(50) * 3), 24, 32, 48)
    assert len(next(pieces)) == len(loaded) == 48
    pieces.close()


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_sound_is_ignored_even_when_it_lasts_longer(tmp_path: Path, name: str):
    with av.open(str(tmp_path / name), "w") as out:
        video = out.add_stream("libx264", rate=24, options={"crf": "1"})
        video.height, video.width, video.pix_fmt = 32, 48, "yuv420p"
        audio = out.add_stream("aac", rate=16000)
        for picture in ramp(24):
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(video.encode(None))
        for index in range(60):
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            sound.sample_rate, sound.pts = 16000, 1024 * index
            out.mux(audio.encode(sound))
        out.mux(audio.encode(None))
    assert numbers(read_video(tmp_path / name)) == list(range(24))
    assert numbers(read_video(tmp_path / name, tail_seconds=0.25)) == list(range(18, 24))


# Shapes and pixels


@pytest.mark.parametrize("name", MATRICES)
def test_phone_clips_are_turned_upright(tmp_path: Path, name: str):
    picture = grey(0)
    picture[:16, :24] = 255  # top left
    path = make(tmp_path / "a.mp4", [picture] * 3)
    turn(path, MATRICES[name])
    frame = read_video(path)[0].float()
    height, width = (48, 32) if name in ("90", "270") else (32, 48)
    assert frame.shape == (height, width, 3)
    info = probe(path)
    assert (info.height, info.width) == (height, width)
    bright = {"upright": (0, 0), "90": (0, 1), "180": (1, 1), "270": (1, 0), "mirror": (0, 1)}[name]
    for row in (0, 1):
        for column in (0, 1):
            part = frame[row * height // 2 :][: height // 2, column * width // 2 :][:, : width // 2]
            assert part.mean() > 240 if (row, column) == bright else part.mean() < 15


def test_frames_are_fitted_as_shown(tmp_path: Path):
    picture = grey(200)
    path = make(tmp_path / "a.mp4", [picture] * 3)
    turn(path, MATRICES["90"])
    assert read_video(path, height=32, width=16).shape == (3, 32, 16, 3)
    padded = read_video(path, height=48, width=48, mode="pad").float()
    assert padded[:, :, 10:38].mean() > 190
    assert padded[:, :, :7].mean() < 5


def test_pixels_that_are_not_square(tmp_path: Path):
    path = make(tmp_path / "a.mkv", ramp(3), aspect=Fraction(4, 3))
    assert probe(path).width == 64
    assert read_video(path).shape == (3, 32, 64, 3)


@pytest.mark.parametrize(
    ("codec", "pix_fmt"),
    [("prores_ks", "yuv422p10le"), ("png", "gray"), ("png", "rgb24"), ("png", "rgb48be"), ("mjpeg", "yuvj420p")],
)
def test_pixel_formats_and_odd_sizes(tmp_path: Path, codec: str, pix_fmt: str):
    frames = read_video(make(tmp_path / "a.mov", [grey(100, 33, 47)] * 3, codec=codec, pix_fmt=pix_fmt))
    assert frames.shape == (3, 33, 47, 3)
    assert (frames.int() - 100).abs().max() <= 2


def test_colours_of_hd_without_a_label(tmp_path: Path):
    """Unlabelled HD is BT.709: pure green, whose luma differs most from BT.601, must come back pure."""
    green = np.zeros((720, 64, 3), np.uint8)
    green[..., 1] = 255
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=24)
        stream.height, stream.width, stream.pix_fmt = 720, 64, "yuv444p"
        frame = av.VideoFrame.from_ndarray(green, format="rgb24")
        frame = frame.reformat(format="yuv444p", dst_colorspace="ITU709", dst_color_range="MPEG")
        frame.pts = 0
        frame.colorspace = 2
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    assert (read_video(path)[0, 0, 0].int() - torch.tensor([0, 255, 0])).abs().max() <= 3


def test_transparent_video_is_laid_over_white(tmp_path: Path):
    picture = np.zeros((32, 48, 4), np.uint8)
    picture[:, 24:] = (0, 0, 255, 255)
    frame = read_video(make(tmp_path / "a.mov", [picture] * 2, codec="png", pix_fmt="rgba"))[0]
    assert frame[16, 4].tolist() == [255, 255, 255]
    assert frame[16, 40].tolist() == [0, 0, 255]


@pytest.mark.skipif(not hasattr(av.VideoFrame, "color_trc"), reason="this PyAV does not tell HDR videos apart")
def test_hdr_is_warned_of(tmp_path: Path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=24, options={"color_trc": "smpte2084", "colorspace": "bt2020nc"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(grey(100), format="rgb24")))
        out.mux(stream.encode(None))
    with pytest.warns(UserWarning, match=r"a\.mp4' is an HDR video"):
        assert read_video(path).shape == (1, 32, 48, 3)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_animations(tmp_path: Path, name: str):
    pictures = [Image.fromarray(frame) for frame in (grey(40), grey(120), grey(200))]
    lossless = {"lossless": True} if name == "a.webp" else {}
    pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], duration=[250, 500, 250], **lossless)
    frames = read_video(tmp_path / name)
    assert [int(level) for level in frames[:, 0, 0, 0]] == [40] * 6 + [120] * 12 + [200] * 6
    info = probe(tmp_path / name)
    assert (info.kind, info.frames, info.seconds, info.fps) == ("video", 3, 1.0, 3)
    assert len(read_video(tmp_path / name, tail_seconds=0.25)) == 6


def test_probe_of_a_video(tmp_path: Path):
    info = probe(make(tmp_path / "a.mp4", ramp(45), 30))
    assert (info.kind, info.width, info.height, info.fps, info.frames) == ("video", 48, 32, 30, 45)
    assert info.seconds == pytest.approx(1.5)


# Progress and cancelling


def test_progress_may_cancel(tmp_path: Path):
    class Cancel(Exception):
        pass

    def progress(done: int, total: int) -> None:
        assert total == 0  # nobody knows how many there will be
        if done == 5:
            raise Cancel

    with pytest.raises(Cancel):
        read_video(make(tmp_path / "a.mp4", ramp(24)), progress=progress)


# Bad input


def test_bad_arguments_name_the_value(tmp_path: Path):
    path = make(tmp_path / "a.mp4", ramp(24))
    for arguments, message in (
        ({"fps": 0}, "fps is 0"),
        ({"seconds": -1}, "seconds is -1"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"tail_seconds": 0}, "tail_seconds is 0"),
        ({"start": -2}, "start is -2"),
        ({"start": 1, "tail_seconds": 1}, "leave out"),
        ({"height": 32}, "both width and height"),
        ({"height": 0, "width": 32}, "32x0"),
        ({"mode": "zoom"}, "'zoom'"),
        ({"start": 7.5}, r"7\.5 s is beyond the end of .*a\.mp4.* lasts 1\.00 s"),
        ({"start": 1}, "beyond the end"),
    ):
        with pytest.raises(MagiError, match=message):
            read_video(path, **arguments)


def test_files_that_are_no_videos(tmp_path: Path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("I am a text file.\n" * 50)
    (tmp_path / "text.txt").write_text("I am a text file.\n" * 50)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "still.png")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(8000))
    make(tmp_path / "whole.mp4", ramp(24))
    (tmp_path / "headless.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:600])
    for name, message in (
        ("absent.mp4", "There is no file"),
        ("empty.mp4", "is empty"),
        ("text.mp4", "not a video but a text file"),
        ("text.txt", "not a video but a text file"),
        ("list.m3u8", "not a video but a text file"),
        ("still.png", "still picture"),
        ("sound.wav", "not a video, or of a kind that is not read"),
        ("headless.mp4", "cut off"),
        (".", "is a folder"),
    ):
        with pytest.raises(MagiError, match=message):
            read_video(tmp_path / name)
    for name in ("text.mp4", "sound.wav", "absent.mp4"):
        with pytest.raises(MagiError):
            probe(tmp_path / name)


def noise(count: int) -> list[np.ndarray]:
    """Frames that need many bytes, so that damage hits pictures and not the index."""
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (32, 48, 3), dtype=np.uint8) for _ in range(count)]


def test_a_video_cut_off(tmp_path: Path):
    whole = make(tmp_path / "whole.mp4", noise(72), gop=1, options={"movflags": "faststart"})
    data = whole.read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(data[: len(data) // 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for arguments in ({}, {"tail_seconds": 0.5}, {"seconds": 2.5}, {"start": 2}):
            with pytest.raises(MagiError, match=r"cut\.mp4' is damaged or cut off: it should last 3\.00 s, but"):
                read_video(cut, **arguments)
        assert torch.equal(read_video(cut, seconds=1), read_video(whole, seconds=1))
        with pytest.raises(MagiError, match=r"cut\.mp4' is damaged or cut off: it should last 3\.00 s, but"):
            list(read_pieces(cut, 24, 32, 48))


def test_a_video_damaged_in_the_middle(tmp_path: Path):
    whole = make(tmp_path / "whole.mov", noise(48), codec="png", pix_fmt="rgb24")
    data = bytearray(whole.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 400] = bytes(400)
    (tmp_path / "hole.mov").write_bytes(data)
    with pytest.warns(UserWarning, match="is damaged in"):
        frames = read_video(tmp_path / "hole.mov")
    assert frames.shape[0] == 48
    with pytest.warns(UserWarning, match="is damaged in"):
        assert torch.equal(torch.cat(list(read_pieces(tmp_path / "hole.mov", 24, 32, 48))), frames)
    same = (frames == read_video(whole)).flatten(1).all(1)
    assert 44 <= same.sum() < 48
    assert same[0]
    assert same[-1]

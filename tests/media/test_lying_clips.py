"""Clips that are not what they say: their kind, their times, their sizes, and the disk that they lie on."""

import errno
import io
import time
import tracemalloc
import warnings
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from magi.errors import MagiError
from magi.media import containers, frames, video_decoder
from magi.media.clip_clock import LONGEST, ClipClock
from magi.media.image import read_image
from magi.media.sound_reader import open_sound, read_sound
from magi.media.video_reader import probe, read_pieces, read_video
from magi.media.video_writer import read_metadata
from tests.support.sound_clips import heard, tone, write_clip

READERS: tuple[Callable[[Path], object], ...] = (probe, read_video, read_image, open_sound, read_metadata)


def write(path: Path, stamps: list[int], base: Fraction = Fraction(1, 1000), gop: int = 250, **options: str) -> Path:
    """Writes a frame for each time stamp; its level tells its number: see `numbers`."""
    with av.open(str(path), "w", options=options) as out:
        stream = out.add_stream("libx264", rate=24, options={"crf": "1", "preset": "ultrafast", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.gop_size = gop
        packets = []
        for index in range(len(stamps)):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 20 + 4 * (index % 55), np.uint8), format="rgb24")
            frame.pts = index
            packets += stream.encode(frame)
        packets += stream.encode(None)
        for packet, stamp in zip(packets, stamps, strict=True):
            packet.pts = packet.dts = stamp
            packet.time_base = base
            out.mux(packet)
    return path


def numbers(pictures: torch.Tensor) -> list[int]:
    return [round((level - 20) / 4) for level in pictures.float().mean((1, 2, 3)).tolist()]


# Kinds


HLS = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n"
CONCAT = "ffconcat version 1.0\nfile '{secret}'\n"
SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=No\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
DASH = (
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" profiles="dash"><BaseURL>{secret}</BaseURL></MPD>'
)
SUBTITLES = "1\n00:00:00,000 --> 00:00:02,000\nHello\n"


@pytest.mark.parametrize("spoil", ["", "\x01", "\x7f\x00"])
@pytest.mark.parametrize("text", [HLS, CONCAT, SDP, DASH, SUBTITLES], ids=["hls", "concat", "sdp", "dash", "srt"])
@pytest.mark.parametrize("ending", ["mp4", "m3u8", "png"])
def test_what_leads_to_other_files_is_not_followed(tmp_path: Path, text: str, ending: str, spoil: str):
    write(tmp_path / "secret.ts", list(range(0, 2000, 40)))
    file = tmp_path / f"list.{ending}"
    file.write_text(text.format(secret="secret.ts") + spoil, encoding="utf-8")
    for read in READERS:
        with pytest.raises(MagiError, match=r"list\."):
            read(file)


def test_a_name_with_a_number_does_not_stand_for_others(tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a1.jpg")
    (tmp_path / "a%d.jpg").write_bytes(b"\x01no picture")
    for read in READERS:
        with pytest.raises(MagiError, match=r"a%d\.jpg"):
            read(tmp_path / "a%d.jpg")


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        *(
            ("a.mp4", "libx264"),
            ("a.mov", "prores_ks"),
            ("a.mkv", "ffv1"),
            ("a.webm", "libvpx-vp9"),
            ("a.avi", "mpeg4"),
        ),
        *(("a.mpg", "mpeg2video"), ("a.ts", "libx264"), ("a.flv", "flv"), ("a.wmv", "wmv2"), ("a.ogv", "libtheora")),
        *(("a.mxf", "mpeg2video"), ("a.nut", "ffv1"), ("a.y4m", "wrapped_avframe"), ("a.h264", "libx264")),
        *(("a.m2v", "mpeg2video"), ("a.ivf", "libvpx"), ("a.3gp", "mpeg4"), ("a.m4v", "mpeg4")),
    ],
)
def test_what_people_have_is_read(tmp_path: Path, name: str, codec: str):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    with av.open(str(tmp_path / name), "w") as out:
        stream = out.add_stream(codec, rate=25)
        stream.height, stream.width = 64, 96
        stream.pix_fmt = {"prores_ks": "yuv422p10le", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        for index in range(25):
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 100, np.uint8), format="rgb24")
            frame = frame.reformat(format=stream.pix_fmt)
            frame.pts = index
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    pictures = read_video(tmp_path / name, fps=25)
    assert 23 <= len(pictures) <= 26
    assert (pictures.float().mean() - 100).abs() < 6


# Times


@pytest.mark.parametrize(
    ("name", "seconds"), [("a.mkv", 1000), ("a.mkv", 1_000_000), ("a.mp4", 40_000), ("a.ts", 40_000)]
)
def test_a_clock_that_jumps_is_set_right(tmp_path: Path, name: str, seconds: int):
    stamps = [round(1000 * n / 24) + (1000 * seconds if n >= 24 else 0) for n in range(48)]
    path = write(tmp_path / name, stamps, gop=12)
    began = time.monotonic()
    with pytest.warns(UserWarning, match="clock of .* jumps ahead by .* s: that time is left out"):
        assert numbers(read_video(path)) == list(range(48))
    assert len(read_video(path, tail_seconds=0.5)) == 12
    assert numbers(read_video(path, tail_seconds=0.5)) == list(range(36, 48))
    assert numbers(read_video(path, seconds=0.25)) == list(range(6))
    assert len(torch.cat(list(read_pieces(path, 24, 32, 48)))) == 48
    assert time.monotonic() - began < 20


def test_a_long_pause_is_no_jump_and_can_be_cancelled(tmp_path: Path):
    class Cancel(Exception):
        pass

    path = write(tmp_path / "a.mkv", [0, 42, 120_000, 120_042])
    assert len(read_video(path, tail_seconds=200)) == pytest.approx(120 * 24, abs=3)
    calls: list[int] = []

    def progress(done: int, _: int) -> None:
        calls.append(done)
        if len(calls) == 50:
            raise Cancel

    with pytest.raises(Cancel):
        read_video(path, tail_seconds=200, progress=progress)


def test_a_rate_or_duration_that_lies_is_no_hang(tmp_path: Path):
    clock = ClipClock(Fraction(1, 1_000_000))
    assert [clock.time(None) for _ in range(3)] == [0, Fraction(1, 24), Fraction(2, 24)]
    assert clock.duration(Fraction(10**9)) == Fraction(1, 24)
    assert clock.duration(LONGEST) == LONGEST
    picture = Image.new("RGB", (8, 8))
    others = [Image.new("RGB", (8, 8), (n, n, n)) for n in (50, 100)]
    picture.save(tmp_path / "a.webp", save_all=True, append_images=others, duration=16_000_000)
    assert probe(tmp_path / "a.webp").seconds == 3 * LONGEST


@pytest.mark.parametrize("same", [2, 3, 5])
def test_equal_times_are_no_slow_motion(tmp_path: Path, same: int):
    path = write(tmp_path / "a.mkv", [round(1000 * (n // same) / 24) for n in range(48 * same)])
    assert len(read_video(path)) == pytest.approx(48, abs=1)
    assert len(read_video(path, seconds=1)) == 24


def test_frames_that_all_have_one_time_follow_one_another(tmp_path: Path):
    assert len(read_video(write(tmp_path / "a.mkv", [0] * 48))) == 48


def test_a_clock_that_stands_still_for_a_while_goes_on(tmp_path: Path):
    stamps = [round(1000 * (n if n < 24 else max(24, n - 8)) / 24) for n in range(72)]
    assert len(read_video(write(tmp_path / "a.mkv", stamps))) == pytest.approx(64, abs=1)


def test_joined_recordings_follow_one_another():
    clock = ClipClock(Fraction(24))
    times = [clock.time(Fraction(n % 240, 24)) for n in range(720)]
    assert times == [Fraction(n, 24) for n in range(720)]
    assert clock.left_out == 0


def test_frames_out_of_order_do_not_make_a_clip_longer():
    clock = ClipClock(Fraction(24))
    order = [n + (1 if n % 3 == 1 else -1 if n % 3 == 2 else 0) for n in range(240)]
    times = [clock.time(Fraction(n, 24)) for n in order]
    assert times == sorted(times)
    assert times[-1] <= Fraction(241, 24)


def test_sound_and_picture_jump_together(tmp_path: Path):
    pieces = {48000: 500_001.0}
    path = write_clip(tmp_path / "a.mkv", tone(2, begin=1.5, end=1.75), pieces=pieces)
    began = time.monotonic()
    waveform = read_sound(path, Fraction(2)).waveform
    assert heard(waveform, 48000) == pytest.approx((1.5, 1.75), abs=0.01)
    assert time.monotonic() - began < 5


# Sizes


def test_enormous_pictures_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Image.new("1", (1000, 1000)).save(tmp_path / "a.png")
    pages = [Image.new("1", (1000, 1000), n) for n in (0, 1)]
    pages[0].save(tmp_path / "a.gif", save_all=True, append_images=pages[1:])
    monkeypatch.setattr(frames, "MAX_PIXELS", 999_999)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("it was decoded"))
    for name, readers in (("a.png", (read_image, probe)), ("a.gif", (read_image, probe, read_video))):
        for read in readers:
            with pytest.raises(MagiError, match="1000x1000 are 1 million pixels, and at most 1 million"):
                read(tmp_path / name)


def test_large_photos_are_read_without_alarm(tmp_path: Path):
    Image.new("1", (10_000, 9000)).save(tmp_path / "a.png")  # 90 million, where PIL warns of an attack
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert probe(tmp_path / "a.png").width == 10_000


def test_a_picture_that_memory_cannot_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Image.new("RGB", (1000, 1000)).save(tmp_path / "a.png")
    monkeypatch.setattr("magi.media.image.free_host_memory", lambda: 7_999_999)
    with pytest.raises(MagiError, match=r"1000x1000 takes 0\.0 GB.*Scale it down"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "P"])
def test_a_picture_is_converted_in_strips(tmp_path: Path, mode: str):
    """Numpy and torch of a whole picture at once took 50 times as many bytes as there are pixels."""
    extra = {} if mode == "RGBA" else {"transparency": 1}
    Image.new(mode, (2000, 3000)).save(tmp_path / "a.png", **extra)
    tracemalloc.start()
    try:
        assert read_image(tmp_path / "a.png").shape == (1, 3000, 2000, 3)
        assert tracemalloc.get_traced_memory()[1] < 6 * 2000 * 3000
    finally:
        tracemalloc.stop()


def test_enormous_frames_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "a.mp4", [0, 42])
    monkeypatch.setattr(frames, "MAX_PIXELS", 48 * 32 - 1)
    with pytest.raises(MagiError, match="48x32 are 0 million pixels"):
        read_video(path)
    monkeypatch.setattr(video_decoder, "check_pixels", lambda *_: None)
    monkeypatch.setattr(video_decoder, "MAX_PIXELS", 48 * 32 - 1)  # of a container that names a smaller size
    with pytest.raises(MagiError, match="without a single readable frame"):
        read_video(path)


def test_an_aspect_that_makes_frames_enormous_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        stream = out.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(15, 2)
        out.mux(stream.encode(av.VideoFrame(48, 32, "yuv420p")))
        out.mux(stream.encode(None))
    assert probe(tmp_path / "a.mkv").width == 360
    monkeypatch.setattr(frames, "MAX_PIXELS", 48 * 32)
    with pytest.raises(MagiError, match="360x32"):
        probe(tmp_path / "a.mkv")


# Disks


class Failing(io.FileIO):
    """A file on a disk that fails after so many bytes."""

    good, number = 0, errno.EIO

    def readinto(self, buffer) -> int:
        if self.tell() >= self.good:
            raise OSError(self.number, "Input/output error")
        return super().readinto(memoryview(buffer)[: self.good - self.tell()])


@pytest.mark.parametrize("good", [0, 1, 300])
@pytest.mark.parametrize("name", ["a.png", "a.gif", "a.jpg"])
def test_pictures_on_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, good: int):
    noise = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (64, 64, 3), np.uint8)) for n in range(3)]
    noise[0].save(tmp_path / name, **({"save_all": True, "append_images": noise[1:]} if name == "a.gif" else {}))
    open_ = io.open

    def failing(file, mode="r", *args, **rest):
        if Path(str(file)).name != name or "b" not in mode:
            return open_(file, mode, *args, **rest)
        raw = Failing(file)
        raw.good = good
        return io.BufferedReader(raw, 1)

    monkeypatch.setattr("builtins.open", failing)
    monkeypatch.setattr("io.open", failing)
    for read in READERS[:3]:
        with pytest.raises(MagiError, match=r"a\.(png|gif|jpg)"):
            read(tmp_path / name)


@pytest.mark.parametrize("number", [errno.EIO, errno.EAGAIN, errno.EINVAL, errno.ENOMEM])
@pytest.mark.parametrize("at", ["open", 0, 5])
def test_clips_on_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str | int, number: int):
    path = write_clip(tmp_path / "a.mkv", tone(2))
    opened = containers.open_container

    class Spoilt:
        def __init__(self, container) -> None:
            self.container = container

        def __getattr__(self, name: str):
            return getattr(self.container, name)

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None:
            self.container.close()

        def demux(self, stream):
            for count, packet in enumerate(self.container.demux(stream)):
                if count == at:
                    raise OSError(number, "failed")
                yield packet

    def failing(file):
        if at == "open":
            raise OSError(number, "failed")
        return Spoilt(opened(file))

    for module in ("video_decoder", "sound_reader", "video_writer"):
        monkeypatch.setattr(f"magi.media.{module}.open_container", failing)
    with pytest.raises(MagiError, match=r"a\.mkv"):
        read_video(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for read in (probe, lambda file: read_sound(file, Fraction(2)), read_metadata):
            with suppress(MagiError):  # nothing else
                read(path)

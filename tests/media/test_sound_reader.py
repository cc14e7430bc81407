import warnings
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from PIL import Image

from magi.errors import MagiError
from magi.media.sound_reader import open_sound, read_sound
from magi.media.video_reader import probe, read_video
from tests.support.sound_clips import heard, packets, spoil, tone, write_clip

TWO = Fraction(2)


# Exact


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_the_sound_is_that_of_the_file(tmp_path: Path, rate: int, channels: int):
    written = tone(2, rate, channels=channels)
    sound = read_sound(write_clip(tmp_path / "a.mov", written, rate), TWO)
    assert (sound.rate, sound.waveform.dtype) == (rate, torch.float32)
    assert torch.equal(sound.waveform, written)


@pytest.mark.parametrize("frames", [1, 7, 24, 47, 48, 60])
def test_it_is_as_long_as_the_frames(tmp_path: Path, frames: int):
    written = tone(2, 44100, end=2)
    waveform = read_sound(write_clip(tmp_path / "a.mov", written, 44100), Fraction(frames, 24)).waveform
    assert waveform.shape == (2, round(frames / 24 * 44100))
    kept = min(waveform.shape[1], written.shape[1])
    assert torch.equal(waveform[:, :kept], written[:, :kept])
    assert not waveform[:, kept:].any()


@pytest.mark.parametrize("fps", [12, 25, 30, 60])
def test_other_frame_rates(tmp_path: Path, fps: int):
    path = write_clip(tmp_path / "a.mov", tone(2), frames=2 * fps, fps=fps)
    frames = len(read_video(path))
    assert frames == 48
    assert torch.equal(read_sound(path, Fraction(frames, 24)).waveform, tone(2))


def test_sound_that_starts_late(tmp_path: Path):
    waveform = read_sound(write_clip(tmp_path / "a.mov", tone(1.5), sound_at=0.5), TWO).waveform
    assert not waveform[:, :24000].any()
    assert torch.equal(waveform[:, 24000:], tone(1.5))


@pytest.mark.parametrize("name", ["a.mov", "a.mkv"])
def test_a_picture_that_starts_late(tmp_path: Path, name: str):
    waveform = read_sound(write_clip(tmp_path / name, tone(3), picture_at=0.5), TWO).waveform
    assert torch.equal(waveform, tone(3)[:, 24000:120000])


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "aac"), ("a.mkv", "aac"), ("a.ts", "aac"), ("a.mp4", "mp3"), ("a.mkv", "ac3")]
)
@pytest.mark.parametrize("late", [0, 0.4])
def test_codecs_with_a_delay_are_in_step(tmp_path: Path, name: str, codec: str, late: float):
    written = tone(2)
    try:
        path = write_clip(tmp_path / name, written, codec=codec, sound_at=late)
    except ValueError:
        pytest.skip(f"this PyAV cannot write {codec}")
    begin, end = heard(read_sound(path, TWO).waveform, 48000)
    assert begin == pytest.approx(0.5 + late, abs=0.003)
    assert end == pytest.approx(1.0 + late, abs=0.003)


@pytest.mark.parametrize(("channels", "rate", "kept"), [(4, 48000, (2, 48000)), (2, 10000, (2, 48000))])
def test_what_aac_does_not_know_is_brought_to_what_it_does(
    tmp_path: Path, channels: int, rate: int, kept: tuple[int, int]
):
    sound = read_sound(write_clip(tmp_path / "a.mov", tone(2, rate, channels=channels), rate), TWO)
    assert (len(sound.waveform), sound.rate, sound.waveform.shape[1]) == (*kept, 96000)
    assert heard(sound.waveform, sound.rate) == pytest.approx((0.5, 1.0), abs=0.002)


# Nothing to hear


def test_no_sound(tmp_path: Path):
    assert read_sound(write_clip(tmp_path / "a.mp4", None), TWO) is None
    assert not probe(tmp_path / "a.mp4").sound
    assert probe(write_clip(tmp_path / "b.mov", tone(1))).sound
    pictures = [Image.new("L", (8, 8), level) for level in (0, 255)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:])
    assert read_sound(tmp_path / "a.gif", TWO) is None
    with pytest.raises(MagiError, match="There is no file"):
        open_sound(tmp_path / "absent.mp4")


# Times


def test_a_gap_is_silence(tmp_path: Path):
    path = write_clip(tmp_path / "a.mkv", tone(1.5), pieces={24576: 1.012})
    waveform = read_sound(path, TWO).waveform
    assert torch.equal(waveform[:, :24576], tone(1.5)[:, :24576])
    assert not waveform[:, 24576:48576].any()
    assert torch.equal(waveform[:, 48576:96000], tone(1.5)[:, 24576:72000])


def test_a_clock_that_jitters_is_not_heard(tmp_path: Path):
    path = write_clip(tmp_path / "a.mkv", tone(2), pieces={24576: 0.532, 49152: 1.034, 73728: 1.55})
    assert torch.equal(read_sound(path, TWO).waveform, tone(2))


def test_a_clock_that_jumps_back_is_no_clock(tmp_path: Path):
    path = write_clip(tmp_path / "a.ts", tone(2), codec="aac")
    path.write_bytes(2 * path.read_bytes())
    waveform = read_sound(path, 2 * TWO).waveform
    assert heard(waveform[:, :96000], 48000) == pytest.approx((0.5, 1), abs=0.003)
    assert heard(waveform[:, 96000:], 48000) == pytest.approx((0.5, 1), abs=0.1)


# Damage


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_damaged_place_is_silent_and_said(tmp_path: Path, name: str):
    whole = write_clip(tmp_path / name, tone(2, end=2), codec="aac")
    before = read_sound(whole, TWO).waveform
    spoil(whole, 40)
    with pytest.warns(UserWarning, match=rf"The sound of '.*{name}' is damaged: silence stands in") as caught:
        after = read_sound(whole, TWO).waveform
    assert len(caught) == 1
    assert after.shape == before.shape
    assert torch.equal(after[:, : 38 * 1024], before[:, : 38 * 1024])
    assert not torch.equal(after, before)
    rest = before[:, 43 * 1024 : 90 * 1024]
    clock = 48 if name == "a.mkv" else 0  # the samples of its milliseconds
    places = range(43 * 1024 - clock, 43 * 1024 + clock + 1)
    assert any(torch.equal(after[:, place : place + rest.shape[1]], rest) for place in places)
    assert len(read_video(whole)) == 48


def test_sound_that_is_all_damaged_is_left_out(tmp_path: Path):
    path = write_clip(tmp_path / "a.mp4", tone(0.2), codec="aac")
    spoil(path, *range(len(packets(path, "audio"))))
    with pytest.warns(UserWarning, match=r"The sound of '.*a\.mp4' cannot be read, and is left out"):
        assert read_sound(path, TWO) is None


def test_sound_of_an_unknown_kind_is_left_out(tmp_path: Path):
    path = write_clip(tmp_path / "a.mov", tone(1))
    path.write_bytes(path.read_bytes().replace(b"sowt", b"zzzz"))
    with pytest.warns(UserWarning, match="cannot be read, and is left out"):
        assert read_sound(path, TWO) is None
    assert len(read_video(path)) == 48


def test_sound_that_is_cut_off_is_said(tmp_path: Path):
    path = write_clip(tmp_path / "a.mov", tone(4, end=4), frames=24, movflags="faststart")
    _, place, _ = packets(path, "audio")[-60]
    path.write_bytes(path.read_bytes()[:place])
    assert len(read_video(path)) == 24
    with pytest.warns(UserWarning, match=r"a\.mov' is damaged: silence stands in"):
        waveform = read_sound(path, 2 * TWO).waveform
    assert waveform.shape == (2, 4 * 48000)
    assert torch.equal(waveform[:, : 2 * 48000], tone(2, end=2))
    assert not waveform[:, -48000:].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is cut off is not asked for
        assert torch.equal(read_sound(path, TWO).waveform, tone(2, end=2))


def test_the_header_of_a_sound_that_ends_early_may_say_so(tmp_path: Path):
    path = write_clip(tmp_path / "a.mov", tone(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(read_sound(path, TWO).waveform[:, :48000], tone(1))


# Memory, progress and cancelling


def test_long_sound_comes_in_small_blocks(tmp_path: Path):
    path = write_clip(tmp_path / "a.mov", tone(1, 8000), 8000, sound_at=60, frames=1)
    track = open_sound(path)
    blocks = list(track.blocks(Fraction(100)))
    assert max(block.shape[1] for block in blocks) <= 65536
    waveform = torch.cat(blocks, 1)
    assert waveform.shape == (2, 800_000)
    assert torch.equal(waveform[:, 480_000:488_000], tone(1, 8000))


def test_progress_may_cancel(tmp_path: Path):
    class Cancel(Exception):
        pass

    path, calls = write_clip(tmp_path / "a.mov", tone(2)), []
    read_sound(path, TWO, lambda done, total: calls.append((done, total)))
    assert calls[-1] == (96000, 96000)
    assert calls == sorted(calls)

    def progress(done: int, total: int) -> None:
        raise Cancel

    with pytest.raises(Cancel):
        read_sound(path, TWO, progress)

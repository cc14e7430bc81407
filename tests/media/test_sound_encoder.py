from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch

from magi.errors import MagiError
from magi.media import sound_encoder
from magi.media.sound_encoder import encode_sound
from magi.media.sound_reader import read_sound
from magi.media.video_reader import probe
from magi.media.video_writer import VideoWriter, read_metadata
from tests.support.sound_clips import HEIGHT, LAYOUTS, WIDTH, heard, packets, tone

FRAMES = torch.zeros(48, HEIGHT, WIDTH, 3, dtype=torch.uint8)


def write(path: Path, sound: bytes | None, **settings) -> Path:
    with VideoWriter(path, HEIGHT, WIDTH, **settings) as writer:
        writer.write(FRAMES[:20])
        writer.sound = sound
        writer.write(FRAMES[20:])
        assert not probe(writer.partial_path).sound
    return path


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("rate", [7350, 16000, 44100, 48000, 96000])
def test_the_finished_video_has_the_sound(tmp_path: Path, rate: int, channels: int):
    written = tone(2, rate, channels=channels)
    path = write(tmp_path / "a.mp4", encode_sound(written.split(5000, 1), rate, channels))
    with av.open(str(path)) as file:
        picture, sound = file.streams.video[0], file.streams.audio[0]
        assert (sound.codec_context.name, sound.rate, sound.layout.name) == ("aac", rate, LAYOUTS[channels])
        assert (picture.start_time, sound.start_time) == (0, 0)
        assert abs(sound.duration * sound.time_base - 2) <= Fraction(1024, rate)
        assert picture.duration * picture.time_base == 2
    read = read_sound(path, Fraction(2))
    assert heard(read.waveform, rate) == pytest.approx((0.5, 1.0), abs=0.005)
    error = (read.waveform - written)[:, int(0.6 * rate) : int(0.9 * rate)].abs().mean(1)
    assert all(error[n] < 0.05 for n in range(channels) if n != 3), "the fourth is for the deepest tones only"


def test_the_picture_is_the_same_with_and_without_sound(tmp_path: Path):
    tags = {"title": "A cat", "workflow": "{}"}
    silent = write(tmp_path / "a.mp4", None, metadata=tags)
    loud = write(tmp_path / "b.mp4", encode_sound([tone(2)], 48000, 2), metadata=tags)
    assert read_metadata(loud) == read_metadata(silent) == tags
    pictures = [[(time, content) for time, _, content in packets(path, "video")] for path in (silent, loud)]
    assert pictures[0] == pictures[1]
    assert (probe(silent).sound, probe(loud).sound) == (False, True)
    assert write(tmp_path / "c.mp4", encode_sound([tone(2)], 48000, 2), metadata=tags).read_bytes() == loud.read_bytes()


def test_sound_and_picture_lie_side_by_side(tmp_path: Path):
    with VideoWriter(tmp_path / "a.mp4", HEIGHT, WIDTH) as writer:
        for _ in range(20):  # the muxer itself does this for ten seconds
            writer.write(FRAMES)
        writer.sound = encode_sound(tone(40, 16000, end=40).split(16000, 1), 16000, 2)
    places = {kind: [place for _, place, _ in packets(writer.path, kind)] for kind in ("audio", "video")}
    for part in (0.25, 0.5, 0.75):
        before = max(places["video"][: int(960 * part)])
        sound = sum(place < before for place in places["audio"]) / len(places["audio"])
        assert sound == pytest.approx(part, abs=0.05)


@pytest.mark.parametrize("blocks", [[torch.zeros(2, 1)], [torch.zeros(2, 0), torch.ones(2, 300), torch.zeros(2, 0)]])
def test_hardly_any_sound(tmp_path: Path, blocks: list[torch.Tensor]):
    path = write(tmp_path / "a.mp4", encode_sound(blocks, 48000, 2))
    assert probe(path).frames == 48


def test_without_an_aac_encoder_there_is_no_sound(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sound_encoder, "ENCODER", "absent")
    with pytest.warns(UserWarning, match="cannot encode AAC .*: the video is written without sound"):
        assert encode_sound([tone(1)], 48000, 2) is None


def test_a_full_disk_while_finishing_keeps_everything(tmp_path: Path, file_size_limit):
    sound = encode_sound([tone(60, end=60)], 48000, 2)
    with (
        file_size_limit(100_000),
        pytest.raises(MagiError, match=r"cannot be finished: .*first 48 frames are kept"),
    ):
        write(tmp_path / "a.mp4", sound)
    assert [path.name for path in tmp_path.iterdir()] == ["a.partial.mp4"]

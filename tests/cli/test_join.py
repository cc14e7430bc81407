"""`generate --join`: the continued clip in front of the result, with its sound, also when a run was interrupted."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch

from magi.cli import generate, write_video
from magi.cli.main import main
from magi.media import sound_encoder
from magi.media.sound_reader import read_sound
from magi.media.video_reader import probe, read_video
from magi.pipeline import resident_models
from tests.support.sound_clips import heard, packets, spoil, tone, write_clip

ARGUMENTS = ["--model", "embedded-photo", "--prompt", "A cat", "--size", "64x48", "--steps", "4", "--device", "cpu"]


@pytest.fixture
def magi(cache, tmp_path, monkeypatch, capsys):
    """(*arguments) -> (exit status, stderr) of a `generate` of a second that runs in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, seconds: int = 1) -> tuple[int, str]:
        capsys.readouterr()
        given = [*ARGUMENTS, "--seconds", str(seconds), *map(str, arguments), "--cache", str(cache)]
        return main(["generate", *given]), capsys.readouterr().err

    return run


@pytest.fixture
def interrupt(monkeypatch):
    """(phase, done) -> the next run is interrupted when a phase is so far, as by Ctrl-C."""
    show = write_video.Bars.__call__

    def at(name: str, done: int) -> None:
        def called(bars, phase):
            show(bars, phase)
            if phase.name == name and phase.done >= done:
                monkeypatch.setattr(write_video.Bars, "__call__", show)
                raise KeyboardInterrupt

        monkeypatch.setattr(write_video.Bars, "__call__", called)

    return at


def clip(**settings) -> Path:
    return write_clip(Path("clip.mov"), settings.pop("waveform", tone(2)), **settings)


# What is in the file


@pytest.mark.parametrize("fps", [24, 30])
def test_the_clip_is_in_front_with_its_sound_then_silence(magi, fps):
    video = clip(frames=2 * fps, fps=fps)
    status, stderr = magi("--video", video, "--join")
    assert status == 0
    assert "wrote" in stderr
    assert "(72 frames" in stderr
    info = probe("magi.mp4")
    assert (info.frames, info.fps, info.seconds, info.sound) == (72, 24, 3.0, True)
    frames = read_video("magi.mp4").float()
    assert (frames[:48] - read_video(video).float()).abs().mean() < 2
    assert frames[48:].mean((1, 2, 3)).std() < frames[:48].mean((1, 2, 3)).std() / 3, "the photo model stands still"
    sound = read_sound("magi.mp4", Fraction(3))
    assert (sound.rate, len(sound.waveform)) == (48000, 2)
    assert heard(sound.waveform, 48000) == pytest.approx((0.5, 1.0), abs=0.003)
    assert sound.waveform[:, 2 * 48000 + 2048 :].abs().max() < 1e-3
    assert 1024 * len(packets(Path("magi.mp4"), "audio")) == pytest.approx(3 * 48000, abs=2 * 1024)


def test_sound_that_outlasts_the_clip_ends_with_it(magi):
    magi("--video", clip(waveform=tone(3, end=3)), "--join")
    begin, end = heard(read_sound("magi.mp4", Fraction(3)).waveform, 48000)
    assert (begin, end) == pytest.approx((0.5, 2.0), abs=0.03)


@pytest.mark.parametrize("channels", [1, 6])
def test_channels_and_rate_are_kept(magi, channels):
    magi("--video", clip(waveform=tone(2, 44100, channels=channels), rate=44100), "--join")
    sound = read_sound("magi.mp4", Fraction(3))
    assert (sound.rate, len(sound.waveform)) == (44100, channels)
    assert heard(sound.waveform, 44100) == pytest.approx((0.5, 1.0), abs=0.003)


def test_a_clip_of_another_shape_is_fitted(magi):
    magi("--video", clip(), "--join", "--size", "96x48", "--fit", "pad")
    frames = read_video("magi.mp4").float()
    assert frames.shape == (72, 48, 96, 3)
    assert frames[40:48, :, 20:76].mean() > 150
    assert frames[:48, :, :14].mean() < 5


def test_without_the_option_it_is_the_continuation_alone(magi):
    status, stderr = magi("--video", clip())
    assert status == 0
    assert "note: clip.mov has sound, which is not continued. --join puts the clip in front, with its sound." in stderr
    assert (probe("magi.mp4").frames, probe("magi.mp4").sound) == (24, False)
    _, stderr = magi("--video", clip(waveform=None), "--overwrite")
    assert "sound" not in stderr


def test_a_clip_without_sound(magi):
    assert magi("--video", clip(waveform=None), "--join")[0] == 0
    assert (probe("magi.mp4").frames, probe("magi.mp4").sound) == (72, False)


def test_the_demo_joins_too(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--model", "embedded", "--prompt", "A blue square grows.", "--video", str(clip()), "--join"]
    assert main(["demo", *given, "--seconds", "1", "--steps", "8", "--device", "cpu", "--cache", str(cache)]) == 0
    info = probe("demo.mp4")
    assert (info.width, info.height, info.frames, info.sound) == (256, 256, 72, True)


# What can go wrong


@pytest.mark.parametrize("command", [["generate"], ["demo"], ["generate", "--image", "cat.jpg"]], ids=str)
def test_there_must_be_something_to_join(command, magi, monkeypatch, capsys, cache):
    monkeypatch.setattr(resident_models, "load_transformer", lambda *_, **__: pytest.fail("a model is loaded"))
    monkeypatch.setattr(generate, "_pipeline", lambda *_: pytest.fail("files are looked at"))
    capsys.readouterr()
    assert main([*command, "--prompt", "A cat", "--join", "--cache", str(cache)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --join puts the video that is continued in front, and none is given.")
    assert not list(Path().iterdir())


def test_damaged_sound_is_a_note(magi):
    video = write_clip(Path("clip.mp4"), tone(2, end=2), codec="aac")
    spoil(video, 40)
    status, stderr = magi("--video", video, "--join")
    assert status == 0
    assert stderr.count("clip.mp4' is damaged: silence stands in for what cannot be read.") == 1
    assert heard(read_sound("magi.mp4", Fraction(3)).waveform, 48000) == pytest.approx((0.5, 2.0), abs=0.03)


def test_without_an_aac_encoder_the_video_is_written(magi, monkeypatch):
    monkeypatch.setattr(sound_encoder, "ENCODER", "absent")
    status, stderr = magi("--video", clip(), "--join")
    assert status == 0
    assert stderr.count("note: This PyAV cannot encode AAC") == 1
    assert (probe("magi.mp4").frames, probe("magi.mp4").sound) == (72, False)


# Runs that were interrupted


@pytest.fixture
def whole(magi) -> bytes:
    """The video of an undisturbed run of three seconds."""
    assert magi("--video", clip(), "--join", "--out", "whole.mp4", seconds=3)[0] == 0
    return Path("whole.mp4").read_bytes()


@pytest.mark.parametrize(("phase", "done"), [("sample", 2), ("join", 1), ("sample", 6)])
def test_a_resumed_run_has_it_all(magi, interrupt, whole, phase, done):
    given = ["--video", "clip.mov", "--join"]
    interrupt(phase, done)
    status, stderr = magi(*given, seconds=3)
    assert status == 130
    assert "with --resume continues it" in stderr
    assert Path("magi.partial.mp4").exists() == (phase == "join" or done > 4)
    status, stderr = magi(*given, "--resume", seconds=3)
    assert status == 0
    assert "resuming" in stderr
    assert Path("magi.mp4").read_bytes() == whole
    assert sorted(path.name for path in Path().iterdir()) == ["clip.mov", "magi.mp4", "whole.mp4"]


def test_a_run_that_began_without_it_may_be_joined_when_it_is_resumed(magi, interrupt, whole):
    interrupt("sample", 5)
    assert magi("--video", "clip.mov", seconds=3)[0] == 130
    assert magi("--video", "clip.mov", "--join", "--resume", seconds=3)[0] == 0
    assert Path("magi.mp4").read_bytes() == whole


def test_the_clip_must_still_be_there(magi, interrupt, monkeypatch):
    given = ["--video", clip(), "--join"]
    interrupt("sample", 2)
    assert magi(*given)[0] == 130
    kept = {path: path.read_bytes() for path in Path("magi.run").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(resident_models, "load_transformer", lambda *_, **__: pytest.fail("a model is loaded"))
        Path("clip.mov").rename("elsewhere.mov")
        status, stderr = magi(*given, "--resume")
        assert status == 1
        assert "error: There is no file" in stderr
        clip(waveform=torch.zeros(2, 96000))
        status, stderr = magi(*given, "--resume")
        assert status == 1
        assert "the content of the clip is not the same" in stderr
    assert {path: path.read_bytes() for path in Path("magi.run").iterdir()} == kept
    Path("elsewhere.mov").rename("clip.mov")
    assert magi(*given, "--resume")[0] == 0
    assert probe("magi.mp4").frames == 72

"""The sound of the clip that a video continues: in MAGI-1 VAE Decode's VIDEO, then silence."""

import importlib
import inspect
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch

from magi.media.sound_reader import read_sound
from tests.support.magi_graphs import HEIGHT, WIDTH, clip, node, text_to_video
from tests.support.sound_clips import heard, spoil, tone, write_clip


def api(comfy):
    return importlib.import_module("comfy_api.latest")


def from_file(comfy, path: Path, **window: float):
    """A VIDEO, or of ComfyUI that can trim, a part of it."""
    cls = api(comfy).InputImpl.VideoFromFile
    if window and "start_time" not in inspect.signature(cls).parameters:
        pytest.skip("this ComfyUI cannot trim videos")
    return cls(str(path), **window)


def from_parts(comfy, frames: int, waveform: torch.Tensor | None, rate: int = 48000, fps: int = 24):
    audio = None if waveform is None else {"waveform": waveform[None], "sample_rate": rate}
    parts = api(comfy).Types.VideoComponents(images=clip(frames), frame_rate=Fraction(fps), audio=audio)
    return api(comfy).InputImpl.VideoFromComponents(parts)


def graph_after(comfy, kind: str, before: object):
    graph = text_to_video(comfy)
    graph["before"] = node(comfy.constant(kind, before))
    graph["decode"]["inputs"]["before"] = ["before", 0]
    return graph


def made_after(comfy, before: object, kind: str = "VIDEO"):
    """The components of the decoder's video: `before`, then a second."""
    frames, video = comfy.run(graph_after(comfy, kind, before))["decode"]
    parts = video.get_components()
    assert torch.equal(parts.images, frames)
    if parts.audio is not None:
        waveform, rate = parts.audio["waveform"], parts.audio["sample_rate"]
        assert waveform.dtype == torch.float32
        assert waveform.shape == (1, waveform.shape[1], round(len(frames) / 24 * rate))
    return parts


# From a file


@pytest.mark.parametrize(("channels", "rate"), [(1, 44100), (2, 48000), (6, 16000)])
def test_the_clips_sound_then_silence(comfy, tmp_path, channels, rate):
    written = tone(2, rate, channels=channels)
    parts = made_after(comfy, from_file(comfy, write_clip(tmp_path / "a.mov", written, rate)))
    assert len(parts.images) == 72
    assert parts.audio["sample_rate"] == rate
    (waveform,) = parts.audio["waveform"]
    assert torch.equal(waveform[:, : 2 * rate], written)
    assert waveform.shape == (channels, 3 * rate)
    assert not waveform[:, 2 * rate :].any()


def test_a_clip_of_another_rate_whose_sound_is_late_and_outlasts_it(comfy, tmp_path):
    path = write_clip(tmp_path / "a.mov", tone(2, end=2), frames=45, fps=30, sound_at=0.5)
    parts = made_after(comfy, from_file(comfy, path))
    assert len(parts.images) == 36 + 24
    (waveform,) = parts.audio["waveform"]
    assert not waveform[:, :24000].any()
    assert torch.equal(waveform[:, 24000:72000], tone(2, end=2)[:, :48000])
    assert not waveform[:, 72000:].any()


@pytest.mark.parametrize(("start", "seconds"), [(0.25, 0), (0.75, 1), (0, 0.75)])
def test_a_part_of_a_file(comfy, tmp_path, start, seconds):
    path = write_clip(tmp_path / "a.mov", tone(2, end=2))
    parts = made_after(comfy, from_file(comfy, path, start_time=start, duration=seconds))
    length = seconds or 2 - start
    assert len(parts.images) == round(length * 24) + 24
    (waveform,) = parts.audio["waveform"]
    kept = tone(2, end=2)[:, round(start * 48000) :][:, : round(length * 48000)]
    n = kept.shape[1]
    places = ((0, 0), (0, 1), (1, 0))  # ComfyUI reckons in floats, and may be a sample off
    assert any(torch.equal(waveform[:, a : n - 1 + a], kept[:, b : n - 1 + b]) for a, b in places)
    assert not waveform[:, n:].any()


def test_no_sound(comfy, tmp_path):
    assert comfy.run(text_to_video(comfy))["decode"][1].get_components().audio is None
    assert made_after(comfy, clip(24), "IMAGE").audio is None
    assert made_after(comfy, from_parts(comfy, 24, None)).audio is None
    assert made_after(comfy, from_parts(comfy, 24, torch.zeros(2, 0))).audio is None
    assert made_after(comfy, from_file(comfy, write_clip(tmp_path / "a.mp4", None))).audio is None


def test_damaged_sound_does_not_cost_the_video(comfy, tmp_path):
    path = write_clip(tmp_path / "a.mp4", tone(2, end=2), codec="aac")
    spoil(path, 40)
    with pytest.warns(UserWarning, match="is damaged: silence stands in"):
        parts = made_after(comfy, from_file(comfy, path))
    assert len(parts.images) == 72
    assert heard(parts.audio["waveform"][0], 48000) == pytest.approx((0.5, 2), abs=0.03)


# From components


@pytest.mark.parametrize("seconds", [0.7, 2, 5])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_sound_of_another_length_than_the_pictures(comfy, channels, seconds):
    written = tone(seconds, 44100, end=seconds, channels=channels)
    parts = made_after(comfy, from_parts(comfy, 24, written, 44100, fps=12))
    assert len(parts.images) == 72
    (waveform,) = parts.audio["waveform"]
    kept = min(2 * 44100, written.shape[1])
    assert torch.equal(waveform[:, :kept], written[:, :kept])
    assert not waveform[:, kept:].any()


def test_what_comfyui_cannot_save_is_mixed(comfy):
    (waveform,) = made_after(comfy, from_parts(comfy, 24, tone(1, channels=4))).audio["waveform"]
    assert torch.allclose(waveform[:, :48000], tone(1, channels=4).mean(0, keepdim=True))


def test_a_video_that_is_continued_twice_keeps_it(comfy):
    graph = graph_after(comfy, "VIDEO", from_parts(comfy, 24, tone(1)))
    inputs = {"samples": ["sampler", 0], "vae": ["vae", 0], "before": ["decode", 1]}
    graph["again"] = graph["decode"] | {"inputs": graph["decode"]["inputs"] | inputs}
    parts = comfy.run(graph)["again"][1].get_components()
    (waveform,) = parts.audio["waveform"]
    assert (len(parts.images), waveform.shape[1]) == (72, 3 * 48000)
    assert torch.equal(waveform[:, :48000], tone(1))
    assert not waveform[:, 48000:].any()


# In ComfyUI's own nodes


@pytest.mark.parametrize("channels", [1, 2])
def test_the_saved_file_has_both(comfy, channels):
    graph = graph_after(comfy, "VIDEO", from_parts(comfy, 24, tone(1, channels=channels)))
    graph["save"] = node("SaveVideo", video=["decode", 1], filename_prefix="both", format="auto", codec="auto")
    comfy.run(graph)
    (file,) = (comfy.base / "output").glob("both*.mp4")
    with av.open(str(file)) as saved:
        picture, sound = saved.streams.video[0], saved.streams.audio[0]
        assert (picture.width, picture.height, picture.frames) == (WIDTH, HEIGHT, 48)
        assert abs(float(sound.duration * sound.time_base) - 2) <= 1024 / 48000
    waveform = read_sound(file, Fraction(2)).waveform
    assert len(waveform) in (channels, 2)  # ComfyUI 0.8 makes stereo of mono
    assert heard(waveform, 48000) == pytest.approx((0.5, 1), abs=0.03)
    assert waveform[:, 50_000:].abs().max() < 1e-3


def test_sound_that_is_given_with_frames(comfy):
    graph = text_to_video(comfy)
    graph["frames"] = node(comfy.constant("IMAGE", clip(24)))
    graph["sound"] = node(comfy.constant("AUDIO", {"waveform": tone(1)[None], "sample_rate": 48000}))
    graph["before"] = node("CreateVideo", images=["frames", 0], fps=24.0, audio=["sound", 0])
    graph["decode"]["inputs"]["before"] = ["before", 0]
    (waveform,) = comfy.run(graph)["decode"][1].get_components().audio["waveform"]
    assert torch.equal(waveform[:, :48000], tone(1))

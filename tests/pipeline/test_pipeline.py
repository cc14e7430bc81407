"""The pipeline: what a request becomes, in which order it is made, and that mistakes are found before anything is loaded."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from magi.config import PRESETS
from magi.errors import MagiError
from magi.media.video_reader import read_image
from magi.media.video_writer import VideoWriter
from magi.model_files.embedded import DEMO_IMAGE
from magi.model_files.locate import ModelFiles, find_files
from magi.model_files.repeating import repeating_files
from magi.pipeline import pipeline, resident_models
from magi.pipeline.pipeline import MagiPipeline, Request
from magi.pipeline.request import make_plan
from magi.planning import planner
from magi.runs.store import RunStore
from magi.sampling.captions import Caption
from magi.sampling.schedule import Schedule
from magi.sampling.special_tokens import SpecialTokens
from magi.text import encode
from magi.text.embedding_cache import EmbeddingCache
from magi.transformer import float8
from magi.transformer.model import Transformer

PHOTO = DEMO_IMAGE
SMALL = {"prompt": "A cat", "height": 32, "width": 48, "num_steps": 4}  # as little work as can be

NOISE = torch.randint(0, 255, (32, 48, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> ModelFiles:
    return repeating_files(tmp_path_factory.getbasetemp() / "repeating")  # shared with the other test files


@pytest.fixture(scope="session")
def pipe(files) -> MagiPipeline:
    return load(files)


def load(files: ModelFiles, **options) -> MagiPipeline:
    options = {"device": "cpu", "vae_dtype": torch.float32} | options
    return MagiPipeline.from_files(files.transformer, files.vae, files.text_encoder, files.special_tokens, **options)


def made(pipe: MagiPipeline, progress=None, **request) -> torch.Tensor:
    return torch.cat([clip.frames for clip in pipe.generate(progress=progress, **(SMALL | request))])


def numbered(count: int, size: int = 32) -> torch.Tensor:
    """Frames whose brightness tells their number: uint8 (count, size, size, 3)."""
    return (5 * torch.arange(count) + 5).to(torch.uint8)[:, None, None, None].expand(-1, size, size, 3).contiguous()


def numbers(frames: torch.Tensor) -> list[int]:
    return [round((float(frame.float().mean()) - 5) / 5) for frame in frames]


def video_file(folder: Path, frames: torch.Tensor) -> Path:
    path = folder / "clip.mp4"
    with VideoWriter(path, *frames.shape[1:3], crf=1) as writer:
        writer.write(frames)
    return path


# Lengths


@pytest.mark.parametrize("start", [None, "image", 8, 11, 23, 24, 25, 30, 47, 48, 60])
@pytest.mark.parametrize("frames", [1, 25, 48])
def test_as_many_frames_come_out_as_were_announced(start, frames, pipe):
    given = {} if start is None else {"image": PHOTO} if start == "image" else {"video": numbered(min(start, 50))}
    plan = pipe.plan(Request(**SMALL, frames=frames, **given))
    clips = list(pipe.run(plan))
    assert sum(len(clip.frames) for clip in clips) == plan.frames
    assert [clip.first_frame for clip in clips] == [sum(len(c.frames) for c in clips[:i]) for i in range(len(clips))]
    assert frames <= plan.frames < frames + 48
    assert plan.seconds == plan.frames / 24
    assert all(clip.frames.dtype == torch.uint8 and clip.frames.shape[1:] == (32, 48, 3) for clip in clips)


@pytest.mark.parametrize("start", [None, "image", 8, 13, 24, 28, 44])
@pytest.mark.parametrize("frames", [24, 48])
def test_memory_is_planned_for_the_run_that_is_made(start, frames, files, monkeypatch):
    given = {} if start is None else {"image": PHOTO} if start == "image" else {"video": numbered(start)}
    planned, place = [], planner.place

    def placing(run, sizes, free, options, given, **others):
        planned.append(Schedule.of_run(run.runtime, given))
        return place(run, sizes, free, options, given, **others)

    monkeypatch.setattr(planner, "place", placing)
    totals = set()
    plan = load(files).plan(Request(**SMALL, frames=frames, **given))
    for _ in load(files).run(plan, lambda at: totals.add(at.total) if at.name == "sample" else None):
        pass
    assert {len(schedule) for schedule in planned} == totals
    assert {schedule.chunks - schedule.prefix_chunks for schedule in planned} == {plan.chunks}


@pytest.mark.parametrize(
    ("length", "frames"),
    [
        ({"seconds": 1}, 24),
        ({"seconds": 0.01}, 24),
        ({"seconds": 1.5}, 48),
        ({"seconds": 5}, 120),
        ({"frames": 24}, 24),
        ({"frames": 25}, 48),
        ({"frames": 120}, 120),
        ({}, 96),
    ],
)
@pytest.mark.parametrize("start", [{}, {"image": PHOTO}, {"video": numbered(48)}])
def test_lengths_are_rounded_up_to_whole_seconds(length, frames, start, pipe):
    plan = pipe.plan(Request(**SMALL, **start, **length))
    assert (plan.frames, plan.chunks) == (frames, frames // 24)


# Sizes


@pytest.mark.parametrize(
    ("request_", "size"),
    [
        ({}, (160, 256)),
        ({"width": 64, "height": 48}, (48, 64)),
        ({"width": 128}, (80, 128)),
        ({"height": 320}, (320, 512)),
        ({"image": torch.zeros(1, 300, 300, 3, dtype=torch.uint8)}, (208, 208)),
        ({"image": torch.zeros(1, 400, 200, 3, dtype=torch.uint8)}, (288, 144)),
        ({"image": torch.zeros(1, 400, 200, 3, dtype=torch.uint8), "width": 64}, (128, 64)),
        ({"image": torch.zeros(1, 400, 200, 3, dtype=torch.uint8), "height": 64}, (64, 32)),
        ({"video": torch.zeros(9, 100, 200, 3, dtype=torch.uint8), "height": 64}, (64, 128)),
        ({"video": torch.zeros(9, 100, 200, 3, dtype=torch.uint8)}, (144, 288)),
        ({"image": torch.zeros(1, 100, 4000, 3, dtype=torch.uint8), "width": 64}, (32, 64)),
    ],
)
def test_sizes_left_out_follow_the_input_and_keep_the_models_area(request_, size, pipe, files):
    config = pipe.config.with_runtime(video_size_h=160, video_size_w=256)
    plan = make_plan(Request("A cat", **request_), config, SpecialTokens.load(files.special_tokens))
    assert (plan.config.runtime.video_size_h, plan.config.runtime.video_size_w) == size
    assert plan.prefix is None or plan.prefix.shape[1:3] == size


def test_the_shape_of_a_file_is_seen_too(pipe, tmp_path):
    video = video_file(tmp_path, torch.zeros(8, 96, 48, 3, dtype=torch.uint8))
    for given in ({"video": video}, {"video": str(video)}):
        assert pipe.plan(Request("A cat", width=32, **given)).config.runtime.video_size_h == 64
    Image.new("RGB", (50, 100)).save(tmp_path / "tall.png")
    assert pipe.plan(Request("A cat", image=tmp_path / "tall.png", width=32)).config.runtime.video_size_h == 64


@pytest.mark.parametrize(("mode", "corner"), [("crop", 200), ("pad", 0), ("stretch", 200)])
def test_fitting(mode, corner, pipe):
    image = torch.full((1, 64, 64, 3), 200, dtype=torch.uint8)
    plan = pipe.plan(Request("A cat", image=image, height=32, width=64, fit=mode))
    assert plan.prefix[0, 0, 0].tolist() == [corner] * 3


# Given frames


@pytest.mark.parametrize(
    ("seconds", "shown"), [(1, range(16, 40)), (1.5, range(4, 40)), (0.5, range(28, 40)), (9, range(40))]
)
@pytest.mark.parametrize("from_file", [True, False])
def test_a_video_is_continued_from_its_end(seconds, shown, from_file, pipe, tmp_path):
    frames = numbered(40)
    video = video_file(tmp_path, frames) if from_file else frames
    plan = pipe.plan(Request("A cat", video=video, continue_seconds=seconds, height=32, width=32))
    assert numbers(plan.prefix) == list(shown)


def test_whole_latents_are_taken_so_that_the_last_frame_is_kept(pipe):
    plan = pipe.plan(Request("A cat", video=numbered(39), continue_seconds=9, height=32, width=32))
    assert numbers(plan.prefix) == list(range(3, 39))


def test_an_image_as_a_file_and_as_a_tensor(pipe):
    assert torch.equal(made(pipe, image=PHOTO, seconds=1), made(pipe, image=read_image(PHOTO), seconds=1))


# Randomness


def test_seeds(pipe):
    first = made(pipe, seed=1, seconds=2)
    assert torch.equal(first, made(pipe, seed=1, seconds=2))
    assert not torch.equal(first, made(pipe, seed=2, seconds=2))
    assert not torch.equal(first[:24], first[24:])


@pytest.mark.parametrize("start", [{}, {"image": PHOTO}, {"video": numbered(36)}])
def test_the_first_second_does_not_depend_on_the_length_where_the_chunk_is_not_told_of_it(start, pipe):
    """It is told by its duration token, of up to seven chunks after it."""

    def first(seconds, **options):
        return next(pipe.generate(**SMALL | start | {"seconds": seconds} | options)).frames

    assert torch.equal(first(1, duration_tokens=False), first(4, duration_tokens=False))
    assert not torch.equal(first(1), first(4))
    assert torch.equal(first(8), first(11))


def test_a_prompt_a_chunk(pipe):
    """The last of a short list holds to the end; a chunk never shows what comes after it."""

    def chunks(*prompts):
        return made(pipe, prompt=prompts, seconds=3, duration_tokens=False).split(24)

    plain, varied, explicit = chunks("red"), chunks("red", "blue"), chunks("red", "blue", "blue")
    assert torch.equal(plain[0], varied[0])
    assert not torch.equal(plain[1], varied[1])
    assert all(map(torch.equal, varied, explicit))
    assert all(map(torch.equal, plain, made(pipe, prompt="red", seconds=3, duration_tokens=False).split(24)))


# Loading


def count_calls(monkeypatch, module, name) -> list:
    real, calls = getattr(module, name), []

    def counted(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return calls


def test_the_transformer_and_vae_are_loaded_once_and_not_before_they_are_needed(files, monkeypatch):
    pipe = load(files)
    transformers = count_calls(monkeypatch, resident_models, "load_transformer")
    vaes = count_calls(monkeypatch, resident_models, "load_vae")
    pipe.plan(Request(**SMALL, image=PHOTO))
    assert (transformers, vaes) == ([], [])
    made(pipe, seconds=1)
    made(pipe, seconds=1, image=PHOTO, seed=3)
    assert len(transformers) == len(vaes) == 1


def test_the_text_encoder_is_not_needed_for_a_prompt_met_before(files, tmp_path):
    folder = shutil.copytree(files.text_encoder, tmp_path / "t5")
    own = dataclasses.replace(files, text_encoder=folder)
    cache = EmbeddingCache(tmp_path / "cache")
    first = made(load(own, cache=cache), seconds=1)
    (folder / "model.safetensors").unlink()
    assert torch.equal(first, made(load(own, cache=cache), seconds=1))
    with pytest.raises(MagiError, match="t5"):
        made(load(own, cache=cache), prompt="A dog", seconds=1)


def test_a_text_encoder_that_is_away_is_missed_in_planning_and_only_for_new_prompts(files, tmp_path, monkeypatch):
    folder = shutil.copytree(files.text_encoder, tmp_path / "t5")
    own, cache = dataclasses.replace(files, text_encoder=folder), EmbeddingCache(tmp_path / "cache")
    first = made(load(own, cache=cache), prompt=("A cat", "A dog"), seconds=2)
    folder.rename(tmp_path / "elsewhere")
    assert torch.equal(first, made(load(own, cache=cache), prompt=("A cat", "A dog"), seconds=2))
    pipe = load(own, cache=cache)
    monkeypatch.setattr("magi.pipeline.request.read_image", lambda *_: pytest.fail("the picture is read"))
    for prompts in ("A bird", ("A cat", "A bird")):
        with pytest.raises(MagiError, match=r"text encoder is not at .*t5.*magi download t5"):
            pipe.plan(Request(prompts, seconds=2, image=PHOTO))
    with pytest.raises(MagiError, match="text encoder is not at"):
        load(own).plan(Request("A cat", seconds=1))  # no cache


def test_a_kept_run_goes_on_without_any_text_encoder(files, tmp_path):
    """Even where the prompts are in no cache: the captions are kept with the run."""
    folder = shutil.copytree(files.text_encoder, tmp_path / "t5")
    own = dataclasses.replace(files, text_encoder=folder)
    request = {**SMALL, "seconds": 2}

    def interrupt(phase):
        if phase.name == "sample" and phase.done >= 3:
            raise KeyboardInterrupt

    whole = torch.cat([clip.frames for clip in load(own).generate(**request)])
    store, begun = RunStore(tmp_path / "run"), load(own)
    plan = begun.plan(Request(**request))
    store.open(begun.settings(plan))
    with pytest.raises(KeyboardInterrupt):
        list(begun.run(plan, interrupt, store, save_seconds=0))
    store.close()
    shutil.rmtree(folder)
    again = load(own).generate(**request, state=tmp_path / "run", resume=True)
    assert torch.equal(torch.cat([clip.frames for clip in again]), whole)


@pytest.mark.parametrize("free", [None, 10**10], ids=["host", "card"])
@pytest.mark.parametrize("start", [None, "image", "clip"])
def test_captions_and_latents_need_neither_text_encoder_nor_vae(start, free, pipe, files, monkeypatch):
    media = {None: {}, "image": {"image": PHOTO}, "clip": {"video": numbered(32)}}[start]
    plan = pipe.plan(Request(**SMALL, **media, seconds=2))
    encoded = pipe.encode(plan)
    whole = [chunk.latents for chunk in pipe.sample(encoded)]
    captions = [Caption(e) for e in encode.encode_prompts([SMALL["prompt"]], files.text_encoder)]
    alone = MagiPipeline(ModelFiles(files.transformer, special_tokens=files.special_tokens), pipe.config, device="cpu")
    monkeypatch.setattr(resident_models, "free_memory", lambda device: free)
    size = {"height": 32, "width": 48, "num_steps": 4, "seconds": 2}
    own = alone.plan(Request(captions=captions, latents=encoded.latents, **size))
    assert (own.frames, own.chunks) == (plan.frames, plan.chunks)
    chunks = [chunk.latents for chunk in alone.sample(own)]
    assert torch.equal(torch.cat(chunks, dim=2), torch.cat(whole, dim=2))
    with pytest.raises(MagiError, match=r"without a text encoder\. Make it with one, or give captions"):
        alone.plan(Request(**SMALL))
    with pytest.raises(MagiError, match=r"without a VAE\. Make it with one"):
        list(alone.run(own))


def test_layers_left_in_the_file_give_the_same_video(files, pipe):
    assert torch.equal(made(load(files, offload=True), seconds=1), made(pipe, seconds=1))


# Progress


def test_phases_come_in_order_with_their_totals(files):
    pipe, seen = load(files), []
    clips = list(pipe.generate(**SMALL, image=PHOTO, seconds=3, progress=seen.append))
    order = list(dict.fromkeys(phase.name for phase in seen))
    assert order == ["text", "prefix", "load", "sample", "decode"]
    for name in ("text", "prefix", "load"):
        steps = [(phase.done, phase.total) for phase in seen if phase.name == name]
        assert steps[-1][0] == steps[-1][1], name
    sample = [s for s in seen if s.name == "sample"]
    assert {s.total for s in sample} == {6}  # one step a stage, three chunks, a window of four
    assert [s.done for s in sample] == sorted(s.done for s in sample)
    assert any(s.done % 1 for s in sample), "within an iteration too"
    assert [s.done for s in sample if s.sampled] == [1, 2, 3, 4, 5, 6]
    assert sample[-1].sampled.latents.shape == (1, 16, 6, 4, 6)
    decoded = [s.done for s in seen if s.name == "decode"]
    assert decoded == sorted(decoded)
    assert decoded[-1] == seen[-1].total
    assert len(clips) == 6  # two temporal tiles of twelve frames a chunk


def test_the_first_frames_come_before_the_last_are_sampled(pipe):
    seen = []
    next(pipe.generate(**SMALL, seconds=6, progress=seen.append))
    assert [s.done for s in seen if s.sampled] == [1, 2, 3, 4]  # of 9


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("phase", ["text", "prefix", "load", "sample", "decode"])
def test_an_exception_from_progress_stops_at_once(phase, files, pipe):
    own, seen = load(files), []

    def cancel(event):
        seen.append(event.name)
        if event.name == phase:
            raise Cancelled

    with pytest.raises(Cancelled):
        made(own, progress=cancel, image=PHOTO, seconds=2)
    assert seen.count(phase) == 1
    assert seen[-1] == phase
    assert torch.equal(made(own, seconds=1), made(pipe, seconds=1)), "the next run is as good as any"


# Bad requests


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    real = resident_models.load_vae

    def header_only(path, device=None, dtype=torch.float32):
        assert device == "meta", "the VAE is loaded"
        return real(path, device, dtype)

    def loaded(*_, **__):
        pytest.fail("a model is loaded")

    for module in (pipeline, resident_models):
        monkeypatch.setattr(module, "load_vae", header_only)
    monkeypatch.setattr(resident_models, "load_transformer", loaded)
    monkeypatch.setattr(encode.TextEncoder, "load", loaded)


IMAGE = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
LATENTS = torch.zeros(1, 16, 2, 4, 6)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"height": 100}, "Height 100.*96 and 112"),
        ({"width": 50}, "Width 50.*48 and 64"),
        ({"width": 16}, "Width 16.*32"),
        ({"height": 0}, "Height 0.*32"),
        ({"height": 100, "image": IMAGE}, "Height 100.*96 and 112"),
        ({"seconds": 0}, "seconds is 0.*above 0"),
        ({"seconds": -2.5}, "seconds is -2.5.*above 0"),
        ({"seconds": float("nan")}, "seconds is nan.*above 0"),
        ({"seconds": float("inf")}, "seconds is inf.*above 0"),
        ({"frames": 0}, "frames is 0.*above 0"),
        ({"frames": -24}, "frames is -24.*above 0"),
        ({"frames": 24, "seconds": 1}, "seconds .1. and frames .24..*Give one"),
        ({"num_steps": 10}, "10 steps.*Use 8 or 12"),
        ({"num_steps": 0}, "steps is 0.*from 1 to 1000"),
        ({"window_size": 3}, "window of 3.*Use 12"),
        ({"window_size": 0}, "window is 0.*from 1 to 1000"),
        ({"prompt": ()}, "0 prompts for 4 chunks.*Give one"),
        ({"prompt": ("a",) * 5}, "5 prompts for 4 chunks"),
        ({"prompt": ("a", "b"), "video": numbered(48), "seconds": 1}, "2 prompts for 1 chunks"),
        ({"style_tokens": ("hq", "cartoon")}, "'cartoon'.*2d_anime"),
        ({"image": IMAGE, "fit": "squeeze"}, "'squeeze'.*crop, pad, stretch"),
        ({"image": IMAGE, "video": numbered(24)}, "Both.*Give one"),
        ({"video": numbered(24), "continue_seconds": 0}, "continue_seconds is 0.*above 0"),
        (
            {"video": numbered(24), "continue_seconds": 0.3},
            "continue_seconds is 0.3, less than the 8 frames.*0.34 or more",
        ),
        ({"video": numbered(1)}, "clip has 1 frame at 24 per second; 8 are needed.*as an image"),
        ({"video": numbered(7)}, "clip has 7 frames at 24 per second; 8 are needed"),
        ({"video": numbered(24), "continue_seconds": float("nan")}, "continue_seconds is nan.*above 0"),
        ({"video": numbered(24), "continue_seconds": float("inf")}, "continue_seconds is inf.*above 0"),
        ({"image": IMAGE[:0]}, r"image is .*\(0, 32, 32, 3\).*give torch.uint8"),
        ({"image": IMAGE[0]}, r"image is .*\(32, 32, 3\).*give torch.uint8"),
        ({"image": IMAGE.float()}, "image is torch.float32.*give torch.uint8"),
        ({"video": numbered(24)[..., :1]}, r"video is .*\(24, 32, 32, 1\).*give torch.uint8"),
        ({"video": numbered(24)[:0]}, r"video is .*\(0, 32, 32, 3\).*one frame"),
        ({"latents": LATENTS, "height": 64}, "tensor of latents is 48x32 pixels, the video 48x64.*same size"),
        ({"latents": LATENTS[0]}, r"tensor of latents has the shape \(16, 2, 4, 6\); it must be \(1, 16, frames"),
        ({"latents": LATENTS[:, :, :0]}, r"tensor of latents has the shape \(1, 16, 0, 4, 6\)"),
        ({"latents": LATENTS, "area": "480p"}, r"latents and an area \(480p\) are given.*Leave out the area"),
        ({"latents": LATENTS, "image": IMAGE}, "Both image and latents are given.*Give one"),
        ({"captions": [Caption(torch.zeros(3, 64))]}, "Both a prompt and captions.*Give one"),
        ({"image": "no such file.png"}, "no such file.png.*Check the path"),
        ({"video": "no such file.mp4"}, "no such file.mp4.*Check the path"),
        ({"video": PHOTO}, r"cat\.jpg.*Use it as an image"),
        ({"image": Path(__file__)}, "test_pipeline.py.*Give a PNG, JPEG"),
        ({"video": Path(__file__)}, "test_pipeline.py.*Give the video"),
    ],
)
def test_bad_requests_name_the_value_and_the_remedy(request_, message, pipe, nothing_is_loaded):
    with pytest.raises(MagiError, match=message):
        list(pipe.generate(**{"prompt": "A cat"} | request_))


def test_damaged_media(pipe, tmp_path, nothing_is_loaded):
    empty, cut = tmp_path / "empty.png", tmp_path / "cut.jpg"
    empty.touch()
    cut.write_bytes(PHOTO.read_bytes()[:5000])
    for file, message in ((empty, "empty.png' is empty"), (cut, "cut.jpg.*Save it again")):
        with pytest.raises(MagiError, match=message):
            list(pipe.generate(prompt="A cat", image=file))
    clip = video_file(tmp_path, numbered(24))
    clip.write_bytes(clip.read_bytes()[:800])
    with pytest.raises(MagiError, match=r"clip\.mp4"):
        list(pipe.generate(prompt="A cat", video=clip))


@pytest.mark.parametrize(
    "request_",
    [
        {"duration_tokens": False},
        {"style_tokens": ()},
        {"style_tokens": (), "duration_tokens": False, "negative_tokens": True},
    ],
)
def test_tokens_without_their_file_are_missed_before_anything_is_loaded(request_, files, nothing_is_loaded):
    pipe = load(dataclasses.replace(files, special_tokens=None))
    with pytest.raises(MagiError, match=r"special_tokens.npz.*switch them off"):
        list(pipe.generate(**SMALL | request_))


def test_no_token_file_is_needed_without_tokens(files):
    pipe = load(dataclasses.replace(files, special_tokens=None))
    assert len(made(pipe, seconds=1, style_tokens=(), duration_tokens=False)) == 24


def test_a_blank_prompt_warns_and_runs_unconditional(pipe):
    with pytest.warns(UserWarning, match="'  ' is left to encode: it runs as unconditional"):
        blank = made(pipe, prompt="  ", seconds=1)
    with pytest.warns(UserWarning, match="unconditional"):
        address = made(pipe, prompt="https://example.com/", seconds=1)
    assert torch.equal(blank, address)
    assert not torch.equal(blank, made(pipe, seconds=1))


def test_a_prompt_as_it_is(pipe):
    assert torch.equal(made(pipe, prompt="A <b>Cat</b>", seconds=1), made(pipe, prompt="a cat", seconds=1))
    raw = made(pipe, prompt="A <b>Cat</b>", seconds=1, clean_prompt=False)
    assert not torch.equal(raw, made(pipe, prompt="a cat", seconds=1))


# Bad files


def changed(files: ModelFiles, tmp_path: Path, part: str, change) -> ModelFiles:
    """The files with one part replaced by a copy that `change` was applied to."""
    source = getattr(files, part)
    copy = shutil.copytree(source, tmp_path / part) if source.is_dir() else shutil.copy(source, tmp_path / source.name)
    change(Path(copy))
    return dataclasses.replace(files, **{part: Path(copy)})


def without(*names: str, more: tuple[str, ...] = ()):
    def change(folder: Path) -> None:
        file = next(folder.glob("*.safetensors"))
        tensors = {k: v for k, v in load_file(file).items() if k not in names} | {k: torch.zeros(2) for k in more}
        save_file(tensors, file)

    return change


def cut(length: int):
    def change(folder: Path) -> None:
        file = next(folder.glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:length])

    return change


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("transformer", without("rope.bands", "x_embedder.extra"), "transformer.*1 missing .rope.bands.*Download"),
        ("transformer", without(more=("lora.up", "lora.down")), "2 unexpected .lora.down, lora.up.*Download"),
        ("transformer", cut(9000), "model.safetensors.*truncated"),
        ("transformer", cut(0), r"model.safetensors.*\b0 bytes|model.safetensors.*empty"),
        ("vae", without("decoder.norm.bias"), "vae.*1 missing: decoder.norm.bias.*Choose the VAE"),
        ("vae", without(more=("decoder.extra",)), "1 unexpected: decoder.extra"),
        ("vae", cut(9000), "diffusion_pytorch_model.safetensors.*truncated"),
        ("special_tokens", lambda f: f.write_bytes(b"PK not really"), "npz.*download special_tokens"),
        ("special_tokens", lambda f: f.unlink(), "npz.*download special_tokens"),
    ],
)
def test_damaged_files_are_found_from_their_headers(part, change, message, files, tmp_path, nothing_is_loaded):
    with pytest.raises(MagiError, match=message):
        load(changed(files, tmp_path, part, change))


@pytest.mark.parametrize(
    ("part", "taken_from", "message"),
    [
        ("transformer", "vae", "vae' is a MAGI-1 VAE.*Give it as the VAE"),
        ("transformer", "text_encoder", "is a T5 text encoder.*as the text encoder"),
        ("vae", "transformer", "transformer' is MAGI-1.*not a MAGI-1 VAE.*Choose another"),
        ("vae", "text_encoder", "is a T5 text encoder, not a MAGI-1 VAE"),
    ],
)
def test_files_in_each_others_place(part, taken_from, message, files, nothing_is_loaded):
    with pytest.raises(MagiError, match=message):
        load(dataclasses.replace(files, **{part: getattr(files, taken_from)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "tokenizer_config.json").unlink(), "okenizer"),
        (lambda f: (f / "model.safetensors").unlink(), "text_encoder"),
        (without("shared.weight"), "shared.weight"),
        (cut(2000), "model.safetensors"),
    ],
)
def test_a_bad_text_encoder_is_found_before_the_others_are_loaded(change, message, files, tmp_path, monkeypatch):
    pipe = load(changed(files, tmp_path, "text_encoder", change))
    for name in ("load_vae", "load_transformer"):
        monkeypatch.setattr(resident_models, name, lambda *_, **__: pytest.fail("a model is loaded"))
    with pytest.raises(MagiError, match=message):
        made(pipe, image=PHOTO)


def test_the_text_encoder_of_another_model(files, tiny_config, monkeypatch):
    pipe = MagiPipeline(dataclasses.replace(files, special_tokens=None), tiny_config(), device="cpu")
    for name in ("load_vae", "load_transformer"):
        monkeypatch.setattr(resident_models, name, lambda *_, **__: pytest.fail("a model is loaded"))
    with pytest.raises(MagiError, match=r"64 channels, the model takes 12.*text encoder that belongs"):
        made(pipe, image=PHOTO, style_tokens=(), duration_tokens=False)


def test_float8_weights_without_float8(golden, files, monkeypatch, nothing_is_loaded):
    monkeypatch.setattr(float8, "FLOAT8", None)
    with pytest.raises(MagiError, match=r"no float8.*update torch|float8"):
        load(dataclasses.replace(files, transformer=golden / "dit_b_fp8.safetensors"), distilled=True)


@pytest.mark.parametrize("device", ["tpu", "cuda:77", "xpu"])
def test_a_device_that_is_not_there(device, files, nothing_is_loaded):
    with pytest.raises(MagiError, match=device):
        load(files, device=device)


# Base and distilled


def untold(files: ModelFiles, folder: Path) -> ModelFiles:
    """The files with a transformer that nothing says the variant of."""
    folder.mkdir(parents=True)
    shutil.copy(files.transformer / "model.safetensors", folder)
    return dataclasses.replace(files, transformer=folder / "model.safetensors")


def test_the_variant_is_asked_for_and_taken(files, tmp_path):
    own = untold(files, tmp_path / "weights")
    with pytest.raises(MagiError, match=r"does not tell.*base or distilled"):
        load(own)
    assert load(own, distilled=True).config.runtime.cfg_number == 1
    assert load(own, distilled=False).config.runtime.cfg_number == 3
    assert len(made(load(own, distilled=False), seconds=1)) == 24


@pytest.mark.parametrize(
    ("name", "distilled"), [("magi_base", False), ("magi_distill", True), ("inference_weight.distill", True)]
)
def test_names_tell_the_variant_and_the_opposite_is_refused(name, distilled, files, tmp_path):
    own = untold(files, tmp_path / name)
    assert load(own).config.engine.distill == distilled
    right, wrong = ("distilled", "base") if distilled else ("base", "distilled")
    with pytest.raises(MagiError, match=rf"holds \w+ weights .so says the name {name}.*{wrong}.*variant {right}"):
        load(own, distilled=not distilled)


@pytest.mark.parametrize(("preset", "distilled"), [("4.5B_base", True), ("4.5B_distill", False)])
def test_a_config_and_a_variant_that_contradict_each_other(preset, distilled, files):
    with pytest.raises(
        MagiError, match=r"variant (base|distilled) is chosen.*settings are for (base|distilled).*Leave out"
    ):
        load(files, config=PRESETS[preset], distilled=distilled)


# Where files are expected


def official_tree(models: Path) -> None:
    for folder in ("ckpt/magi/4.5B_distill/inference_weight.distill", "ckpt/vae", "ckpt/t5/t5-v1_1-xxl"):
        (models / folder).mkdir(parents=True)
    (models / "special_tokens.npz").touch()


def test_the_official_tree(tmp_path):
    official_tree(tmp_path)
    found = find_files(tmp_path, "4.5B_distill")
    assert found.transformer == tmp_path / "ckpt/magi/4.5B_distill/inference_weight.distill"
    assert (found.vae, found.text_encoder) == (tmp_path / "ckpt/vae", tmp_path / "ckpt/t5/t5-v1_1-xxl")
    assert found.special_tokens == tmp_path / "special_tokens.npz"
    other = find_files(tmp_path, str(tmp_path), vae=tmp_path / "ckpt")
    assert (other.transformer, other.vae) == (tmp_path, tmp_path / "ckpt")


@pytest.mark.parametrize(
    ("missing", "item"),
    [
        ("ckpt/magi/4.5B_distill", "4.5B_distill"),
        ("ckpt/vae", "vae"),
    ],
)
def test_a_missing_part_names_its_place_and_the_command_that_fetches_it(missing, item, tmp_path):
    official_tree(tmp_path)
    path = tmp_path / missing
    path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(MagiError) as error:
        find_files(tmp_path, "4.5B_distill")
    assert f"python -m magi download {item} --folder {tmp_path}" in str(error.value)
    assert json.dumps(str(path))[1:-1] in json.dumps(str(error.value))


def test_a_model_name_with_a_typing_error(tmp_path):
    with pytest.raises(MagiError, match=r"'4.5B_bas'.*4\.5B_base, "):
        find_files(tmp_path, "4.5B_bas")


def test_the_published_token_file_is_found_by_its_hash_and_not_missed_where_no_token_is_asked_for(
    tmp_path, monkeypatch
):
    folder = tmp_path / "ckpt" / "magi" / "4.5B_base" / "inference_weight"
    for path in (folder, tmp_path / "ckpt" / "vae", tmp_path / "ckpt" / "t5" / "t5-v1_1-xxl"):
        path.mkdir(parents=True)
    assert find_files(tmp_path, "4.5B_base").special_tokens is None
    renamed = tmp_path / "tokens of mine.npz"
    renamed.touch()
    monkeypatch.setattr("magi.sampling.special_tokens.is_official", lambda file: file == renamed)
    assert find_files(tmp_path, "4.5B_base").special_tokens == renamed


@pytest.mark.parametrize(("start", "size"), [({}, (256, 448)), ({"video": numbered(24).transpose(1, 2)}, (336, 336))])
def test_a_named_area_takes_the_shape_of_the_input_or_is_wide(start, size, pipe):
    runtime = pipe.plan(Request("A cat", area="256p", **start)).config.runtime
    assert (runtime.video_size_h, runtime.video_size_w) == size
    with pytest.raises(MagiError, match=r"Both an area \(256p\) and"):
        pipe.plan(Request("A cat", area="256p", height=64))


def test_negative_tokens_on_distilled_weights_are_remarked_upon(pipe):
    with pytest.warns(UserWarning, match="Negative tokens steer base models"):
        pipe.plan(Request(**SMALL, negative_tokens=True))


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (
            "transformer.model.Transformer.forward",
            torch.OutOfMemoryError("CUDA out of memory."),
            "window of 1. Try a smaller size",
        ),
        (
            "vae.video_vae.VideoVAE.decode_chunks",
            torch.OutOfMemoryError("CUDA out of memory."),
            "window of 4. Try a smaller size",
        ),
        (
            "vae.video_vae.VideoVAE.decode_chunks",
            RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
            "smaller size",
        ),
        ("pipeline.resident_models.load_transformer", MemoryError(), "smaller size, or offloading"),
    ],
)
@pytest.mark.filterwarnings("ignore:cpu ran out of memory")
def test_running_out_of_memory_says_what_to_do(function, error, message, files, monkeypatch):
    def full(*_, **__):
        raise error

    small = load(files)
    monkeypatch.setattr(f"magi.{function}", full)
    with pytest.raises(MagiError, match=f"cpu ran out of memory at 48x32.*{message}"):
        made(small)


@pytest.mark.parametrize("function", ["transformer.model.Transformer.forward", "vae.video_vae.VideoVAE.decode_chunks"])
def test_other_failures_are_not_taken_for_a_shortage(function, files, monkeypatch):
    error = RuntimeError("CUDA error: an illegal memory access was encountered")

    def broken(*_, **__):
        raise error

    small = load(files)
    monkeypatch.setattr(f"magi.{function}", broken)
    with pytest.raises(RuntimeError) as caught:
        made(small)
    assert caught.value is error


@pytest.mark.parametrize("start", ["image", "video"])
@pytest.mark.parametrize("settings", [{"num_steps": 8, "window_size": 3}, {"num_steps": 0}, {"window_size": 0}])
def test_steps_that_do_not_fit_are_refused_before_a_file_is_read(settings, start, pipe, tmp_path):
    with pytest.raises(MagiError, match=r"cannot be split evenly|must be from 1 to 1000"):
        pipe.plan(Request(**SMALL | {start: tmp_path / "not there"} | settings))


@pytest.mark.parametrize("most", [(256, 1), (256, 0), (128, 0)])
def test_memory_that_ran_out_once_does_not_run_out_in_the_next_run(most, files, monkeypatch):
    forward, short = Transformer.forward, []

    def fails(self, *args, **options):
        if self.token_block > most[0] or len(self.blocks.on_device) > most[1]:
            short.append((self.token_block, len(self.blocks.on_device)))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, *args, **options)

    monkeypatch.setattr(Transformer, "forward", fails)
    monkeypatch.setattr(resident_models, "memory_beside", lambda device: 10**11)
    pipe = load(files)
    with pytest.warns(UserWarning, match="From the last finished step on"):
        made(pipe, frames=24)
    assert short
    short.clear()
    made(pipe, frames=24, seed=1)
    assert short == []
    plan = pipe.plan(Request(**SMALL, frames=24))
    assert plan.placement is not None
    assert plan.placement.token_block <= most[0]
    assert len(plan.placement.on_device) <= most[1], "that is what is announced, too"


def test_a_plan_that_is_not_encoded_is_encoded_before_it_is_sampled(pipe):
    plan = pipe.plan(Request(**SMALL, frames=24, image=PHOTO))
    sampled, again = (torch.cat([c.latents for c in pipe.sample(p)], dim=2) for p in (plan, pipe.encode(plan)))
    assert torch.equal(sampled, again)

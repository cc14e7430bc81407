"""The command line as a user meets it: exit statuses, messages, files that are written and files that are left alone."""

import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import av
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from magi.cli import demo, generate
from magi.cli.main import COMMANDS, main
from magi.config import PRESETS
from magi.media.video_reader import probe, read_video
from magi.media.video_writer import read_metadata
from magi.model_files.locate import ModelFiles
from magi.model_files.repeating import repeating_files
from magi.pipeline import resident_models
from magi.text import encode
from magi.transformer.weights import tensor_shapes
from tests.support.paths import ROOT
from tests.support.processes import INTERRUPTIBLE
from tools.train_embedded.captions import vocabulary, words

PHOTO = ROOT / "magi" / "assets" / "cat.jpg"
SMALL = ["--size", "48x32", "--steps", "4", "--device", "cpu"]


@pytest.fixture(scope="session")
def files(cache) -> ModelFiles:
    return repeating_files(cache)


@pytest.fixture
def magi(cache, tmp_path, monkeypatch, capsys):
    """(*arguments) -> (exit status, stderr) of a command that runs in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def run(command: str, *arguments: object) -> tuple[int, str]:
        place = ["--cache", str(cache)] if command in ("generate", "demo") else []
        if command == "generate" and "--model" not in arguments:
            place += ["--model", "embedded-photo"]  # quick, and of any size
        capsys.readouterr()
        status = main([command, *map(str, arguments), *place])
        return status, capsys.readouterr().err

    return run


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def loaded(*_, **__):
        pytest.fail("a model is loaded")

    monkeypatch.setattr(resident_models, "load_transformer", loaded)
    monkeypatch.setattr(encode.TextEncoder, "load", loaded)
    monkeypatch.setattr(resident_models.ResidentModels, "vae", property(loaded))


def error_of(stderr: str) -> str:
    """The one line that says what is wrong."""
    lines = [line for line in stderr.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def model_arguments(files: ModelFiles) -> list[object]:
    return ["--vae", files.vae, "--text-encoder", files.text_encoder, "--special-tokens", files.special_tokens]


# generate


def test_the_embedded_model_takes_its_own_size(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (90, 160)).save(tmp_path / "tall.png")
    always = ["generate", "--prompt", "A red circle grows.", "--seconds", "1", "--steps", "8", "--device", "cpu"]
    always += ["--overwrite", "--cache", str(cache)]
    for options, passes in (([], None), (["--model", "embedded-base", "--image", "tall.png"], 3)):
        assert main([*always, *options]) == 0
        stderr = capsys.readouterr().err
        assert "note: This is the small embedded model. It knows moving shapes at 64x64" in stderr
        assert "`python -m magi download --list`" in stderr
        assert ("`--model embedded-photo`" in stderr) == ("--image" in options)
        assert (probe("magi.mp4").width, probe("magi.mp4").height) == (64, 64)
        assert passes is None or json.loads(read_metadata("magi.mp4")["comment"])["magi"]["passes"] == passes
    assert main([*always, "--size", "96x64"]) == 0
    assert (probe("magi.mp4").width, probe("magi.mp4").height) == (96, 64)


def test_a_video_from_nothing_but_a_prompt(magi):
    status, stderr = magi("generate", "--prompt", "A cat", "--seconds", 2, *SMALL)
    assert status == 0
    assert "note: This is the embedded photo model" in stderr
    assert "magi.mp4: 48x32, 48 frames (2 s) in 2 chunks, 4 steps, seed 0, on cpu" in stderr
    assert "wrote" in stderr
    info = probe("magi.mp4")
    assert (info.width, info.height, info.fps, info.frames, info.seconds) == (48, 32, 24, 48, 2.0)
    assert [path.name for path in Path().iterdir()] == ["magi.mp4"]


def test_the_file_says_how_it_was_made(magi, tmp_path):
    image = shutil.copy(PHOTO, tmp_path / "my cat.jpg")
    settings = ["--prompt", "Eine Kätzchen", "--prompt", "Then a dog", "--style", "hq", "dynamic", "--seed", 7]
    assert magi("generate", *settings, "--image", image, "--seconds", 2, *SMALL, "--out", "new/x.mp4")[0] == 0
    tags = read_metadata("new/x.mp4")
    assert tags["title"] == "Eine Kätzchen"
    assert str(tmp_path) not in tags["comment"], "where somebody keeps pictures is nobody's business"
    made = json.loads(tags["comment"])["magi"]
    assert made["prompt"] == ["Eine Kätzchen", "Then a dog"]
    assert (made["image"], made["video"]) == ("my cat.jpg", None)
    assert (made["seed"], made["size"], made["steps"], made["window"]) == (7, "48x32", 4, 4)
    assert made["style"] == ["hq", "dynamic"]


def test_the_arguments_reach_the_request(tmp_path, monkeypatch, magi):
    seen = []
    monkeypatch.setattr(generate, "write_video", lambda pipe, request, args: seen.append(request) or 0)
    magi("generate", "--prompt", "a", "--frames", 30, "--seed", 5, "--window", 2, "--style", "--no-duration", *SMALL)
    request = seen.pop()
    assert (request.prompt, request.frames, request.seconds, request.seed) == ("a", 30, None, 5)
    assert (request.height, request.width, request.num_steps, request.window_size) == (32, 48, 4, 2)
    assert (request.style_tokens, request.duration_tokens, request.negative_tokens) == ((), False, False)
    assert request.clean_prompt
    magi("generate", "--prompt", "a", "--prompt", "b", "--video", "v", "--continue-seconds", 1.5, "--fit", "pad")
    request = seen.pop()
    assert (request.prompt, request.video, request.continue_seconds, request.fit) == (("a", "b"), "v", 1.5, "pad")
    assert (request.seconds, request.style_tokens, request.duration_tokens) == (4.0, ("hq",), True)
    assert (request.height, request.width, request.num_steps, request.window_size) == (None,) * 4
    magi("generate", "--prompt", "a", "--image", "i", "--negative", "--raw-prompt", "--size", "480p")
    request = seen.pop()
    assert (request.image, request.negative_tokens, request.clean_prompt) == ("i", True, False)
    assert (request.area, request.height, request.width) == ("480p", None, None)


@pytest.mark.parametrize("text", ["96x64", "96X64", "96×64", "96*64"])
def test_ways_to_write_a_size(text):
    assert generate.parse_size(text) == (64, 96)


def test_a_named_size_takes_the_shape_of_the_input(magi, tmp_path):
    Image.new("RGB", (90, 160)).save(tmp_path / "tall.png")
    for options, width, height in [(("--image", "tall.png"), 256, 448), ((), 448, 256)]:
        magi(
            "generate", "--prompt", "a", "--size", "256p", "--seconds", 1, *options, "--out", "size.mp4", "--overwrite"
        )
        info = probe("size.mp4")
        assert (info.width, info.height) == (width, height)


def test_a_video_goes_on(magi):
    magi("generate", "--prompt", "A cat", "--seconds", 1, *SMALL, "--out", "first.mp4")
    status, _ = magi("generate", "--prompt", "A cat", "--video", "first.mp4", "--seconds", 2, *SMALL)
    assert status == 0
    assert probe("magi.mp4").frames == 48


@pytest.mark.parametrize("size", ["64x64", "64X64", "96x64"])
def test_another_size_than_the_embedded_models_is_a_note(size, magi):
    arguments = ["--prompt", "A red ring rests.", "--seconds", 1, "--steps", 8, "--model", "embedded", "--size", size]
    status, stderr = magi("generate", *arguments)
    assert status == 0
    assert ("At 96x64 its shapes come out broken." in stderr) == (size == "96x64")


def test_words_that_the_embedded_model_does_not_know_are_a_note(magi):
    status, stderr = magi(
        "generate", "--prompt", "A small red dragon moves left.", "--seconds", 1, "--model", "embedded"
    )
    assert status == 0
    assert 'note: The text encoder does not know "dragon": to it any unknown word is the same.' in stderr


@pytest.mark.parametrize("prompt", ["", "   ", "https://example.com/"])
def test_a_prompt_of_which_nothing_is_left_is_a_note(prompt, magi):
    status, stderr = magi("generate", "--prompt", prompt, "--seconds", 1, *SMALL)
    assert status == 0
    assert f"note: Nothing of the prompt {prompt!r} is left to encode: it runs as unconditional." in stderr
    assert probe("magi.mp4").frames == 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "100x64"], "Width 100.*96 and 112"),
        (["--size", "64x100"], "Height 100.*96 and 112"),
        (["--size", "16x64"], "Width 16.*32"),
        (["--size", "huge"], "'huge'.*1280x720.*480p"),
        (["--seconds", "0"], "seconds is 0.*above 0"),
        (["--seconds", "-1"], "seconds is -1.*above 0"),
        (["--seconds", "nan"], "seconds is nan.*above 0"),
        (["--frames", "0"], "frames is 0.*above 0"),
        (["--steps", "10"], "10 steps.*Use 8 or 12 steps"),
        (["--steps", "0"], "steps is 0"),
        (["--window", "3"], "window of 3"),
        (["--image", "{photo}", "--video", "{photo}"], "Both.*Give one"),
        (["--image", "none.png"], "none.png.*Check the path"),
        (["--image", "empty.png"], "empty.png' is empty"),
        (["--image", "text.png"], "text.png' is not a picture.*PNG"),
        (["--image", "."], "is a folder"),
        (["--video", "text.png"], "text.png' is not a video"),
        (["--video", "{photo}"], "still picture.*Use it as an image"),
        (["--video", "{photo}", "--continue-seconds", "0"], "continue_seconds is 0.*above 0"),
        (["--prompt", "b"] * 5, "6 prompts for 4 chunks"),
        (["--out", "clip.avi"], "clip.avi.*mp4"),
        (["--out", "text.png/clip.mp4"], "clip.mp4"),
        (["--out", "folder.mp4"], "folder.mp4' is a folder"),
        (["--crf", "99"], "99"),
        (["--device", "tpu"], "'tpu'.*cpu"),
        (["--model", "4.5B_bas"], r"'4.5B_bas'.*4\.5B_base"),
        (["--model", "4.5B_base"], "transformer is not at .*python -m magi download 4.5B_base --folder models"),
        (["--model", "{files}/transformer"], "VAE is not at .*python -m magi download vae --folder models"),
        (["--model", "{files}/transformer", "--vae", "{files}/vae"], "text encoder is not at .*magi download t5"),
        (
            ["--model", "{files}/transformer", "--vae", "{files}/vae", "--text-encoder", "{files}/text_encoder"],
            "special",
        ),
        (["--model", "{photo}", "{parts}"], "cat.jpg.*is not a safetensors file: it is a picture"),
        (["--model", "{files}/vae", "{parts}"], "is a MAGI-1 VAE.*Give it as the VAE"),
        (
            ["--model", "{files}/transformer", "{parts}", "--variant", "base"],
            "distilled weights.*variant distilled",
        ),
        (["--model", "{files}/transformer", "{parts}", "--config", "none.json"], "none.json"),
        (["--attention", "quick"], "no attention 'quick'.*auto, flash"),
    ],
)
def test_mistakes_end_in_one_line_before_any_work(arguments, message, magi, files, tmp_path, nothing_is_loaded):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("This is no picture.\n" * 50)
    (tmp_path / "folder.mp4").mkdir()
    before = sorted(tmp_path.iterdir())
    values = {"photo": PHOTO, "files": files.vae.parent}
    given = []
    for argument in arguments:
        given += model_arguments(files) if argument == "{parts}" else [argument.format(**values)]
    status, stderr = magi("generate", "--prompt", "A cat", *given)
    assert status == 1
    assert re.search(message, error_of(stderr)), stderr
    assert sorted(tmp_path.iterdir()) == before


def test_fp8_storage_and_the_kernel_reach_the_transformer(magi, monkeypatch):
    load, asked = resident_models.load_transformer, {}
    monkeypatch.setattr(
        resident_models, "load_transformer", lambda *args, **options: asked.update(options) or load(*args, **options)
    )
    assert magi("generate", "--prompt", "A cat", "--seconds", 1, *SMALL, "--fp8-storage", "--attention", "math")[0] == 0
    assert (asked["precision"], asked["attention"]) == ("fp8", "math")


def test_compiling_reaches_the_transformer(magi, monkeypatch):
    load, asked = resident_models.load_transformer, {}

    def eager(*args, **options):  # a compiler takes minutes, and need not be there
        asked.update(options)
        return load(*args, **options | {"compiled": False})

    monkeypatch.setattr(resident_models, "load_transformer", eager)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert magi("generate", "--prompt", "A cat", "--seconds", 1, *SMALL, "--compile")[0] == 0
    assert asked["compiled"] is True


def test_no_compiler_is_told_before_anything_is_loaded(magi, nothing_is_loaded, monkeypatch):
    def missing(function, **_):
        def call(*_):
            raise RuntimeError("Failed to find C compiler\nmany lines more")

        return call

    monkeypatch.setattr(torch, "compile", missing)
    status, stderr = magi("generate", "--prompt", "A cat", "--seconds", 1, *SMALL, "--compile")
    assert status == 1
    assert "(Failed to find C compiler). It needs a C++ compiler" in error_of(stderr)
    assert "many lines more" not in stderr


def test_no_prompt(magi, nothing_is_loaded):
    status, stderr = magi("generate")
    assert status == 1
    assert error_of(stderr) == 'error: No prompt is given. Say what to show: --prompt "A cat looks around".'


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="may write anywhere")
def test_a_folder_that_cannot_be_written(magi, tmp_path, nothing_is_loaded):
    (tmp_path / "locked").mkdir(mode=0o555)
    status, stderr = magi("generate", "--prompt", "A cat", "--out", "locked/x.mp4", *SMALL)
    assert status == 1
    assert "locked" in stderr


def test_a_file_that_is_there_is_replaced_only_on_request(magi, tmp_path, nothing_is_loaded, monkeypatch):
    there = tmp_path / "magi.mp4"
    there.write_bytes(b"a video of mine")
    status, stderr = magi("generate", "--prompt", "A cat", *SMALL)
    assert status == 1
    assert "exists" in stderr
    assert there.read_bytes() == b"a video of mine"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert magi("generate", "--prompt", "A cat", "--seconds", 1, *SMALL, "--overwrite")[0] == 0
    assert probe(there).frames == 24


# Base and distilled


def without_a_config(files: ModelFiles, folder: Path) -> Path:
    folder.mkdir()
    return Path(shutil.copy(files.transformer / "model.safetensors", folder))


def test_the_variant_of_unnamed_weights(magi, files, tmp_path):
    model = ["--model", without_a_config(files, tmp_path / "weights"), *model_arguments(files)]
    status, stderr = magi("generate", "--prompt", "A cat", *model)
    assert status == 1
    assert "Choose the variant: base or distilled." in error_of(stderr)
    for variant, passes in (("distilled", 1), ("base", 3)):
        out = ["--seconds", 1, *SMALL, "--out", f"{variant}.mp4", "--variant", variant]
        assert magi("generate", "--prompt", "A cat", *model, *out)[0] == 0
        made = json.loads(read_metadata(f"{variant}.mp4")["comment"])["magi"]
        assert made["passes"] == passes


@pytest.mark.parametrize(("name", "wrong"), [("magi_base", "distilled"), ("magi_distill", "base")])
def test_names_that_contradict_the_variant(name, wrong, magi, files, tmp_path, nothing_is_loaded):
    model = ["--model", without_a_config(files, tmp_path / name), *model_arguments(files)]
    status, stderr = magi("generate", "--prompt", "A cat", *model, "--variant", wrong)
    assert status == 1
    assert f"so says the name {name}" in error_of(stderr)


def test_a_released_model_of_the_other_variant(magi, files, tmp_path, nothing_is_loaded):
    shutil.copytree(files.transformer, tmp_path / "models/ckpt/magi/4.5B_base/inference_weight")
    model = ["--model", "4.5B_base", *model_arguments(files)]
    status, stderr = magi("generate", "--prompt", "A cat", *model, "--variant", "distilled")
    assert status == 1
    assert "variant distilled is chosen, but the settings are for base" in error_of(stderr)


# What is finished stays


def play(path: Path) -> int:
    """Frames that a player shows."""
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals to send to one process")
@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_ctrl_c_and_termination_keep_the_finished_chunks(cache, tmp_path, number, status, word):
    command = [sys.executable, "-m", "magi", "generate", "--prompt", "A cat", "--seconds", "600", "--cache", str(cache)]
    with subprocess.Popen(
        [*command, *SMALL, "--out", "long.mp4"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        **INTERRUPTIBLE,
    ) as process:
        partial = tmp_path / "long.partial.mp4"
        deadline = time.monotonic() + 60
        while not (partial.exists() and partial.stat().st_size > 10_000) and time.monotonic() < deadline:
            time.sleep(0.05)
        sent = time.monotonic()
        process.send_signal(number)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == status, stderr
    assert time.monotonic() - sent < 5
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1] == word
    frames = play(partial)
    assert frames > 0
    assert frames % 12 == 0, "whole temporal tiles"
    assert f"The {frames} frames finished so far are in" in stderr
    assert "the same command with --resume continues it" in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.partial.mp4", "long.run"]


def test_an_interrupt_before_the_first_chunk_leaves_nothing(magi, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(resident_models, "load_transformer", interrupted)
    status, stderr = magi("generate", "--prompt", "A cat", *SMALL)
    assert status == 130
    assert stderr.splitlines()[-1] == "interrupted"
    assert "finished so far" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_finished_chunks(magi, tmp_path, file_size_limit):
    arguments = ["--prompt", "A cat", "--seconds", 6, "--crf", 1, "--steps", 4, "--device", "cpu", "--size", "64x64"]
    assert magi("generate", *arguments, "--out", "whole.mp4")[0] == 0
    limit = (tmp_path / "whole.mp4").stat().st_size // 2
    with file_size_limit(limit):
        status, stderr = magi("generate", *arguments, "--out", "cut.mp4")
    assert status == 1
    assert "Traceback" not in stderr
    message = stderr.splitlines()[-1]
    assert message.startswith("error: ")
    assert "Make room" in message
    frames = play(tmp_path / "cut.partial.mp4")
    assert 24 <= frames < 144
    assert f"first {frames} frames are kept" in message
    assert "The state of the run cannot be saved" in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.partial.mp4", "whole.mp4"]
    whole, kept = (read_video(tmp_path / name) for name in ("whole.mp4", "cut.partial.mp4"))
    assert (whole[:frames].float() - kept.float()).abs().mean() < 1


# demo


def setting(path: str, name: str) -> object:
    """What a video's own metadata say of how it was made."""
    return json.loads(read_metadata(path)["comment"])["magi"][name]


def test_the_demo_makes_three_videos(magi, tmp_path):
    for _ in range(2):  # again: the last demo is replaced
        status, stderr = magi("demo", "--steps", 8, "--device", "cpu")
        assert status == 0
        assert stderr.count("wrote") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.mp4", "demo_continued.mp4", "demo_picture.mp4"]
    for name, frames in (("demo", 96), ("demo_picture", 72), ("demo_continued", 96 + 48)):
        info = probe(f"{name}.mp4")
        assert (info.width, info.height, info.frames) == (256, 256, frames)
        assert setting(f"{name}.mp4", "size") == "64x64"
    assert len(set(setting("demo.mp4", "prompt"))) == 2
    assert setting("demo_picture.mp4", "image") == "star.png"
    first, both = (read_video(name).float() for name in ("demo.mp4", "demo_continued.mp4"))
    assert (both[:96] - first).abs().mean() < 1, "what is continued comes first"
    squares = first.reshape(96, 64, 4, 64, 4, 3)
    assert (squares - squares.mean((2, 4), keepdim=True)).abs().mean() < 1, "pixels become squares"


def test_the_demo_speaks_as_the_model_was_taught():
    for prompt in {*demo.TEXT, *demo.PICTURE, *demo.CONTINUED}:
        assert set(words(prompt)) <= set(vocabulary()), prompt


def test_the_demo_of_another_length(magi):
    assert magi("demo", "--seconds", 1, "--steps", 8, "--device", "cpu")[0] == 0
    assert [probe(f"demo{name}.mp4").frames for name in ("", "_picture", "_continued")] == [24, 24, 48]
    assert len(setting("demo.mp4", "prompt").split(".")) == 2, "a single prompt"


def test_a_demo_of_ones_own_is_one_video(magi, tmp_path):
    options = ["--seconds", 1, "--steps", 8, "--device", "cpu"]
    status, stderr = magi("demo", "--prompt", "A blue square grows.", *options)
    assert status == 0
    assert "moving shapes at 64x64" in stderr
    assert (probe("demo.mp4").width, setting("demo.mp4", "prompt")) == (256, "A blue square grows.")
    assert magi("demo", "--image", PHOTO, *options, "--size", "48x32")[0] == 0
    assert (probe("demo.mp4").width, setting("demo.mp4", "image")) == (48, "cat.jpg"), "a photo takes the photo model"
    assert magi("demo", "--model", "embedded-photo", *options, "--size", "48x32")[0] == 0
    assert setting("demo.mp4", "image") == "cat.jpg"
    assert [path.name for path in tmp_path.iterdir()] == ["demo.mp4"]
    status, stderr = magi("demo", "--model", "embedded-base", "--image", PHOTO)
    assert status == 1
    assert "No prompt is given. Say how the shape moves" in error_of(stderr)


@pytest.mark.parametrize("name", ["holiday.mp4", "holiday_continued.mp4"])
def test_the_three_videos_replace_no_file_that_somebody_named(name, magi, tmp_path, nothing_is_loaded):
    (tmp_path / name).write_bytes(b"mine")
    status, stderr = magi("demo", "--out", "holiday.mp4")
    assert status == 1
    assert "exists" in error_of(stderr)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]


@pytest.mark.parametrize("name", ["demo.mp4", "demo_picture.mp4", "demo_continued.mp4"])
def test_the_demo_replaces_demos_only(name, magi, tmp_path):
    """A file of one's own may be called demo.mp4, too: a video that `generate` wrote, or a holiday."""
    assert magi("generate", "--prompt", "A cat", "--image", PHOTO, "--seconds", 1, *SMALL, "--out", name)[0] == 0
    for data in ((tmp_path / name).read_bytes(), b"holiday", b""):
        (tmp_path / name).write_bytes(data)
        status, stderr = magi("demo", "--seconds", 1, "--steps", 8, "--device", "cpu")
        assert status == 1
        assert f"{name}' exists" in stderr
        assert (tmp_path / name).read_bytes() == data
    assert magi("demo", "--seconds", 1, "--steps", 8, "--device", "cpu", "--overwrite")[0] == 0
    assert probe(name).width == 256


def test_the_demo_replaces_no_file_that_somebody_named(magi, tmp_path, nothing_is_loaded):
    mine = tmp_path / "holiday.mp4"
    mine.write_bytes(b"mine")
    status, stderr = magi("demo", "--seconds", 1, *SMALL, "--out", mine)
    assert status == 1
    assert "exists" in error_of(stderr)
    assert mine.read_bytes() == b"mine"


def test_a_cache_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for command in (["demo"], ["generate", "--prompt", "A cat"]):
        assert main([*command, "--model", "embedded-photo", "--cache", str(tmp_path / "file")]) == 1
        assert "Choose a folder" in error_of(capsys.readouterr().err)


def test_an_embedding_cache_that_cannot_be_written_is_a_note(cache, tmp_path, monkeypatch, capsys):
    own = tmp_path / "own"
    shutil.copytree(cache, own, ignore=lambda *_: ["text"])
    (own / "text").touch()  # a file in the folder's place
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", "embedded-photo", "--prompt", "A dog", "--seconds", "1", *SMALL]
    assert main(["generate", *arguments, "--cache", str(own)]) == 0
    assert "note: The folder of cached text embeddings" in capsys.readouterr().err


def test_a_prompt_met_before_needs_no_text_encoder(magi, files, tmp_path):
    t5 = shutil.copytree(files.text_encoder, tmp_path / "t5")
    command = ["generate", "--model", files.transformer, "--vae", files.vae, "--text-encoder", t5, "--seconds", 1]
    command += ["--special-tokens", files.special_tokens, *SMALL]
    assert magi(*command, "--prompt", "A new cat", "--out", "one.mp4")[0] == 0
    shutil.rmtree(t5)
    status, stderr = magi(*command, "--prompt", "A new cat", "--out", "two.mp4")
    assert status == 0, stderr
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()
    status, stderr = magi(*command, "--prompt", "A new dog", "--out", "three.mp4")
    assert status == 1
    assert "magi download t5" in error_of(stderr)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one.mp4", "two.mp4"]


# inspect


def inspect(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def facts(capsys, *arguments: object) -> dict:
    return json.loads(inspect(capsys, *arguments, "--json"))


def test_inspect_a_transformer(golden, capsys):
    found = facts(capsys, golden / "dit_a.safetensors")
    assert found["is"] == "MAGI-1 of another size base or distill"
    assert found["complete"] == "yes"
    assert "F32" in found["types"] or "BF16" in found["types"]
    assert found["size"].endswith("in 1 file")
    for part in ("VAE", "T5", "special_tokens.npz"):
        assert part in found["needs"]
    text = inspect(capsys, golden / "dit_a.safetensors")
    assert "MAGI-1 of another size base or distill" in text
    assert "x_embedder.weight" not in text
    listed = inspect(capsys, golden / "dit_a.safetensors", "--tensors")
    assert any(line.split()[0] == "x_embedder.weight" for line in listed.splitlines() if line.strip())


def test_inspect_float8(golden, capsys):
    found = facts(capsys, golden / "dit_b_fp8.safetensors", "--tensors")
    assert found["is"].endswith("fp8")
    assert "F8_E4M3" in found["types"]
    assert any(dtype == "F8_E4M3" for dtype, *_ in found["tensors"].values())


def test_inspect_says_what_is_missing(files, tmp_path, capsys):
    tensors = load_file(files.transformer / "model.safetensors")
    del tensors["rope.bands"]
    save_file(tensors, tmp_path / "x.safetensors")
    assert facts(capsys, tmp_path / "x.safetensors")["complete"].startswith("no. ")
    assert "rope.bands" in inspect(capsys, tmp_path / "x.safetensors")


def write_header(file: Path, tensors: dict[str, tuple[str, tuple[int, ...], int]]) -> int:
    """A safetensors file of (type, shape, bytes) tensors whose data is a hole but for each one's end. Returns its size."""
    header, end = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end := end + size]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for entry in header.values():
            stream.seek(8 + len(text) + entry["data_offsets"][1] - 1)
            stream.write(b"\x01")
    return 8 + len(text) + end


@pytest.mark.skipif(os.name == "nt", reason="needs files with holes: the weights are not written")
@pytest.mark.parametrize("preset", PRESETS)
def test_inspect_a_released_model_in_its_folder(preset, tmp_path, capsys):
    config = PRESETS[preset]
    fp8, distill = config.engine.fp8_quant, config.engine.distill
    folder = tmp_path / preset / f"inference_weight{'.fp8' * fp8}{'.distill' * distill}"
    folder.mkdir(parents=True)
    shards: dict[str, dict] = {}
    for name, shape in tensor_shapes(config.model, fp8).items():
        quantised = fp8 and len(shape) == 3 and name.endswith(".weight")
        layer = re.search(r"layers\.(\d+)\.", name)
        shard = shards.setdefault(f"model-{layer[1] if layer else 'outer'}.safetensors", {})
        size = math.prod(shape) * (1 if quantised else 2)
        shard[name] = ("F8_E4M3" if quantised else "BF16", shape, size)
    size = sum(write_header(folder / file, tensors) for file, tensors in shards.items())
    places = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    found = facts(capsys, folder)
    assert found["is"] == f"MAGI-1 {preset.replace('_quant', ' fp8').replace('_', ' ')}"
    assert found["complete"] == "yes"
    assert found["size"] == f"{size / 1e9:.2f} GB in {config.model.num_layers + 1} files"
    if preset == "4.5B_base":
        assert found["parameters"] == "4,459,898,128"


def test_inspect_the_other_parts(files, tmp_path, capsys):
    assert facts(capsys, files.vae)["is"] == "a MAGI-1 VAE"
    assert facts(capsys, files.text_encoder)["is"] == "a T5 text encoder"
    save_file({"unet.weight": torch.zeros(3, 4)}, tmp_path / "other.safetensors", {"made": "by me"})
    other = facts(capsys, tmp_path / "other.safetensors")
    assert other["is"] == "no MAGI-1 file"
    assert (other["parameters"], other["types"], other["metadata"]) == ("12", "1 F32", {"made": "by me"})


def test_inspect_the_official_text_encoder_of_bin_shards(files, tmp_path, capsys):
    torch.save(load_file(files.text_encoder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    shutil.copy(files.text_encoder / "config.json", tmp_path)
    found = facts(capsys, tmp_path)
    assert found["is"] == "a T5 text encoder"
    assert "tokenizer" in found["needs"]


def test_inspect_tells_of_each_part_whether_it_is_whole(files, tmp_path, capsys):
    for part in (files.transformer, files.vae, files.text_encoder):
        assert facts(capsys, part)["complete"] == "yes"
        (weights,) = part.glob("*.safetensors")
        tensors = load_file(weights)
        gone = next(name for name in reversed(tensors) if name.endswith("weight"))
        folder = shutil.copytree(part, tmp_path / part.name)
        save_file({name: t for name, t in tensors.items() if name != gone}, folder / weights.name)
        assert facts(capsys, folder)["complete"].startswith("no. "), part.name


def test_inspect_names_the_layers_that_a_config_wants(files, tmp_path, capsys):
    folder = shutil.copytree(files.transformer, tmp_path / "t")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layers = config["model_config"]["num_layers"]
    config["model_config"]["num_layers"] = layers + 1
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8-sig")
    assert facts(capsys, folder)["complete"].startswith(
        f"no: it holds {layers}, and config.json near it says {layers + 1}"
    )


def test_inspect_obeys_no_name_in_a_file(tmp_path, capsys):
    evil = "a\x1b[2J\x1b]0;owned\x07\u202e"
    save_file({evil + "x" * 10_000: torch.zeros(3)}, tmp_path / "x.safetensors", {evil: evil + "y" * 100_000})
    text = inspect(capsys, tmp_path / "x.safetensors", "--tensors")
    assert text.replace("\n", "").isprintable()
    assert len(text) < 4000


def test_inspect_says_what_stands_in_front_of_all_names(files, tmp_path, capsys):
    (weights,) = files.transformer.glob("*.safetensors")
    save_file({f"model.diffusion_model.{n}": t for n, t in load_file(weights).items()}, tmp_path / "x.safetensors")
    found = facts(capsys, tmp_path / "x.safetensors")
    assert found["complete"] == "yes"
    assert found["names begin"] == "with model.diffusion_model. (left out here)"


def test_inspect_what_cannot_be_read(magi, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    (tmp_path / "empty.safetensors").touch()
    for name in ("x.png", "empty.safetensors", "none.safetensors", "."):
        status, stderr = magi("inspect", tmp_path / name)
        assert status == 1
        assert tmp_path.name in error_of(stderr)


@pytest.mark.parametrize("name", ["x.bin", "x.PT", "x.pth", "x.ckpt", "x.gguf", "pytorch_model-00001-of-00002.bin"])
def test_inspect_a_file_of_another_format(name, magi, tmp_path):
    if name == "x.gguf":
        (tmp_path / name).write_bytes(b"GGUF\x03\0\0\0")
    else:
        torch.save({"encoder.weight": torch.zeros(3)}, tmp_path / name)
    status, stderr = magi("inspect", tmp_path / name)
    said = error_of(stderr)
    assert status == 1
    assert name in said
    assert "truncated" not in said
    assert ("GGUF" if name.endswith("gguf") else "torch file") in said
    if "pytorch_model" in name:
        assert f"magi inspect {tmp_path}`" in said
    else:
        assert ".safetensors" in said


def test_inspect_goes_by_the_content_where_it_can(magi, files, tmp_path, capsys):
    shutil.copy(files.vae / "diffusion_pytorch_model.safetensors", tmp_path / "vae.bin")
    assert facts(capsys, tmp_path / "vae.bin")["is"] == "a MAGI-1 VAE"
    (tmp_path / "empty.bin").touch()
    status, stderr = magi("inspect", tmp_path / "empty.bin")
    assert status == 1
    assert "is empty" in error_of(stderr)


# The command line itself


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert COMMANDS[command][1].split()[-1] in text
    assert "None" not in text, "a default that says nothing"
    options = {"generate": "--variant", "demo": "--out", "inspect": "--json", "bench": "--preset", "download": "--list"}
    options |= {"synth": "--shard-size", "plan": "--memory", "remote": "--resume-id"}
    assert options[command] in text


def test_the_commands_are_listed(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(f"\n    {command} " in text for command in COMMANDS)


@pytest.mark.parametrize(
    "arguments", [[], ["paint"], ["generate", "--sise", "1x1"], ["generate", "--seconds", "1", "--frames", "2"]]
)
def test_arguments_that_are_not_understood(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: python -m magi" in capsys.readouterr().err


def test_python_m_magi_from_another_folder(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "magi", "inspect", "none.safetensors"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert "none.safetensors" in error_of(result.stderr)


def test_an_interrupt_anywhere_is_no_traceback(monkeypatch, capsys):
    from magi.cli import inspect as command

    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "main", interrupted)
    assert main(["inspect", "x"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


# Progress bars


class Screen:
    """A terminal that keeps what was last shown on each line."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.lines, self.row, self.column = [""], 0, 0

    def write(self, text: str) -> None:
        for part in text.replace("\x1b[A", "\x00"):
            if part == "\x00":
                self.row = max(0, self.row - 1)
            elif part == "\n":
                self.row, self.column = self.row + 1, 0
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif part == "\r":
                self.column = 0
            else:
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + part + line[self.column + 1 :]
                self.column += 1

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


def test_the_bars_leave_a_tidy_screen(monkeypatch, cache, tmp_path):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "90")
    arguments = ["generate", "--prompt", "A red star", "--image", str(PHOTO), "--seconds", "2"]
    assert main([*arguments, *SMALL, "--cache", str(cache), "--out", str(tmp_path / "x.mp4")]) == 0
    shown = [line.rstrip() for line in screen.lines if line.strip()][2:]
    titles = ["text encoder", "encoding the input", "loading the model", "sampling", "wrote"]
    assert [next((t for t in titles if line.startswith(t)), line) for line in shown] == titles
    assert all("100%" in line for line in shown[:-1])


# Numbers that are none


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_damaged_weights_make_no_video(part, magi, files, tmp_path):
    """Weights with NaN run like sound ones. What comes out is none, and must not be called a video."""
    for name in ("transformer", "vae"):
        shutil.copytree(getattr(files, name), tmp_path / name)
    (path,) = (tmp_path / part).glob("*.safetensors")
    weights = load_file(path)
    last = [name for name in weights if name.endswith(("linear_fc2.weight", "fc2.weight"))][-1]
    weights[last][0, 1] = float("nan")
    save_file(weights, path)
    own = ["--model", tmp_path / "transformer", *model_arguments(files), "--vae", tmp_path / "vae"]
    status, stderr = magi("generate", "--prompt", "A cat", "--image", PHOTO, "--seconds", 1, *SMALL, *own)
    assert status == 1
    assert "NaN or infinity" in stderr
    assert "the file is damaged" in stderr or "its file is damaged" in stderr
    assert not list(tmp_path.glob("*.mp4"))

"""The embedded model: its files are in the package, fit each other, and make a video; a broken install is told."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from magi.cli.demo import CONTINUED, PICTURE, TEXT
from magi.errors import MagiError
from magi.media.video_reader import read_image
from magi.model_files import embedded
from magi.model_files.embedded import DEMO_IMAGE, DEMO_SHAPE, EMBEDDED_SIZE, embedded_files, is_embedded
from magi.model_files.identify import recognise
from magi.model_files.repeating import repeating_files
from magi.pipeline.pipeline import MagiPipeline, Request
from magi.sampling.special_tokens import SpecialTokens
from magi.text.t5_checkpoint import read_t5
from magi.text.t5_tokenizer import find_tokenizer, load_tokenizer
from tools.train_embedded import world

KINDS = pytest.mark.parametrize("kind", ["distill", "base"])
PROMPT = "A small red circle moves to the right on a white background."


@KINDS
def test_all_parts_are_there_and_fit(kind):
    files = embedded_files(kind)
    found = recognise(files.transformer)
    assert found.kind == "transformer"
    width = found.model.caption_channels
    assert recognise(files.vae).kind == "vae"
    assert read_t5(files.text_encoder).shape.d_model == width
    assert SpecialTokens.load(files.special_tokens).width == width
    tokens = load_tokenizer(find_tokenizer(files.text_encoder, None)).encode(PROMPT)
    assert len(set(tokens)) > 10, "words that the tokenizer knows"


@pytest.mark.parametrize(("kind", "distilled"), [("distill", True), ("base", False)])
def test_their_files_tell_which_is_distilled(kind, distilled):
    assert recognise(embedded_files(kind).transformer).distilled is distilled


def test_what_is_embedded(tmp_path):
    files = embedded_files("base")
    assert all(is_embedded(path) for path in vars(files).values() if path)
    assert not is_embedded(DEMO_IMAGE)
    assert not is_embedded(repeating_files(tmp_path).vae)


@pytest.mark.parametrize(
    "name",
    [
        *("transformer/model.safetensors", "transformer/config.json", "vae/diffusion_pytorch_model.safetensors"),
        *("text_encoder/model.safetensors", "text_encoder/tokenizer.json", "special_tokens.npz"),
    ],
)
@pytest.mark.parametrize("damage", ["cut off", "zeros", "pointer"])
def test_a_file_that_is_damaged_is_not_to_be_downloaded_again(name, damage, tmp_path, monkeypatch):
    """Nobody can: it is part of the pack."""
    broken = shutil.copytree(embedded._FOLDER, tmp_path / "embedded")
    monkeypatch.setattr(embedded, "_FOLDER", broken)
    content = (broken / name).read_bytes()
    half = len(content) // 2
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3937128\n"
    damaged = {"cut off": content[:half], "zeros": content[:half] + bytes(len(content) - half), "pointer": pointer}
    (broken / name).write_bytes(damaged[damage])
    with pytest.raises(MagiError, match=r"embedded model is damaged: .* Install this pack again") as caught:
        MagiPipeline.embedded()
    assert Path(name).name in str(caught.value)
    assert "ownload" not in str(caught.value).replace("what you downloaded", "")


@pytest.mark.parametrize("name", ["transformer/model.safetensors", "text_encoder/tokenizer.json", "special_tokens.npz"])
def test_a_file_that_is_missing_is_named(name, tmp_path, monkeypatch):
    broken = shutil.copytree(embedded._FOLDER, tmp_path / "embedded")
    monkeypatch.setattr(embedded, "_FOLDER", broken)
    assert embedded_files().vae == broken / "vae"
    (broken / name).unlink()
    with pytest.raises(MagiError, match=rf"{name}' is missing\. Install this pack again"):
        MagiPipeline.embedded()


def test_a_kind_that_is_none():
    with pytest.raises(MagiError, match=r"'distilled'.*distill, base"):
        MagiPipeline.embedded(None, "distilled")


def test_the_repeating_model_needs_a_folder():
    with pytest.raises(MagiError, match="Give a folder"):
        MagiPipeline.embedded(model="repeating")


def test_it_knows_every_word_of_the_demo_and_of_the_first_run():
    files = embedded_files()
    tokenizer = load_tokenizer(find_tokenizer(files.text_encoder, None))
    graph = json.loads((Path(__file__).parents[1] / "workflows_api/magi1_first_run.json").read_text(encoding="utf-8"))
    (prompt,) = (node["inputs"]["prompt"] for node in graph.values() if node["class_type"] == "Magi1TextEncode")
    assert len(prompt.splitlines()) > 1
    texts = (*TEXT, *PICTURE, *CONTINUED, prompt)
    assert [word for text in texts for word in tokenizer.unknown_words(text)] == []
    assert tokenizer.unknown_words("A red Dragon.") == ["Dragon"]


def test_the_picture_is_one_of_its_world():
    scene = world.Scene("star", "large", "dark blue", ("left",), ("yellow",), (48.0, 32.0))
    picture = read_image(DEMO_SHAPE)
    assert picture.shape[1:3] == (EMBEDDED_SIZE, EMBEDDED_SIZE)
    assert np.array_equal(picture[0].numpy(), world.frames(scene)[0])
    assert not world.is_held_out("star", "yellow", "left")


@KINDS
def test_it_makes_a_video_in_float32_and_in_its_own_size(kind):
    pipeline = MagiPipeline.embedded(None, kind, device="cpu")
    picture, far = read_image(DEMO_SHAPE)[0].float(), []
    for start in ({}, {"image": DEMO_SHAPE}):
        clips = pipeline.generate(prompt=PICTURE[0], seconds=1, num_steps=8, seed=1, **start)
        frames = torch.cat([clip.frames for clip in clips])
        assert frames.shape == (24, EMBEDDED_SIZE, EMBEDDED_SIZE, 3)
        far.append((frames[0].float() - picture).abs().mean())
    assert far[1] < 5, "it begins with the picture"
    assert far[0] > 2 * far[1]
    model = pipeline._models.transformer(pipeline.plan(Request(PROMPT, seconds=1)).placement)
    assert model.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "dtype"),
    [({}, torch.float32), ({"precision": "bf16"}, None), ({"dtype": torch.bfloat16}, torch.bfloat16)],
)
def test_another_type_to_compute_in(options, dtype):
    assert MagiPipeline.embedded(None, device="cpu", **options)._dtype == dtype

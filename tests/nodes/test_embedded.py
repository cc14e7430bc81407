"""The embedded model in the nodes: what auto chooses, its one size, and parts of several models that do not fit."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from magi.media.image import read_image
from magi.model_files.embedded import DEMO_IMAGE, DEMO_SHAPE, EMBEDDED_SIZE, embedded_files
from magi.sampling.special_tokens import FILE_NAME as SPECIAL_TOKENS
from tests.support.graph import Graph, NodeError
from tests.support.magi_graphs import (
    EMBEDDED,
    PHOTO,
    clip,
    filled,
    image_to_video,
    node,
    picture,
    refused,
    text_to_video,
    video_to_video,
)

LOADERS = {"model": "model", "vae": "vae", "encoder": "encoder"}  # node in a graph: its widget
SIZE = f"{EMBEDDED_SIZE}x{EMBEDDED_SIZE}"
BASE = "embedded demo model (base)"


def choosing(graph: Graph, name: str, *parts: str) -> Graph:
    """The graph with an entry of the menus chosen in these loaders, by default in all."""
    for part in parts or LOADERS:
        graph[part]["inputs"][LOADERS[part]] = name
    return graph


def texts(comfy, part: str) -> list[str]:
    """The lines that were shown under a node."""
    return [text for name, text in comfy.events.texts if name == part]


def install(comfy, part: str) -> Path:
    """Puts the photo model's files where a released model's belong."""
    source = next((comfy.base / "user/magi1").glob("magi1-repeating-*"))
    places = {"model": "ckpt/magi/{}/inference_weight", "vae": "ckpt/vae", "encoder": "ckpt/t5/t5-v1_1-xxl"}
    name, _, model = part.partition(" ")
    target = comfy.base / "models/magi1" / places[name].format(model)
    shutil.copytree(source / {"model": "transformer", "vae": "vae", "encoder": "text_encoder"}[name], target)
    shutil.copy(source / SPECIAL_TOKENS, comfy.base / "models/magi1")
    return target


# auto


def test_with_nothing_installed_auto_is_the_embedded_model(comfy, reads):
    graph = choosing(text_to_video(comfy), "auto")
    made = comfy.run(graph)
    assert made["decode"][0].shape == (24, EMBEDDED_SIZE, EMBEDDED_SIZE, 3)
    assert (made["model"][0].name, made["model"][0].family) == (EMBEDDED, "embedded")
    assert made["model"][0].transformer.path == embedded_files().transformer
    for part in LOADERS:
        (said,) = texts(comfy, part)
        assert said.startswith(f"auto: {EMBEDDED}")
        assert "choose 4.5B_distill" in said
        assert "\n" not in said
    assert reads == ["transformer", "vae"]


def test_auto_is_the_best_released_model_that_is_installed(comfy):
    menus = comfy.module("nodes.comfyui.menus")
    every = lambda: [menus.chosen(part, "auto") for part in LOADERS]  # noqa: E731
    assert every() == [EMBEDDED] * 3
    official = ["ckpt/vae", "ckpt/t5/t5-v1_1-xxl"]
    for model, best in (("24B_base", "24B_base"), ("4.5B_base", "4.5B_base"), ("24B_distill", "4.5B_base")):
        install(comfy, f"model {model}")
        assert every() == [best, *official]
    assert menus.chosen("model", EMBEDDED) == EMBEDDED


def test_a_download_that_has_only_begun_is_not_installed(comfy):
    (comfy.base / "models/magi1/ckpt/magi/4.5B_distill/inference_weight.distill").mkdir(parents=True)
    assert comfy.module("nodes.comfyui.menus").chosen("model", "auto") == EMBEDDED


def test_auto_with_a_released_model_takes_the_official_parts_and_misses_them(comfy):
    install(comfy, "model 4.5B_distill")
    graph = choosing(text_to_video(comfy), "auto")
    for part, said in (("vae", "The VAE is not in"), ("encoder", "The text encoder is not in")):
        with pytest.raises(NodeError, match=said):
            comfy.run({part: graph[part]})
    with pytest.raises(NodeError, match="is not in"):
        comfy.run(graph)


def test_a_model_that_was_installed_since_is_loaded(comfy):
    graph = choosing(text_to_video(comfy), "auto")
    comfy.run(graph)
    comfy.run(graph)
    assert comfy.executed == []
    for part in ("model 4.5B_distill", "vae", "encoder"):
        install(comfy, part)
    made = comfy.run(graph)
    assert {"model", "vae", "encoder"} <= set(comfy.executed)
    assert made["model"][0].name == "4.5B_distill"
    assert made["decode"][0].shape[1:3] == (48, 64), "any size"
    assert texts(comfy, "vae")[-1] == "auto: ckpt/vae"


# Precision and size


@pytest.mark.parametrize("name", [EMBEDDED, BASE])
def test_it_computes_in_float32(comfy, name):
    graph = choosing(text_to_video(comfy), EMBEDDED)
    graph["model"]["inputs"]["model"] = name
    made = comfy.run(graph)
    model = made["model"][0]
    assert model.transformer.loaded.dtype == torch.float32
    assert model.transformer.path == embedded_files("base" if name == BASE else "distill").transformer
    assert made["vae"][0].loaded().dtype == torch.float32
    graph["model"]["inputs"]["precision"] = "bf16"
    assert comfy.run(graph)["model"][0].transformer.loaded.dtype == torch.bfloat16


def test_an_empty_start_of_another_size_is_a_notice(comfy):
    made = comfy.run(choosing(text_to_video(comfy), EMBEDDED))
    assert made["decode"][0].shape[1:3] == (EMBEDDED_SIZE, EMBEDDED_SIZE)
    assert f"makes {SIZE} only; 64x48 was asked for" in texts(comfy, "sampler")[-1]


def test_its_own_size_is_no_notice(comfy):
    graph = choosing(text_to_video(comfy), EMBEDDED)
    graph["start"]["inputs"] |= {"width": EMBEDDED_SIZE, "height": EMBEDDED_SIZE}
    comfy.run(graph)
    assert "asked" not in texts(comfy, "sampler")[-1]
    del graph["sampler"]["inputs"]["start"]
    assert comfy.run(graph)["decode"][0].shape[1:3] == (EMBEDDED_SIZE, EMBEDDED_SIZE)


@pytest.mark.parametrize("kind", ["picture", "clip"])
def test_a_picture_or_clip_is_fitted_to_its_size(comfy, kind):
    graph = image_to_video(comfy, picture()) if kind == "picture" else video_to_video(comfy, "IMAGE", clip(24))
    made = comfy.run(choosing(graph, EMBEDDED))
    assert made["start"][0]["samples"].shape[3:] == (8, 8)
    assert made["decode"][0].shape[1:3] == (EMBEDDED_SIZE, EMBEDDED_SIZE)
    assert f"makes {SIZE} only; 64x48 was asked for" in texts(comfy, "start")[-1]
    assert "asked" not in texts(comfy, "sampler")[-1]


def test_latents_of_another_size_are_refused(comfy):
    latents = torch.randn(1, 16, 2, 6, 8)
    graph = choosing(video_to_video(comfy, "LATENT", {"samples": latents}), EMBEDDED)
    said = refused(comfy, graph)
    assert f"64x48, and the embedded demo model makes {SIZE} only" in said
    assert "MAGI-1 Image to Video" in said


# Parts that do not fit


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("model", "The model is that of the embedded photo model, the text encoder that of the embedded demo model"),
        ("encoder", "the text encoder that of the embedded photo model"),
        ("vae", "the VAE or model that made the start that of the embedded photo model"),
    ],
)
def test_a_part_of_another_model_is_refused_before_the_model_is_loaded(comfy, part, said, reads):
    graph = choosing(image_to_video(comfy, picture(EMBEDDED_SIZE, EMBEDDED_SIZE)), EMBEDDED)
    graph["start"]["inputs"] |= {"width": EMBEDDED_SIZE, "height": EMBEDDED_SIZE}
    choosing(graph, PHOTO, part)
    with pytest.raises(NodeError) as caught:
        comfy.run(graph)
    assert (caught.value.kind, caught.value.node) == ("MagiError", "sampler")
    assert said in caught.value.message
    assert "auto in all three" in caught.value.message
    assert "transformer" not in reads


@pytest.mark.parametrize("preview", [True, False])
def test_latents_are_not_decoded_by_the_vae_of_another_model(comfy, preview, reads):
    graph = choosing(text_to_video(comfy), EMBEDDED)
    choosing(graph, PHOTO, "vae")
    if preview:
        graph["sampler"]["inputs"]["vae"] = ["vae", 0]
    with pytest.raises(NodeError, match="do not understand each other") as caught:
        comfy.run(graph)
    assert caught.value.node == ("sampler" if preview else "decode")
    assert "vae" not in reads
    assert ("transformer" in reads) is not preview


def test_latents_that_another_model_made_are_not_continued(comfy):
    made = comfy.run(choosing(text_to_video(comfy), PHOTO))["sampler"][0]
    graph = choosing(video_to_video(comfy, "LATENT", made), EMBEDDED)
    with pytest.raises(NodeError, match="made the start that of the embedded photo model"):
        comfy.run(graph)


def test_a_real_text_encoder_does_not_go_with_the_embedded_model(comfy):
    graph = choosing(text_to_video(comfy), EMBEDDED)
    graph["text"] = node(comfy.constant("CONDITIONING", [[torch.zeros(1, 3, 4096), {}]]))
    assert "the text encoder that of a released model" in refused(comfy, graph)


def test_words_it_does_not_know_are_named(comfy):
    graph = choosing(text_to_video(comfy), EMBEDDED)
    graph["text"]["inputs"]["prompt"] = "A large green dragon, breathing fire, moves up."
    comfy.run(graph)
    assert texts(comfy, "text")[-1].startswith(
        '1 prompt encoded\nThe text encoder does not know "dragon", "breathing", "fire": '
    )


# Demo Image


def test_the_demo_pictures(comfy):
    graph = filled(comfy, {"image": node("Magi1DemoImage")})
    for choice, file in ((None, DEMO_SHAPE), ("moving shape", DEMO_SHAPE), ("cat photo", DEMO_IMAGE)):
        if choice:
            graph["image"]["inputs"]["picture"] = choice
        image = comfy.run(graph)["image"][0]
        assert np.array_equal((image * 255).round().byte().numpy(), read_image(file).numpy())


def test_a_graph_from_before_there_was_a_choice_of_pictures(comfy):
    graph = {"image": node("Magi1DemoImage")}
    assert comfy.errors(graph) == {}
    assert comfy.run(graph)["image"][0].shape[1:3] == read_image(DEMO_IMAGE).shape[1:3]

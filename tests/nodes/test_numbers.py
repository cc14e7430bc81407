"""Numbers that are none, over every link: an error that says where they are, never a black video."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.graph import Graph, NodeError
from tests.support.magi_graphs import (
    HEIGHT,
    WIDTH,
    clip,
    image_to_video,
    node,
    picture,
    random_model,
    text_to_video,
    video_to_video,
)

NONE = [float("nan"), float("inf")]


def error_of(comfy, graph: Graph, part: str) -> str:
    """The message with which one node ends the run."""
    with pytest.raises(NodeError) as caught:
        comfy.run(graph)
    assert (caught.value.node, caught.value.kind) == (part, "MagiError"), str(caught.value)
    assert "none (NaN or infinity)" in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("bad", NONE)
def test_weights(bad, comfy):
    """The file's own fault, with its place; nothing of the step is shown as a preview."""
    name = random_model(comfy, "mine")
    path = comfy.base / "models/magi1" / name
    weights = load_file(path)
    weights["videodit_blocks.layers.1.mlp.linear_fc2.weight"][2, 3] = bad
    save_file(weights, path)
    graph = text_to_video(comfy)
    graph["model"]["inputs"]["model"] = name
    assert re.search(r"Step 1 of 8 of chunk 1 .*layer 1, fc2.*damaged", error_of(comfy, graph, "sampler"))
    assert not comfy.events.previews


@pytest.mark.parametrize("bad", NONE)
def test_conditioning(bad, comfy):
    embeds = torch.ones(1, 5, 32)
    embeds[0, 3, 7] = bad
    graph = text_to_video(comfy)
    graph["text"] = node(comfy.constant("CONDITIONING", [[embeds, {}]]))
    assert "in the prompt's embeddings" in error_of(comfy, graph, "sampler")


@pytest.mark.parametrize("bad", NONE)
def test_latents(bad, comfy):
    samples = torch.rand(1, 16, 3, HEIGHT // 8, WIDTH // 8)
    samples[0, 1, 2, 3, 4] = bad
    graph = text_to_video(comfy)
    graph["start"] = node(comfy.constant("LATENT", {"samples": samples}))
    assert "in these latents" in error_of(comfy, graph, "sampler")
    graph = video_to_video(comfy, "LATENT", {"samples": samples})
    assert "in these latents" in error_of(comfy, graph, "start")
    source = node(comfy.constant("LATENT", {"samples": samples}))
    graph = {"vae": graph["vae"], "source": source, "decode": graph["decode"]}
    graph["decode"]["inputs"]["samples"] = ["source", 0]
    assert "in these latents" in error_of(comfy, graph, "decode")


@pytest.mark.parametrize("bad", NONE)
def test_pictures_and_clips(bad, comfy):
    image, batch = picture(), clip(24)
    image[0, 3, 4, 1] = batch[20, 3, 4, 1] = bad
    assert "in an image" in error_of(comfy, image_to_video(comfy, image), "start")
    assert "in an image" in error_of(comfy, video_to_video(comfy, "IMAGE", batch), "start")


def test_a_vae_that_gives_none(comfy):
    """Found by the first preview, not after hours of sampling."""
    graph = text_to_video(comfy)
    graph["sampler"]["inputs"]["vae"] = ["vae", 0]
    vae = comfy.run({"vae": graph["vae"]})["vae"][0]
    with torch.inference_mode(False):
        model = vae.loaded()
        model.decoder.blocks[0].mlp.fc1.weight.data = model.decoder.blocks[0].mlp.fc1.weight.data.clone()
        model.decoder.blocks[0].mlp.fc1.weight.data[0, 0] = float("nan")
    graph["vae"] = node(comfy.constant("VAE", vae))
    assert "The VAE gave" in error_of(comfy, graph, "sampler")


def test_a_preview_of_numbers_that_are_far_out(comfy):
    """Finite numbers may be large: their squares are not."""
    rough = comfy.module("magi.vae.preview").RoughDecoder()
    for scale in (1e20, 1e38, 0.0):
        made = rough(scale * torch.rand(1, 16, 2, 4, 6))
        assert (made.shape, made.dtype) == ((4, 6, 3), torch.uint8)

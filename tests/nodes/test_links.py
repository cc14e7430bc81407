"""What comes over a link: ComfyUI checks only what is typed into a node, so the nodes check the rest."""

import math

import pytest
import torch

from tests.support.graph import NodeError
from tests.support.magi_graphs import HEIGHT, WIDTH, clip, node, text_to_video, video_to_video

NUMBERS = {"INT": int, "FLOAT": float}


def given(comfy, io_type: str, value: object) -> list:
    """Adds nothing to the graph yet: {id: node} and the link to it."""
    return node(comfy.constant(io_type, value))


def limits(comfy) -> list[tuple[str, str, str, float, float]]:
    found = []
    for name in comfy.nodes:
        inputs = comfy.info(name)["input"]
        for id, (kind, options) in (inputs["required"] | inputs.get("optional", {})).items():
            if kind in NUMBERS and "min" in options:
                found.append((name, id, kind, options["min"], options["max"]))
    return found


def test_every_number_has_limits_and_every_node_keeps_them(comfy):
    checked = comfy.module("nodes.comfyui.schema").check_values
    error = comfy.module("magi.errors").MagiError
    assert len(limits(comfy)) > 15
    for name, id, _, least, most in limits(comfy):
        schema = comfy.nodes[name].define_schema()
        checked(schema, {id: least, "another": "x"})
        checked(schema, {id: most})
        for wrong in (least - 1, most + 1, math.nan):
            with pytest.raises(error, match=rf"{id} is .* it must be from .* to"):
                checked(schema, {id: wrong})


@pytest.mark.parametrize("seconds", [0.0, -3.0])
def test_a_length_over_a_link(comfy, reads, seconds):
    graph = text_to_video(comfy)
    graph["length"] = given(comfy, "FLOAT", seconds)
    graph["sampler"]["inputs"]["seconds"] = ["length", 0]
    with pytest.raises(NodeError, match=rf"seconds is {seconds}; it must be from 0\.5 to 600") as caught:
        comfy.run(graph)
    assert caught.value.kind == "MagiError"
    assert "transformer" not in reads


@pytest.mark.parametrize(
    ("where", "id", "io_type", "value"),
    [
        ("sampler", "seed", "INT", -1),
        ("sampler", "guidance", "FLOAT", -2.0),
        ("start", "width", "INT", -64),
        ("decode", "tile_frames", "INT", 0),
        ("decode", "tile_size", "INT", 4096),
    ],
)
def test_a_wrong_number_over_a_link_is_named(comfy, where, id, io_type, value):
    graph = text_to_video(comfy)
    graph["other"] = given(comfy, io_type, value)
    graph[where]["inputs"][id] = ["other", 0]
    with pytest.raises(NodeError, match=f"{id} is {value}"):
        comfy.run(graph)


def test_how_much_of_a_clip_to_see_over_a_link(comfy):
    graph = video_to_video(comfy, "IMAGE", clip(24), seconds=1.0)
    (start,) = [id for id, part in graph.items() if part["class_type"] == "Magi1VideoToVideo"]
    graph["other"] = given(comfy, "FLOAT", -1.0)
    graph[start]["inputs"]["continue_seconds"] = ["other", 0]
    with pytest.raises(NodeError, match=r"continue_seconds is -1\.0; it must be from 0\.5"):
        comfy.run(graph)


def test_a_batch_of_latents_is_named_as_one(comfy):
    graph = text_to_video(comfy)
    samples = torch.zeros(2, 16, 1, HEIGHT // 8, WIDTH // 8)
    graph["start"] = given(comfy, "LATENT", {"samples": samples})
    with pytest.raises(NodeError, match=r"a batch of 2 videos.*Latent From Batch"):
        comfy.run(graph)


def test_combined_conditionings_are_no_schedule(comfy, reads):
    """As ConditioningCombine makes them: one list of all entries."""
    graph = text_to_video(comfy)
    made = comfy.run({name: graph[name] for name in ("encoder", "text")})["text"][0]
    for both in ([*made, *made], [[made[0][0], {}], [made[0][0], {}]]):
        graph["text"] = given(comfy, "CONDITIONING", both)
        with pytest.raises(NodeError, match=r"2 conditionings combined.*one line a second"):
            comfy.run(graph)
    assert "transformer" not in reads


def test_a_schedule_with_a_prompt_per_second_is_none_of_them(comfy):
    graph = text_to_video(comfy, seconds=2.0)
    graph["text"]["inputs"] |= {"prompt": "a cat\na dog", "schedule": "one line a second"}
    assert comfy.run(graph)["decode"][0].shape[0] == 48
    entries = comfy.run({name: graph[name] for name in ("encoder", "text")})["text"][0]
    graph["text"] = given(comfy, "CONDITIONING", [*entries, entries[0]])
    with pytest.raises(NodeError, match="3 conditionings combined"):
        comfy.run(graph)


@pytest.mark.parametrize("decoder", ["Magi1VAEDecode", "VAEDecode", None])
def test_frames_that_would_not_fit_are_refused_before_the_sampler_begins(comfy, reads, monkeypatch, decoder):
    monkeypatch.setattr(comfy.module("nodes.comfyui.media"), "free_host_memory", lambda: 10_000)
    graph = text_to_video(comfy)
    if decoder is None:
        del graph["decode"]
    elif decoder == "VAEDecode":
        graph["decode"] = node("VAEDecode", samples=["sampler", 0], vae=["vae", 0])
    if decoder is None:  # latents alone fit
        comfy.run(graph)
        return
    with pytest.raises(NodeError, match=r"24 frames of 64x48 take 0\.0 GB.*fewer seconds.*Save Latent") as caught:
        comfy.run(graph)
    assert caught.value.node == "sampler"
    assert reads == []

"""Videos from text through the nodes with the photo model: settings, sizes, and what comes out."""

import re

import av
import pytest
import torch

from tests.support.graph import NodeError
from tests.support.magi_graphs import (
    HEIGHT,
    WIDTH,
    error_between,
    filled,
    node,
    random_model,
    refused,
    text_to_video,
    widgets,
)

# -- from text ---------------------------------------------------------------------------------------------------------


def test_text_to_video(comfy):
    graph = text_to_video(comfy)
    made = comfy.run(graph)
    samples, announced, info = made["sampler"]
    assert info == "1 s = 24 frames, 64x48"
    frames, video = made["decode"]
    assert samples["samples"].shape == (1, 16, 6, HEIGHT // 8, WIDTH // 8)
    assert (samples["samples"].dtype, samples["samples"].device.type) == (torch.float32, "cpu")
    assert frames.shape == (24, HEIGHT, WIDTH, 3)
    assert (frames.dtype, frames.device.type) == (torch.float32, "cpu")
    assert 0 <= frames.min() < frames.max() <= 1
    assert announced == len(frames)
    parts = video.get_components()
    assert parts.frame_rate == 24
    assert torch.equal(parts.images, frames)


def test_what_is_shown_under_a_node_stays_as_its_ui_output(comfy):
    """Newer front ends take lines of text away when the job ends."""
    graph = text_to_video(comfy)
    made = comfy.run(graph)
    last = dict(comfy.events.texts)
    assert {id: ui["text"] for id, ui in comfy.shown.items()} == {id: [text] for id, text in last.items()}
    assert set(last) == {"model", "vae", "encoder", "text", "sampler", "decode"}
    assert list(comfy.shown["sampler"]["text"]) == [made["sampler"][2]] == ["1 s = 24 frames, 64x48"]
    schema = comfy.nodes["Magi1TextEncode"].define_schema()
    if not comfy.real or hasattr(schema, "has_intermediate_output"):
        comfy.run(graph)
        assert comfy.executed == []
        assert comfy.shown["text"]["text"] == [last["text"]], "of results from the cache, too"


def test_the_video_is_saved_by_comfyuis_own_node(comfy):
    graph = text_to_video(comfy)
    graph["save"] = node("SaveVideo", video=["decode", 1], filename_prefix="video/magi", format="auto", codec="auto")
    comfy.run(graph)
    (file,) = (comfy.base / "output").rglob("*.mp4")
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (WIDTH, HEIGHT, 24)
        assert len(list(container.decode(video=0))) == 24


@pytest.mark.parametrize("seconds", [0.5, 1.0, 1.5, 3.0])
def test_the_announced_length_is_what_comes_out(comfy, seconds):
    made = comfy.run(text_to_video(comfy, seconds=seconds))
    frames = made["decode"][0]
    assert made["sampler"][1] == len(frames)
    assert len(frames) % 24 == 0
    assert seconds * 24 <= len(frames) < seconds * 24 + 24


def test_the_seed_decides(comfy):
    one, other, huge, again = (comfy.run(text_to_video(comfy, seed=n))["decode"][0] for n in (5, 6, 5 + 2**63, 5))
    assert torch.equal(one, again)
    assert error_between(one, other) > 1e-3
    assert error_between(one, huge) > 1e-3


def test_without_a_start_the_models_own_size_is_made(comfy):
    graph = text_to_video(comfy)
    del graph["start"], graph["sampler"]["inputs"]["start"]
    assert comfy.run(graph)["decode"][0].shape == (24, 192, 320, 3)


def test_a_native_empty_latent_gives_the_size(comfy):
    graph = text_to_video(comfy)
    own = comfy.run(graph)["decode"][0]
    graph["start"] = node("EmptyHunyuanLatentVideo", width=WIDTH, height=HEIGHT, length=49, batch_size=1)
    assert torch.equal(comfy.run(graph)["decode"][0], own)


SIZES = {
    ("720p", "16:9"): (1280, 720),
    ("720p", "9:16"): (720, 1280),
    ("540p", "16:9"): (960, 544),
    ("480p", "16:9"): (848, 480),
    ("540p", "1:1"): (720, 720),
}


@pytest.mark.parametrize(("choice", "size"), SIZES.items(), ids=str)
def test_named_sizes(comfy, choice, size):
    graph = filled(comfy, {"start": node("Magi1TextToVideo", size=choice[0], shape=choice[1])})
    (start,) = comfy.run(graph)["start"]
    *_, height, width = start["samples"].shape
    assert (8 * width, 8 * height) == size


@pytest.mark.parametrize("shape", ["16:9", "9:16", "1:1", "4:3", "3:4", "21:9"])
def test_one_side_and_a_shape(comfy, shape):
    graph = filled(comfy, {"start": node("Magi1TextToVideo", shape=shape, width=640)})
    *_, rows, columns = comfy.run(graph)["start"][0]["samples"].shape
    across, down = map(int, shape.split(":"))
    assert columns == 80
    assert rows % 2 == 0
    assert abs(rows - 80 * down / across) <= 1


@pytest.mark.parametrize(("width", "height", "named"), [(65, 48, "65"), (64, 40, "40"), (16, 64, "16")])
def test_impossible_sizes(comfy, width, height, named):
    said = refused(comfy, filled(comfy, {"start": node("Magi1TextToVideo", width=width, height=height)}))
    assert named in said
    assert "16" in said


# -- settings of the sampler -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "named"), [({"steps": 7}, "7"), ({"steps": 1}, "1"), ({"window": 3}, "3")])
def test_steps_that_do_not_split_into_stages(comfy, settings, named):
    said = refused(comfy, text_to_video(comfy, **settings))
    assert named in said
    assert re.search(r"[Uu]se ", said)


def test_steps_change_the_video(comfy):
    few, own = (comfy.run(text_to_video(comfy, steps=steps)) for steps in (8, 16))
    assert few["sampler"][1] == own["sampler"][1]
    assert not torch.equal(few["decode"][0], own["decode"][0])
    assert torch.equal(own["decode"][0], comfy.run(text_to_video(comfy, steps=0))["decode"][0]), (
        "0 is the model's own sixteen"
    )


def test_window(comfy):
    narrow = comfy.run(text_to_video(comfy, seconds=2.0, window=1))["decode"][0]
    assert len(narrow) == 48
    assert not torch.equal(narrow, comfy.run(text_to_video(comfy, seconds=2.0))["decode"][0])


@pytest.mark.parametrize("setting", ["guidance", "previous_guidance"])
def test_distilled_models_take_no_guidance(comfy, setting):
    said = refused(comfy, text_to_video(comfy, **{setting: 5.0}))
    assert "istilled models take no guidance" in said


@pytest.mark.parametrize(("changes", "close"), [({"streaming": "on"}, 0.0), ({"cache": "host"}, 0.0)])
def test_memory_options_change_nothing_of_the_video(comfy, changes, close):
    graph = text_to_video(comfy, seconds=2.0)
    plain = comfy.run(graph)["decode"][0]
    graph["memory"] = node("Magi1MemoryOptions", **changes)
    graph["model"]["inputs"]["memory"] = ["memory", 0]
    assert error_between(comfy.run(filled(comfy, graph))["decode"][0], plain) <= close


@pytest.mark.filterwarnings("ignore:.*is not the published special-token file")
@pytest.mark.parametrize("setting", [{"guidance": 3.0}, {"previous_guidance": 3.0}, {"negative_tokens": True}], ids=str)
def test_base_models_are_guided(comfy, setting):
    graph = text_to_video(comfy)
    graph["model"]["inputs"]["model"] = random_model(comfy, "base", distilled=False)
    own = comfy.run(graph)["sampler"][0]["samples"]
    graph["sampler"]["inputs"] |= setting
    assert not torch.equal(comfy.run(graph)["sampler"][0]["samples"], own)


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp8 storage"])
def test_precision(comfy, precision):
    graph = text_to_video(comfy)
    auto = comfy.run(graph)["decode"][0]
    graph["model"]["inputs"]["precision"] = precision
    assert error_between(comfy.run(graph)["decode"][0], auto) < 0.1


def test_attention_choices(comfy):
    graph = text_to_video(comfy)
    auto = comfy.run(graph)["decode"][0]
    graph["model"]["inputs"]["attention"] = "math"
    assert error_between(comfy.run(graph)["decode"][0], auto) < 0.01
    graph["model"]["inputs"]["attention"] = "sage"
    with pytest.raises(NodeError, match="sage") as caught:
        comfy.run(graph)
    assert caught.value.kind == "MagiError"


def test_latents_of_another_model(comfy):
    graph = text_to_video(comfy)
    graph["start"] = node(comfy.constant("LATENT", {"samples": torch.zeros(1, 4, 6, 8)}))
    assert "(1, 4, 6, 8)" in refused(comfy, graph)


def test_another_models_vae(comfy):
    graph = text_to_video(comfy)
    graph["vae"] = node(comfy.constant("VAE", object()))
    with pytest.raises(NodeError, match="MAGI-1 VAE Loader"):
        comfy.run(graph)


def test_every_widget_may_be_a_link(comfy):
    """What a primitive node gives is not known before the graph runs, but counts all the same."""
    graph = text_to_video(comfy)
    direct = comfy.run(graph)["decode"][0]
    for name in ("model", "encoder", "vae", "text", "start", "sampler", "decode"):
        own = widgets(comfy, graph[name]["class_type"])
        kinds = {
            id: kind
            for part in comfy.info(graph[name]["class_type"])["input"].values()
            for id, (kind, *_) in part.items()
        }
        for id in own:
            source = f"{name} {id}"
            graph[source] = node(comfy.constant(kinds[id], graph[name]["inputs"][id]))
            graph[name]["inputs"][id] = [source, 0]
    assert torch.equal(comfy.run(graph)["decode"][0], direct)


@pytest.mark.parametrize(
    ("name", "widget", "kind", "value", "said"),
    [
        ("model", "model", "COMBO", "24B_base", "inference_weight"),
        ("start", "width", "INT", 65, "65"),
        ("sampler", "steps", "INT", 7, "7"),
        ("decode", "tile_size", "INT", 70, "70"),
    ],
)
def test_wrong_values_over_a_link_are_told_when_the_graph_runs(comfy, name, widget, kind, value, said):
    graph = text_to_video(comfy)
    graph["value"] = node(comfy.constant(kind, value))
    graph[name]["inputs"][widget] = ["value", 0]
    with pytest.raises(NodeError) as caught:
        comfy.run(graph)
    assert (caught.value.node, caught.value.kind) == (name, "MagiError")
    assert said in caught.value.message

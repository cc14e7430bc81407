"""Videos through the nodes with the embedded model: from text, a picture and a clip, to frames and a file."""

import re

import av
import pytest
import torch

from tests.graph import InvalidGraph, NodeError
from tests.magi_graphs import (
    HEIGHT,
    WIDTH,
    clip,
    filled,
    image_to_video,
    node,
    picture,
    text_to_video,
    video_to_video,
    widgets,
)


def error_between(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().mean().item()


def refused(comfy, graph) -> str:
    """The message with which a graph is refused, by validation or the node; nothing was loaded for it."""
    with pytest.raises((InvalidGraph, NodeError)) as caught:
        comfy.run(graph)
    if isinstance(caught.value, NodeError):
        assert caught.value.kind == "MagiError", str(caught.value)
    assert comfy.management.loaded_models() == []
    return str(caught.value)


# -- from text ---------------------------------------------------------------------------------------------------------


def test_text_to_video(comfy):
    graph = text_to_video(comfy)
    made = comfy.run(graph)
    samples, announced = made["sampler"]
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
    one, again, other = (comfy.run(text_to_video(comfy, seed=seed))["decode"][0] for seed in (5, 5, 6))
    assert torch.equal(one, again)
    assert error_between(one, other) > 1e-3
    huge = comfy.run(text_to_video(comfy, seed=2**64 - 1))["decode"][0]
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
    assert torch.equal(own["decode"][0], comfy.run(text_to_video(comfy, steps=0))["decode"][0]), "0 is the model's own sixteen"


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
        kinds = {id: kind for part in comfy.info(graph[name]["class_type"])["input"].values() for id, (kind, *_) in part.items()}
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


# -- from a picture ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [1.0, 2.0])
def test_the_picture_is_the_first_frame(comfy, seconds):
    image = picture()
    made = comfy.run(image_to_video(comfy, image, seconds=seconds, steps=0))
    frames = made["decode"][0]
    assert made["start"][0]["samples"].shape == (1, 16, 1, HEIGHT // 8, WIDTH // 8)
    assert made["sampler"][1] == len(frames) == 24 * seconds
    assert error_between(frames[0], image[0]) < 0.03
    assert error_between(frames, image) < 0.1, "the embedded model holds the picture still"


def test_other_shapes_of_pictures(comfy):
    """A wide picture, left half dark: cropped, padded and stretched to a square."""
    image = torch.full((1, 48, 96, 3), 0.9)
    image[:, :, :48] = 0.2
    for fit, top, left in (("crop", 0.2, 0.2), ("pad", 0.0, 0.2), ("stretch", 0.2, 0.2)):
        start = {"width": 64, "height": 64, "fit": fit}
        frames = comfy.run(image_to_video(comfy, image, start))["decode"][0]
        assert frames.shape == (24, 64, 64, 3)
        assert frames[0, 4, 4].mean() == pytest.approx(top, abs=0.12), fit
        assert frames[0, 32, 12].mean() == pytest.approx(left, abs=0.12), fit
        assert frames[0, 32, 52].mean() == pytest.approx(0.9, abs=0.12), fit


def test_a_size_keeps_the_pictures_shape(comfy):
    graph = image_to_video(comfy, picture(72, 40), {"width": 0, "height": 0, "size": "from image"})
    del graph["sampler"], graph["decode"]
    assert comfy.run(graph)["start"][0]["samples"].shape[3:] in [(8, 4), (10, 4), (8, 6), (10, 6)]
    graph = image_to_video(comfy, picture(72, 40), {"width": 32, "height": 0})
    assert comfy.run(graph)["decode"][0].shape[1:3] == (64, 32)


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_transparent_pictures(comfy, channels):
    image = torch.full((1, HEIGHT, WIDTH, channels), 0.5)
    if channels == 4:
        image[..., 3] = 0
    frames = comfy.run(image_to_video(comfy, image))["decode"][0]
    assert frames[0].mean() == pytest.approx(1.0 if channels == 4 else 0.5, abs=0.06), "transparent is white"


# -- from a clip -------------------------------------------------------------------------------------------------------


def test_a_batch_of_images_is_continued(comfy):
    given = clip(48)
    made = comfy.run(video_to_video(comfy, "IMAGE", given))
    frames = made["decode"][0]
    assert made["start"][0]["samples"].shape[2] == 12
    assert made["sampler"][1] == len(frames) == 24, "the clip's frames are not repeated"
    assert error_between(frames, given[24:]) < 0.1, "the embedded model goes on with the last second"


def test_a_video_file_is_continued(comfy):
    given = clip(48)
    graph = text_to_video(comfy)
    graph["clip"] = node(comfy.constant("IMAGE", given))
    graph["video"] = node("CreateVideo", images=["clip", 0], fps=24.0)
    graph["save"] = node("SaveVideo", video=["video", 0], filename_prefix="clip", format="auto", codec="auto")
    comfy.run({name: graph[name] for name in ("clip", "video", "save")})
    (file,) = (comfy.base / "output").glob("clip*.mp4")
    file.rename(comfy.base / "input" / "clip.mp4")
    graph["clip"] = node("LoadVideo", file="clip.mp4")
    graph["start"] = node("Magi1VideoToVideo", video=["clip", 0], vae=["vae", 0], width=WIDTH, height=HEIGHT)
    del graph["video"], graph["save"]
    graph["decode"]["inputs"]["before"] = ["clip", 0]
    made = comfy.run(filled(comfy, graph))
    frames = made["decode"][0]
    assert (len(frames), made["sampler"][1]) == (72, 24)
    assert error_between(frames[:48], given) < 0.03, "the clip is in front"
    assert error_between(frames[48:], given[24:]) < 0.1
    assert made["decode"][1].get_components().frame_rate == 24


def test_latents_are_continued_without_a_vae(comfy):
    graph = text_to_video(comfy)
    graph["more"] = node("Magi1VideoToVideo", video=["sampler", 0])
    graph["sampler 2"] = node("Magi1Sampler", model=["model", 0], text=["text", 0], start=["more", 0], seconds=1.0, seed=2)
    graph["decode 2"] = node("Magi1VAEDecode", samples=["sampler 2", 0], vae=["vae", 0], before=["decode", 1])
    made = comfy.run(filled(comfy, graph))
    assert torch.equal(made["more"][0]["samples"], made["sampler"][0]["samples"])
    assert made["sampler 2"][1] == 24
    frames = made["decode 2"][0]
    assert frames.shape == (48, HEIGHT, WIDTH, 3)
    assert error_between(frames[:24], made["decode"][0]) < 0.005
    assert error_between(frames[24:], frames[:24]) < 0.1, "the embedded model goes on with the last second"


def test_how_much_of_the_end_is_looked_at(comfy):
    graph = video_to_video(comfy, "IMAGE", clip(72), {"continue_seconds": 1.0})
    del graph["sampler"], graph["decode"]
    short = comfy.run(graph)["start"][0]["samples"]
    graph["start"]["inputs"]["continue_seconds"] = 2.0
    long = comfy.run(graph)["start"][0]["samples"]
    assert (short.shape[2], long.shape[2]) == (6, 12)
    assert error_between(long[:, :, 6:], short) < 0.05


def test_separate_frames_at_another_rate(comfy):
    graph = video_to_video(comfy, "IMAGE", clip(24), {"fps": 12.0})
    del graph["sampler"], graph["decode"]
    assert comfy.run(graph)["start"][0]["samples"].shape[2] == 12, "24 frames at 12 a second are two seconds"


def test_a_clip_of_one_frame_is_told_to_be_a_picture(comfy):
    said = refused(comfy, video_to_video(comfy, "IMAGE", clip(1)))
    assert "Image to Video" in said


def test_a_clip_needs_a_vae(comfy):
    graph = video_to_video(comfy, "IMAGE", clip(24))
    del graph["start"]["inputs"]["vae"]
    assert "VAE Loader" in refused(comfy, graph)


def test_a_clip_of_another_size_and_rate_goes_in_front(comfy):
    graph = text_to_video(comfy)
    graph["clip"] = node(comfy.constant("IMAGE", clip(12, 96, 128)))
    graph["video"] = node("CreateVideo", images=["clip", 0], fps=12.0)
    graph["decode"]["inputs"]["before"] = ["video", 0]
    frames = comfy.run(graph)["decode"][0]
    assert frames.shape == (48, HEIGHT, WIDTH, 3), "12 frames at 12 a second are 24 at 24"
    assert error_between(frames[0], clip(12)[0]) < 0.03


# -- native nodes ------------------------------------------------------------------------------------------------------


def test_native_vae_nodes_take_the_vae(comfy):
    graph = image_to_video(comfy, picture())
    graph["native"] = node("VAEDecode", samples=["sampler", 0], vae=["vae", 0])
    graph["encode"] = node("VAEEncode", pixels=["decode", 0], vae=["vae", 0])
    made = comfy.run(graph)
    assert torch.equal(made["native"][0], made["decode"][0])
    there_and_back = torch.stack([made[name][0]["samples"].flatten() for name in ("encode", "sampler")])
    assert torch.corrcoef(there_and_back)[0, 1] > 0.99


def test_tiles_do_not_show(comfy):
    graph = text_to_video(comfy)
    graph["start"]["inputs"] |= {"width": 128, "height": 96}
    whole = comfy.run(graph)["decode"][0]
    graph["decode"]["inputs"] |= {"tile_size": 64, "tile_frames": 8}
    assert error_between(comfy.run(graph)["decode"][0], whole) < 0.02

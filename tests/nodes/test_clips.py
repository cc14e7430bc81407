"""Videos from a picture and from a clip, and the VAE in ComfyUI's own nodes."""

import importlib
import io

import av
import numpy as np
import pytest
import torch

from tests.support.graph import InvalidGraph, NodeError
from tests.support.magi_graphs import (
    HEIGHT,
    WIDTH,
    clip,
    error_between,
    filled,
    image_to_video,
    node,
    picture,
    refused,
    text_to_video,
    video_to_video,
)

# -- from a picture ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [1.0, 2.0])
def test_the_picture_is_the_first_frame(comfy, seconds):
    image = picture()
    made = comfy.run(image_to_video(comfy, image, seconds=seconds, steps=0))
    frames = made["decode"][0]
    assert made["start"][0]["samples"].shape == (1, 16, 1, HEIGHT // 8, WIDTH // 8)
    assert made["sampler"][1] == len(frames) == 24 * seconds
    assert error_between(frames[0], image[0]) < 0.03
    assert error_between(frames, image) < 0.1, "the photo model holds the picture still"


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
    assert error_between(frames, given[24:]) < 0.1, "the photo model goes on with the last second"


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
    graph["sampler 2"] = node(
        "Magi1Sampler", model=["model", 0], text=["text", 0], start=["more", 0], seconds=1.0, seed=2
    )
    graph["decode 2"] = node("Magi1VAEDecode", samples=["sampler 2", 0], vae=["vae", 0], before=["decode", 1])
    made = comfy.run(filled(comfy, graph))
    assert torch.equal(made["more"][0]["samples"], made["sampler"][0]["samples"])
    assert made["sampler 2"][1] == 24
    frames = made["decode 2"][0]
    assert frames.shape == (48, HEIGHT, WIDTH, 3)
    assert error_between(frames[:24], made["decode"][0]) < 0.005
    assert error_between(frames[24:], frames[:24]) < 0.1, "the photo model goes on with the last second"


def looked_at(comfy, frames: torch.Tensor, **start) -> torch.Tensor:
    """What Video to Video takes of a clip, decoded again."""
    graph = video_to_video(comfy, "IMAGE", frames, start)
    del graph["sampler"], graph["decode"]
    graph["seen"] = node("VAEDecode", samples=["start", 0], vae=["vae", 0])
    return comfy.run(graph)["seen"][0]


def test_how_much_of_the_end_is_looked_at(comfy):
    given = clip(72)
    given[:48] = 0
    for seconds in (1.0, 2.0):
        frames = looked_at(comfy, given, continue_seconds=seconds)
        assert len(frames) == 24 * seconds
        assert error_between(frames[-24:], given[48:]) < 0.03
    assert frames[:20].mean() < 0.05


def test_the_very_end_of_a_clip_counts(comfy):
    """A clip that is not made of whole fours loses frames at its beginning."""
    given = torch.full((26, HEIGHT, WIDTH, 3), 0.3)
    given[-2:] = 0.9
    frames = looked_at(comfy, given)
    assert len(frames) == 24
    assert frames[:20].mean() == pytest.approx(0.3, abs=0.03)
    assert frames[-1].mean() > 0.5


def test_the_end_of_latents(comfy):
    samples = torch.arange(18.0)[None, None, :, None, None].expand(1, 16, 18, 6, 8).contiguous()
    graph = video_to_video(comfy, "LATENT", {"samples": samples}, {"continue_seconds": 1.0})
    del graph["sampler"], graph["decode"]
    assert torch.equal(comfy.run(graph)["start"][0]["samples"], samples[:, :, 12:])


def test_separate_frames_at_another_rate(comfy):
    graph = video_to_video(comfy, "IMAGE", clip(24), {"fps": 12.0})
    del graph["sampler"], graph["decode"]
    assert comfy.run(graph)["start"][0]["samples"].shape[2] == 12, "24 frames at 12 a second are two seconds"


def test_a_clip_of_one_frame_is_told_to_be_a_picture(comfy):
    said = refused(comfy, video_to_video(comfy, "IMAGE", clip(1)))
    assert "1 frame at 24 per second; 8 are needed" in said
    assert "as an image" in said


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


@pytest.mark.parametrize("kind", ["text", "image", "clip"])
def test_an_impossible_size_is_refused_before_anything_runs(comfy, kind):
    graphs = {
        "text": lambda: text_to_video(comfy),
        "image": lambda: image_to_video(comfy, picture()),
        "clip": lambda: video_to_video(comfy, "IMAGE", clip(24)),
    }
    graph = graphs[kind]()
    graph["start"]["inputs"]["width"] = 330
    with pytest.raises(InvalidGraph, match="Width 330 is not a multiple of 16; the nearest are 320 and 336"):
        comfy.run(graph)
    assert comfy.executed == []


def test_a_clip_in_front_that_memory_cannot_hold_is_refused_before_it_is_read(comfy, monkeypatch):
    graph = text_to_video(comfy)
    made = comfy.run(graph)
    graph = {"vae": graph["vae"], "decode": graph["decode"]}
    graph["decode"]["inputs"] |= {"samples": ["latents", 0], "before": ["clip", 0]}
    graph["latents"] = node(comfy.constant("LATENT", made["sampler"][0]))
    graph["clip"] = node(comfy.constant("IMAGE", clip(100)))
    media = comfy.module("nodes.comfyui.media")
    monkeypatch.setattr(media, "free_host_memory", lambda: 12 * 100 * HEIGHT * WIDTH)  # of the made ones, enough
    monkeypatch.setattr(media, "frames_of", lambda *_: pytest.fail("read for nothing"))
    with pytest.raises(NodeError, match="124 frames of 64x48 take"):
        comfy.run(graph)


# -- what is said of a file --------------------------------------------------------------------------------------------


def with_two_tracks(path):
    """A second of dark green, and two of light grey, which is the default track."""
    with av.open(str(path), "w") as out:
        streams = [out.add_stream("libx264", rate=24) for _ in range(2)]
        for stream in streams:
            stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        flag = getattr(streams[0], "disposition", None)
        if flag is None:
            pytest.skip("this PyAV does not tell tracks apart")
        streams[0].disposition, streams[1].disposition = type(flag)(0), type(flag).default
        for stream, level, count in zip(streams, (40, 200), (24, 48), strict=True):
            for index in range(count):
                frame = av.VideoFrame.from_ndarray(np.full((HEIGHT, WIDTH, 3), level, np.uint8), format="rgb24")
                frame.pts = index
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
    return path


def video_from(comfy, source):
    return importlib.import_module("comfy_api.latest").InputImpl.VideoFromFile(source)


@pytest.mark.filterwarnings("ignore:.*video tracks")
def test_what_is_to_know_of_a_file_is_shown(comfy, tmp_path):
    graph = video_to_video(comfy, "VIDEO", video_from(comfy, str(with_two_tracks(tmp_path / "a.mp4"))))
    graph["decode"]["inputs"]["before"] = ["clip", 0]
    made = comfy.run(graph)
    assert len(made["decode"][0]) == 72
    assert made["decode"][0][:48].mean() > 0.7
    texts = dict(comfy.events.texts)
    assert "a.mp4' has 2 video tracks: number 2 is read" in texts["start"]
    assert "a.mp4' has 2 video tracks: number 2 is read" in texts["decode"]


@pytest.mark.parametrize("spoil", ["", "\x01"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_video_that_leads_to_other_files_is_refused(comfy, tmp_path, in_memory, spoil):
    with_two_tracks(tmp_path / "secret.ts")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{tmp_path}/secret.ts\n#EXT-X-ENDLIST\n{spoil}"
    (tmp_path / "list.mp4").write_text(playlist)
    source = io.BytesIO(playlist.encode()) if in_memory else str(tmp_path / "list.mp4")
    said = refused(comfy, video_to_video(comfy, "VIDEO", video_from(comfy, source)))
    assert "onvert it to MP4" in said or "text file or playlist" in said


def test_a_video_in_memory_is_continued(comfy, tmp_path):
    source = io.BytesIO(with_two_tracks(tmp_path / "a.mp4").read_bytes())
    made = comfy.run(video_to_video(comfy, "VIDEO", video_from(comfy, source)))
    assert len(made["decode"][0]) == 24


def test_latents_of_a_picture_are_no_clip(comfy):
    graph = video_to_video(comfy, "LATENT", {"samples": torch.ones(1, 16, 1, 6, 8)})
    assert "single frame, which is a picture" in refused(comfy, graph)

"""Cancel in every phase, and what a user sees of the work: bars, previews and lines of text."""

import importlib
import io
import re
import threading
import time

import pytest
import torch
from PIL import Image

from tests.support.graph import Interrupted, InvalidGraph
from tests.support.magi_graphs import HEIGHT, WIDTH, clip, image_to_video, node, picture, text_to_video, video_to_video

SOON = 2.0  # seconds within which a cancel must take effect


def cancelled(comfy, graph, node: str) -> float:
    """Runs a graph that is to be cancelled in a node; returns the time at which it ended."""
    with pytest.raises(Interrupted) as caught:
        comfy.run(graph)
    ended = time.monotonic()
    assert caught.value.node == node
    assert comfy.management.processing_interrupted(), "left for nodes that run beside it"
    for model in comfy.management.loaded_models():
        assert model is not None
        assert model.loaded_size() > 0, "listed as loaded, but it is not"
    return ended


def cancel_at(comfy, node: str, count: int = 1) -> None:
    """Cancels at a node's n-th report, as if the user had just seen it."""
    left = [count]

    def seen(kind: str, at: str) -> None:
        if at == node:
            left[0] -= 1
            if left[0] == 0:
                comfy.management.interrupt_current_processing()

    comfy.events.seen = seen


GRAPHS = {
    "text": text_to_video,
    "start": lambda comfy: image_to_video(comfy, picture()),
    "sampler": text_to_video,
    "decode": text_to_video,
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", GRAPHS)
def test_cancel_at_a_report_and_queue_again(comfy, name, count):
    graph = GRAPHS[name](comfy)
    cancel_at(comfy, name, count)
    cancelled(comfy, graph, name)
    comfy.events.seen = None
    again = comfy.run(graph)["decode"][0]
    assert torch.equal(comfy.run(GRAPHS[name](comfy) | {})["decode"][0], again)


def test_a_cancelled_run_changes_nothing_of_the_next(comfy):
    graph = text_to_video(comfy, seconds=2.0)
    undisturbed = comfy.run(graph)["decode"][0]
    graph["sampler"]["inputs"]["seed"] = 2
    cancel_at(comfy, "sampler", 5)
    cancelled(comfy, graph, "sampler")
    comfy.events.seen = None
    graph["sampler"]["inputs"]["seed"] = 1
    assert torch.equal(comfy.run(graph)["decode"][0], undisturbed)


# With a model of real size each of these calls takes a second or less, and a run is made of thousands.
SLOW = {  # node, what is slow, how many more calls may begin
    "the text encoder is read": ("text", "magi.text.t5_model", "place", 1),
    "a prompt is encoded": ("text", "transformers.models.t5.modeling_t5", "T5Block.forward", 1),
    "weights are read": ("sampler", "magi.transformer.weights", "WeightReader.block", 0),
    "a step is made": ("sampler", "magi.transformer.block", "attend", 1),
    "frames are decoded": ("decode", "magi.vae.model", "Decoder.forward", 1),
    "a picture is encoded": ("start", "magi.vae.model", "Encoder.forward", 1),
    "a clip is encoded": ("start", "magi.vae.model", "Encoder.forward", 1),
}


@pytest.mark.parametrize("phase", SLOW)
def test_cancel_takes_effect_within_a_call(comfy, monkeypatch, phase):
    at, module, function, most = SLOW[phase]
    graph = text_to_video(comfy)
    if at == "start":
        wide = {"width": 128, "height": 96}
        graph = video_to_video(comfy, "IMAGE", clip(48), wide) if "clip" in phase else image_to_video(comfy, picture())
    graph["decode"]["inputs"]["tile_frames"] = 4
    *owner, name = function.split(".")
    target = comfy.module(module) if module.startswith("magi") else importlib.import_module(module)
    target = getattr(target, owner[0]) if owner else target
    fast, calls, when = getattr(target, name), [], []

    def slow(*args, **options):
        if only_headers(args[0]):
            return fast(*args, **options)
        calls.append(time.monotonic())
        if len(calls) == 1:
            threading.Timer(
                0.1, lambda: when.append(time.monotonic()) or comfy.management.interrupt_current_processing()
            ).start()
        time.sleep(0.3)
        return fast(*args, **options)

    monkeypatch.setattr(target, name, slow)
    ended = cancelled(comfy, graph, at)
    assert ended - when[0] < SOON
    assert len([t for t in calls if t > when[0]]) <= most, "no more work than what had begun"


def only_headers(reader: object) -> bool:
    return getattr(getattr(reader, "device", None), "type", "") == "meta"


def test_what_was_half_read_is_not_kept(comfy, monkeypatch):
    reader = comfy.module("magi.transformer.weights").WeightReader
    block = reader.block

    def cancel(self, layer):
        if not only_headers(self):
            comfy.management.interrupt_current_processing()
        return block(self, layer)

    monkeypatch.setattr(reader, "block", cancel)
    graph = text_to_video(comfy)
    cancelled(comfy, graph, "sampler")
    assert comfy.management.loaded_models() == []
    monkeypatch.setattr(reader, "block", block)
    assert len(comfy.run(graph)["decode"][0]) == 24


def test_every_report_asks_for_a_cancel(comfy):
    """Also one that is too small to move the bar, as most are in a long video."""
    progress = comfy.module("nodes.comfyui.progress").NodeProgress("1", sample=1.0)
    progress.move("sample", 0.5)
    comfy.management.interrupt_current_processing()
    with pytest.raises(comfy.management.InterruptProcessingException):
        progress.move("sample", 0.5)


# -- what is shown -----------------------------------------------------------------------------------------------------


def bars(comfy) -> dict[str, list[float]]:
    """The part done (0 .. 1) at each report, by node."""
    found: dict[str, list[float]] = {}
    for name, value, total in comfy.events.progress:
        found.setdefault(name, []).append(value / total)
    return found


def test_every_bar_only_grows_and_reaches_its_end(comfy):
    comfy.run(image_to_video(comfy, picture(), seconds=2.0))
    found = bars(comfy)
    assert set(found) == {"text", "start", "sampler", "decode"}
    for name, values in found.items():
        assert values == sorted(values), name
        assert values[-1] == 1, name
    assert len(found["sampler"]) > 20
    assert len(found["decode"]) > 3


def test_a_bar_never_goes_back(comfy):
    progress = comfy.module("nodes.comfyui.progress").NodeProgress("1", load=1.0, sample=3.0)
    for name, part in (("sample", 0.5), ("load", 0.5), ("sample", 0.4), ("sample", 2.0)):
        progress.move(name, part, torch.zeros(2, 2, 3, dtype=torch.uint8))
    assert bars(comfy)["1"] == [0.625, 0.625, 0.625, 1.0]


def test_the_bar_moves_while_weights_are_read_and_within_steps(comfy):
    comfy.run(text_to_video(comfy, steps=8))
    values = bars(comfy)["sampler"]
    assert min(values) < 0.04
    assert len(set(values)) > 2 * 8, "more often than once a step"


def test_previews(comfy):
    graph = text_to_video(comfy, seconds=2.0)
    graph["sampler"]["inputs"]["vae"] = ["vae", 0]
    comfy.run(graph)
    shown = [(name, kind, shot, side) for name, kind, shot, side in comfy.events.previews]
    assert {name for name, *_ in shown} == {"sampler", "decode"}
    for name, kind, shot, side in shown:
        assert kind == "JPEG"
        assert side is None or side >= 256
        assert shot.mode == "RGB"
        assert shot.width / shot.height == pytest.approx(WIDTH / HEIGHT, rel=0.1), name
        wire = io.BytesIO()
        shot.save(wire, "JPEG")
        assert Image.open(io.BytesIO(wire.getvalue())).size == shot.size
    assert any(shot.size == (WIDTH, HEIGHT) for name, _, shot, _ in shown if name == "sampler"), (
        "finished chunks, decoded"
    )


def test_a_finished_chunk_is_shown_as_it_is(comfy):
    graph = text_to_video(comfy, seconds=2.0)
    graph["sampler"]["inputs"]["vae"] = ["vae", 0]
    frames = comfy.run(graph)["decode"][0]
    last = [shot for name, _, shot, _ in comfy.events.previews if name == "sampler"][-1]
    pixels = torch.frombuffer(bytearray(last.tobytes()), dtype=torch.uint8).reshape(last.height, last.width, 3) / 255
    assert (pixels - frames[-1]).abs().mean() < 0.05


def test_previews_without_a_vae(comfy):
    comfy.run(text_to_video(comfy))
    assert [shot for name, _, shot, _ in comfy.events.previews if name == "sampler"]


def texts(comfy, node: str) -> list[str]:
    return [text for name, text in comfy.events.texts if name == node]


def test_the_length_is_announced_before_work_begins(comfy):
    comfy.run(text_to_video(comfy, seconds=2.5))
    said = texts(comfy, "sampler")
    assert re.search(r"3 s = 72 frames", said[0])
    assert f"{WIDTH}x{HEIGHT}" in said[0]
    first = next(i for i, event in enumerate(comfy.events.texts) if event[0] == "sampler")
    assert first == [name for name, _ in comfy.events.texts].index("sampler")
    assert "72 frames" in said[-1]


def test_the_time_left_is_told(comfy, monkeypatch):
    """Every look at the clock finds 0.3 s gone."""
    seconds = iter(range(10**6))
    monkeypatch.setattr(comfy.module("nodes.comfyui.progress").time, "monotonic", lambda: next(seconds) * 0.3)
    comfy.run(text_to_video(comfy, seconds=2.0))
    said = texts(comfy, "sampler")
    assert any(re.search(r"chunk 1 of 2.*, \d\d:\d\d left", text) for text in said)
    assert any("chunk 2 of 2" in text for text in said)
    left = [int(m[1]) * 60 + int(m[2]) for text in said if (m := re.search(r"(\d\d):(\d\d) left", text))]
    assert left[-1] < max(left)
    assert left[-1] < 10


def test_the_decoder_tells_its_length(comfy):
    comfy.run(text_to_video(comfy))
    assert re.search(r"24 frames, 1 s, 64x48", texts(comfy, "decode")[-1])


def test_no_line_is_left_half_way(comfy):
    """The last line stays under the node when the run is over."""
    comfy.run(image_to_video(comfy, picture()))
    for name in ("text", "start", "sampler", "decode"):
        said = texts(comfy, name)
        assert said == [] or not re.search(r"%|loading|running", said[-1]), said


def test_lines_do_not_flood(comfy):
    began = time.monotonic()
    comfy.run(text_to_video(comfy, seconds=2.0))
    assert len(comfy.events.texts) < 20 + 10 * (time.monotonic() - began)


def test_two_queued_runs_equal_one_alone(comfy):
    """The second begins with what the first left behind."""
    one, two = text_to_video(comfy), image_to_video(comfy, picture())
    alone = comfy.run(two)["decode"][0]
    comfy.run({"image": node("Magi1DemoImage")})
    comfy.management.unload_all_models()
    comfy.run(one)
    assert torch.equal(comfy.run(two)["decode"][0], alone)
    with pytest.raises(InvalidGraph):
        comfy.run({"x": node("NoSuchNode")})

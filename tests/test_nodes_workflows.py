"""The example workflows run: as the front end queues them, with the embedded model in the place of the released ones."""

import json
from pathlib import Path

import av
import pytest
from PIL import Image

from tests.magi_graphs import EMBEDDED, HEIGHT, WIDTH, node, picture, widgets

API = Path(__file__).parent / "workflows_api"
UI = API.parent.parent / "workflows"
PARTS = {"Magi1ModelLoader": "model", "Magi1VAELoader": "vae", "Magi1TextEncoderLoader": "encoder"}
SIZES = {"Magi1TextToVideo", "Magi1ImageToVideo", "Magi1VideoToVideo"}


def small(graph: dict) -> dict:
    """The graph with all that needs downloads or time replaced."""
    for part in graph.values():
        kind, inputs = part["class_type"], part["inputs"]
        if kind in PARTS:
            inputs[PARTS[kind]] = EMBEDDED
        elif kind in SIZES:
            inputs |= {"width": WIDTH, "height": HEIGHT}
        elif kind == "Magi1Sampler":
            inputs["seconds"] = min(inputs["seconds"], 2.0)
        elif kind == "CLIPLoader":
            part |= node("Magi1TextEncoderLoader", encoder=EMBEDDED, device="cpu", precision="fp32")
    return graph


def test_every_workflow_is_here():
    assert {f.stem for f in API.glob("*.json")} == {f.stem for f in UI.glob("*.json")} != set()


@pytest.mark.parametrize("file", sorted(API.glob("*.json")), ids=lambda file: file.stem)
def test_a_workflow_makes_the_video_that_it_announces(comfy, file):
    graph = json.loads(file.read_text(encoding="utf-8"))
    for part in graph.values():
        if part["class_type"] in comfy.nodes:
            assert set(part["inputs"]) >= set(widgets(comfy, part["class_type"])), "every widget's value is in the file"
    Image.fromarray((picture()[0] * 255).byte().numpy()).save(comfy.base / "input" / "example.png")
    made = comfy.run(small(graph))
    announced = sum(made[id][1] for id, part in graph.items() if part["class_type"] == "Magi1Sampler")
    (video,) = (comfy.base / "output").rglob("*.mp4")
    assert file.stem in video.name
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (WIDTH, HEIGHT, 24)
        assert len(list(container.decode(video=0))) == announced

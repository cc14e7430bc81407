"""The example workflows run: as the front end queues them, with nothing installed."""

import json
from pathlib import Path

import av
import pytest

from magi.model_files.embedded import EMBEDDED_SIZE
from magi.remote import fake_video
from magi.remote.fake_server import FakeServer
from tests.support.graph import links
from tests.support.magi_graphs import node, widgets
from tests.support.paths import API_WORKFLOWS as API

UI = API.parent.parent / "workflows"
REMOTE, CLIP, BASE = "magi1_remote", "magi1_native_clip", "magi1_base_guidance"
OUTPUTS = {"SaveVideo", "PreviewAny"}
EMBEDDED = {"model": "embedded demo model (base)", "vae": "embedded demo model", "encoder": "embedded demo model"}
PARTS = {"Magi1ModelLoader": "model", "Magi1VAELoader": "vae", "Magi1TextEncoderLoader": "encoder"}


@pytest.fixture
def server(monkeypatch):
    """What looks like the service, but quick, small and for anybody; this machine has no key."""
    for name in ("WAVESPEED_API_KEY", "WAVESPEED_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fake_video, "_SIDES", {"480p": (208, 120)})
    with FakeServer(statuses=()) as running:
        yield running


def runnable(graph: dict) -> dict:
    """The graph without the downloads that two of them need; every other one runs as it is."""
    base = any(part["inputs"].get("model") == "4.5B_base" for part in graph.values())
    for part in graph.values():
        kind, inputs = part["class_type"], part["inputs"]
        if kind in PARTS:
            inputs[PARTS[kind]] = EMBEDDED[PARTS[kind]] if base else "auto"
        elif kind == "Magi1Sampler" and base:
            inputs["steps"] = 16  # a fifth of the time
        elif kind == "CLIPLoader":
            part |= node("Magi1TextEncoderLoader", encoder="auto", device="cpu", precision="fp32")
    return graph


def needed(graph: dict) -> dict:
    """What ComfyUI runs of a graph: the nodes that save or show, and those before them."""
    found, waiting = set(), [id for id, part in graph.items() if part["class_type"] in OUTPUTS]
    while waiting:
        found.add(id := waiting.pop())
        waiting += links(graph[id])
    return {id: part for id, part in graph.items() if id in found}


def load(name: str) -> dict:
    return json.loads((API / f"{name}.json").read_text(encoding="utf-8"))


def only(graph: dict, kind: str) -> str:
    """The id of the only node of a kind."""
    (id,) = (id for id, part in graph.items() if part["class_type"] == kind)
    return id


def seen(comfy, name: str) -> tuple[int, int, int, int]:
    """(width, height, frames a second, frames) of the video that a workflow has saved."""
    (video,) = (comfy.base / "output").rglob("*.mp4")
    assert name in video.name
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        frames = len(list(container.decode(video=0)))
        return stream.width, stream.height, stream.average_rate, frames


def private_in_outputs(comfy) -> list[str]:
    """Where a folder of this machine stands in what is saved, with its metadata, or shown: it is passed on with videos."""
    telling = [form for path in (comfy.base, API.parent.parent, Path.home()) if len(form := str(path)) > 5]
    files = [file for file in (comfy.base / "output").rglob("*") if file.is_file()]
    texts = {file.name: file.read_bytes().decode("latin-1") for file in files} | {"shown": json.dumps(comfy.shown)}
    return [f"{secret} in {name}" for name, text in texts.items() for secret in telling if secret in text]


def test_every_workflow_is_here():
    assert {f.stem for f in API.glob("*.json")} == {f.stem for f in UI.glob("*.json")} != set()


@pytest.mark.parametrize("name", sorted(f.stem for f in API.glob("*.json")))
def test_every_widgets_value_is_in_the_file(comfy, name):
    for part in load(name).values():
        if part["class_type"] in comfy.nodes:
            assert set(part["inputs"]) >= set(widgets(comfy, part["class_type"]))


@pytest.mark.parametrize("name", sorted({f.stem for f in API.glob("*.json")} - {REMOTE}))
def test_a_workflow_makes_the_video_that_it_announces(comfy, name):
    graph = load(name)
    assert needed(graph) == graph
    assert name in (CLIP, BASE) or runnable(load(name)) == graph
    made = comfy.run(runnable(graph))
    announced = sum(made[id][1] for id, part in graph.items() if part["class_type"] == "Magi1Sampler")
    assert seen(comfy, name) == (EMBEDDED_SIZE, EMBEDDED_SIZE, 24, announced)
    assert private_in_outputs(comfy) == []


def test_the_remote_workflow_has_the_service_make_the_video_and_loads_no_model(comfy, server):
    graph = load(REMOTE)
    remote, prompt = (only(graph, kind) for kind in ("Magi1Remote", "PrimitiveStringMultiline"))
    graph[remote]["inputs"]["base_url"] = server.url
    comfy.run(needed(graph))  # the local half is there as it is, without its models
    assert seen(comfy, REMOTE) == (208, 120, 24, 96)
    (task,) = server.tasks.values()
    assert task.body["prompt"] == graph[prompt]["inputs"]["value"]
    assert len(server.uploads) == server.count("submit") == 1
    assert comfy.management.loaded_models() == []
    assert private_in_outputs(comfy) == []


def test_the_remote_workflow_makes_it_here_after_one_link_was_moved(comfy, server):
    graph = load(REMOTE)
    graph[only(graph, "Magi1Remote")]["inputs"]["base_url"] = server.url
    graph[only(graph, "SaveVideo")]["inputs"]["video"] = [only(graph, "Magi1VAEDecode"), 1]
    made = comfy.run(needed(graph))
    assert seen(comfy, REMOTE) == (EMBEDDED_SIZE, EMBEDDED_SIZE, 24, made[only(graph, "Magi1Sampler")][1])
    assert server.requests == []

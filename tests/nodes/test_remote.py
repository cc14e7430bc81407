"""The remote node in a graph: what it gives, what it refuses, and that nobody gets to see the key."""

import json
import logging
import os
import traceback
from pathlib import Path

import pytest
import torch

from magi.remote.address import DEFAULT
from magi.remote.api import VERSIONS
from magi.remote.fake_server import Answer
from magi.remote.request import ASPECTS, FPS, FRAMES, MOST_SEED, RESOLUTIONS
from tests.support.graph import InvalidGraph, NodeError
from tests.support.magi_graphs import filled, messages, node, picture, remote, widgets
from tests.support.remote_service import KEY, poll_answer


@pytest.fixture
def server(node_server):
    return node_server


def test_what_it_gives(comfy, server, quick):
    server.statuses = ("created",) * 10 + ("processing",) * 10  # long enough to be seen
    video, frames, task, url = comfy.run(remote(comfy, server))["remote"]
    assert (frames.shape, frames.dtype) == ((96, 480, 832, 3), torch.float32)
    assert 0 <= frames.min() < 0.2 < 0.8 < frames.max() <= 1
    parts = video.get_components()
    assert parts.frame_rate == 24
    assert (parts.images - frames).abs().mean() < 0.02, "the same video"
    assert [task] == list(server.tasks)
    assert url.startswith(server.url)
    source = Path(video.get_stream_source())
    assert source.parent == comfy.base / "temp"
    assert list((comfy.base / "user" / "magi1" / "remote").glob("*.json")), "what is noted outlives ComfyUI"
    assert messages(comfy)[-1] == f"96 frames, 24 per second, 832x480, task {task}."
    assert any("waiting in the service's queue" in text for text in messages(comfy))
    assert any("at work (processing)" in text for text in messages(comfy))
    values = [value for name, value, _ in comfy.events.progress if name == "remote"]
    assert values == sorted(values)
    assert values[-1] == comfy.events.progress[-1][2]


def test_a_picture_and_all_widgets_arrive(comfy, server, quick):
    graph = remote(comfy, server, frames=100, fps=20, aspect_ratio="1:1", seed=5, safety_checker=False, image=["in", 0])
    batch = torch.cat([picture(64, 64), torch.zeros(1, 64, 64, 3)])
    graph["in"] = node(comfy.constant("IMAGE", batch))
    _, frames, _, _ = comfy.run(graph)["remote"]
    assert frames.shape == (100, 480, 480, 3)
    (task,) = server.tasks.values()
    wanted = {"num_frames": 100, "frames_per_second": 20, "aspect_ratio": "1:1", "seed": 5}
    assert task.body | wanted | {"enable_safety_checker": False} == task.body
    assert len(server.uploads) == 1
    assert (frames[0].mean((0, 1)) - batch[0].mean((0, 1))).abs().max() < 0.1, "the first of the batch, in its colours"


def test_its_video_goes_where_the_local_one_goes(comfy, server, quick):
    graph = remote(comfy, server)
    graph["save"] = node("SaveVideo", video=["remote", 0], filename_prefix="clip", format="auto", codec="auto")
    comfy.run(graph)
    assert len(list((comfy.base / "output").glob("clip*.mp4"))) == 1


def test_differences_are_said(comfy, server, quick):
    comfy.run(remote(comfy, server, api_version="v3", frames=120))
    assert "96 frames instead of 120" in messages(comfy)[-1]


def test_auto_without_a_picture_is_said(comfy, server, quick):
    comfy.run(remote(comfy, server, aspect_ratio="auto"))
    assert "no picture" in messages(comfy)[-1]


# -- refused before it costs -------------------------------------------------------------------------------------------


def refused(comfy, graph, match: str) -> None:
    with pytest.raises(InvalidGraph, match=match):
        comfy.run(graph)


def test_a_blank_prompt(comfy, server):
    refused(comfy, remote(comfy, server, prompt=" "), "prompt is blank")
    assert server.requests == []


@pytest.mark.parametrize(
    "widget", [{"frames": 95}, {"frames": 193}, {"fps": 31}, {"seed": 2**31}, {"resolution": "4K"}]
)
def test_values_out_of_range(comfy, server, widget):
    with pytest.raises((InvalidGraph, NodeError), match=next(iter(widget))):  # not every ComfyUI checks menus
        comfy.run(remote(comfy, server, **widget))
    assert server.requests == []


def test_a_prompt_that_comes_blank_from_another_node(comfy, server):
    graph = remote(comfy, server, prompt=["text", 0])
    graph["text"] = node(comfy.constant("STRING", "\n"))
    with pytest.raises(NodeError, match="prompt is blank"):
        comfy.run(graph)
    assert server.requests == []


def test_a_tiny_picture(comfy, server):
    graph = remote(comfy, server, image=["in", 0])
    graph["in"] = node(comfy.constant("IMAGE", picture(16, 16)))
    with pytest.raises(NodeError, match="16x16"):
        comfy.run(graph)
    assert server.requests == []


def test_no_key(comfy, monkeypatch):
    monkeypatch.delenv("WAVESPEED_API_KEY", raising=False)
    graph = filled(comfy, {"remote": node("Magi1Remote", prompt="A cat")})
    file = str(comfy.base / "user" / "magi1" / "wavespeed_api_key.txt")
    assert comfy.errors(graph) == {}, "front ends show what validation says two clicks deep"
    with pytest.raises(NodeError) as found:
        comfy.run(graph)
    assert found.value.kind == "MagiError"
    assert "WAVESPEED_API_KEY" in str(found.value)
    assert file in str(found.value).replace("\\\\", "\\")


def test_the_key_from_the_user_folder(comfy, server, quick, monkeypatch):
    monkeypatch.delenv("WAVESPEED_API_KEY")
    (comfy.base / "user" / "magi1").mkdir(exist_ok=True)
    (comfy.base / "user" / "magi1" / "wavespeed_api_key.txt").write_text(f"{KEY}\n{server.url}\n")
    assert comfy.run(remote(comfy, server))["remote"][1].shape[0] == 96


def test_a_workflow_that_sends_the_key_elsewhere(comfy, server):
    with pytest.raises(NodeError, match="not WaveSpeed") as found:
        comfy.run(remote(comfy, server, base_url="https://evil.example"))
    assert found.value.kind == "MagiError"
    assert server.requests == []


def test_a_workflow_that_leads_to_a_port_of_this_machine(comfy, server, quick, monkeypatch):
    """Whoever listens there gets no key; a test server needs none."""
    for other in ("", "https://gateway.example", server.url.replace("127.0.0.1", "localhost"), "http://127.0.0.1:1"):
        monkeypatch.setenv("WAVESPEED_BASE_URL", other)
        with pytest.raises(NodeError, match=f"none was sent.*WAVESPEED_BASE_URL={server.url}"):
            comfy.run(remote(comfy, server))
    assert server.count("submit") == 4
    server.key = None
    server.requests.clear()
    assert comfy.run(remote(comfy, server))["remote"][1].shape[0] == 96
    assert len(server.requests) > 2
    assert all("authorization" not in request.headers for request in server.requests)


def test_what_the_service_says_is_no_html(comfy, server, quick):
    """Front ends show a node's text as such."""
    server.script["poll"].extend([poll_answer("<img src=x onerror=alert(1)>\x1b[2J")] * 20)
    comfy.run(remote(comfy, server))
    assert any("‹img src=x onerror=alert(1)›" in text for text in messages(comfy))
    assert not [text for text in messages(comfy) if "<" in text or not text.isprintable()]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", f"A cat {KEY}"),
        ("resume_id", KEY),
        ("base_url", KEY),
        ("base_url", f"https://evil.example/{KEY}"),
        ("base_url", f"{DEFAULT}/{KEY}"),
    ],
)
def test_a_key_in_a_field(comfy, server, field, value):
    with pytest.raises((InvalidGraph, NodeError), match="in a field that is saved") as found:
        comfy.run(remote(comfy, server, **{field: value}))
    assert KEY not in str(found.value)
    assert server.requests == []


def test_too_little_memory_for_the_frames(comfy, server, monkeypatch):
    monkeypatch.setattr(comfy.module("nodes.comfyui.media"), "free_host_memory", lambda: 10**8)
    with pytest.raises(NodeError, match="480p"):
        comfy.run(remote(comfy, server))
    assert server.requests == []


def test_the_menus_are_those_of_the_service(comfy):
    own = widgets(comfy, "Magi1Remote")
    assert (own["frames"]["min"], own["frames"]["max"]) == FRAMES
    assert (own["fps"]["min"], own["fps"]["max"]) == FPS
    assert (own["seed"]["min"], own["seed"]["max"]) == (-1, MOST_SEED)
    assert tuple(own["resolution"]["options"]) == RESOLUTIONS
    assert tuple(own["aspect_ratio"]["options"]) == ASPECTS
    assert tuple(own["api_version"]["options"]) == VERSIONS
    assert own["base_url"]["default"] == DEFAULT
    assert own["seed"]["control_after_generate"] is False, "a seed that changes by itself would spend money by itself"


# -- again -------------------------------------------------------------------------------------------------------------


def test_queued_again_it_is_not_run(comfy, server, quick):
    graph = remote(comfy, server)
    comfy.run(graph)
    comfy.run(graph)
    assert comfy.executed == []


def test_without_a_seed_it_is_run_again(comfy, server, quick):
    """Its videos differ; here the task is asked for by its id, so that nothing is bought."""
    graph = remote(comfy, server, seed=-1)
    task = comfy.run(graph)["remote"][2]
    graph["remote"]["inputs"]["resume_id"] = task
    comfy.run(graph)
    comfy.run(graph)
    assert comfy.executed == ["remote"]


def test_a_task_by_its_id(comfy, server, quick):
    task = comfy.run(remote(comfy, server))["remote"][2]
    assert comfy.run(remote(comfy, server, prompt="Another", resume_id=task))["remote"][2] == task


def test_an_error_is_the_service_s_own(comfy, server, quick):
    server.script["submit"].append(Answer(402, {"code": 402, "message": "insufficient credits", "data": None}))
    with pytest.raises(NodeError, match="insufficient credits") as found:
        comfy.run(remote(comfy, server))
    assert found.value.kind == "RefusedError"


# -- the key -----------------------------------------------------------------------------------------------------------


def test_the_key_is_nowhere(comfy, server, quick, caplog, capsys):
    """In no log, error, file, frame of a traceback that is printed, or input of a node that fails later."""
    caplog.set_level(logging.DEBUG)
    api = __import__("comfy_api.latest", fromlist=["io"]).io
    received = []

    def fail(cls, **inputs):
        received.append(repr(inputs))
        raise ValueError(f"cannot use {inputs}")

    inputs = [api.Video.Input("video"), api.Image.Input("frames"), api.String.Input("task"), api.String.Input("url")]
    schema = api.Schema("Fails", inputs=inputs, outputs=[api.Image.Output()])
    body = {"define_schema": classmethod(lambda cls: schema), "execute": classmethod(fail)}
    comfy.add("Fails", type("Fails", (api.ComfyNode,), body))
    graph = remote(comfy, server)
    graph["save"] = node("SaveVideo", video=["remote", 0], filename_prefix="clip", format="auto", codec="auto")
    links = {name: ["remote", i] for i, name in enumerate(("video", "frames", "task", "url"))}
    with pytest.raises(NodeError, match="cannot use") as found:
        comfy.run(graph | {"fails": node("Fails", **links)})
    server.script["poll"].append(Answer(401, {"code": 401, "message": f"the key {KEY} is bad", "data": None}))
    with pytest.raises(NodeError, match=r"\*\*\*") as refused_later:
        comfy.run(remote(comfy, server, resume_id="another-task"))
    printed = capsys.readouterr()
    texts = [caplog.text, printed.out, printed.err, *received, *messages(comfy), json.dumps(graph), repr(comfy.nodes)]
    texts += ["".join(traceback.format_exception(error.value)) for error in (found, refused_later)]
    assert received
    assert "Going on" in caplog.text or "was submitted" in caplog.text
    assert not [text for text in texts if KEY in text]
    looked = 0
    for path in comfy.base.rglob("*"):
        if path.is_file():
            looked += 1
            assert KEY.encode() not in path.read_bytes(), path
    assert looked >= 3, "video, note of the task, saved video"
    assert os.environ["WAVESPEED_API_KEY"] == KEY

"""A remote video from the request to the file, over real HTTP."""

from types import SimpleNamespace

import av
import pytest
import torch

from magi.remote.errors import RefusedError
from magi.remote.fake_server import Answer, result
from magi.remote.progress import RemoteProgress, Watch
from tests.support.remote_service import DROPPED, PICTURE

SIZE = (832, 480)


def frames_of(path) -> int:
    with av.open(str(path)) as container:
        return len(list(container.decode(video=0)))


def test_created_processing_completed(service):
    service.server.statuses = ("created", "processing", "processing")
    made = service.make()
    assert (made.task_id, made.notes) == (service.task, ())
    assert (made.facts.frames, made.facts.fps, made.facts.width, made.facts.height) == (96, 24, *SIZE)
    assert frames_of(made.path) == 96
    assert made.url.startswith(service.server.url)
    texts = " | ".join(at.text for at in service.progress)
    for phase in (
        "submitting",
        "waiting in the service's queue",
        "the service is at work (processing)",
        "downloading, 100%",
    ):
        assert phase in texts
    assert service.task in texts
    parts = [at.part for at in service.progress]
    assert parts == sorted(parts)
    assert parts[0] >= 0
    assert parts[-1] == 1
    assert any(service.task in line for line in service.log), "in the log as soon as it is known"


def test_what_is_shown_as_time_goes_by(monkeypatch):
    seen: list[RemoteProgress] = []
    now = [1000.0]
    monkeypatch.setattr("magi.remote.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    watch = Watch(seen.append)
    watch.phase("wait", "at work")
    for _ in range(3):
        now[0] += 60
        watch.update()
    watch.phase("download", "downloading")
    for done in (None, 0.5, None, 1.5):
        watch.update(done)
    watch.phase("download", "downloading")
    texts = [f"at work, {seconds} s" for seconds in (0, 60, 120, 180)]
    texts += [f"downloading, {known}" for known in ("0 s", "0 s", "50%", "50%", "100%", "0 s")]
    assert [at.text for at in seen] == texts
    parts = [at.part for at in seen]
    assert parts == sorted(parts), "never back"
    assert parts[1] - parts[0] > parts[2] - parts[1] > parts[3] - parts[2] > 0, "ever more slowly"
    assert parts[3] < parts[4] < parts[6] < parts[8] < 1


def test_what_is_submitted(service):
    service.make(prompt="A dog", num_frames=120, fps=30, aspect_ratio="9:16", seed=3, safety_checker=False)
    (asked,) = [request for request in service.server.requests if request.method == "POST"]
    assert asked.headers["content-type"] == "application/json"
    body = service.server.tasks[service.task].body
    assert body == {
        "prompt": "A dog",
        "num_frames": 120,
        "frames_per_second": 30,
        "resolution": "480p",
        "aspect_ratio": "9:16",
        "seed": 3,
        "enable_safety_checker": False,
    }


def test_without_a_seed_the_service_draws_one(service):
    service.make(seed=None)
    assert "seed" not in service.server.tasks[service.task].body


def test_a_picture_is_uploaded_first(service):
    image = torch.zeros(64, 96, 3, dtype=torch.uint8)
    image[:32] = 200
    service.make(image=image, aspect_ratio="auto")
    ((name, sent),) = service.server.uploads.items()
    assert service.server.tasks[service.task].body["image"] == f"{service.server.url}/media/{name}"
    assert name.endswith("image.png")
    assert sent.startswith(b"\x89PNG")
    assert "uploading the picture" in " ".join(at.text for at in service.progress)


def test_a_picture_whose_address_has_another_name(service):
    service.server.script["upload"].append(Answer(content=result({"url": "https://a.b/cat.png"})))
    service.make(image=PICTURE)
    assert service.server.tasks[service.task].body["image"] == "https://a.b/cat.png"


def test_a_pictures_address_is_passed_on(service):
    service.make(image="https://example.org/cat.jpg")
    assert service.server.tasks[service.task].body["image"] == "https://example.org/cat.jpg"
    assert service.server.count("upload") == 0


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_one_version_for_every_call(service, version):
    image = torch.zeros(64, 64, 3, dtype=torch.uint8)
    service.make(version=version, image=image)
    paths = [request.target for request in service.server.requests if "/api/" in request.target]
    assert len(paths) >= 3
    assert all(path.startswith(f"/api/{version}/") for path in paths)


def test_an_upload_that_is_too_large(service):
    service.server.script["upload"].append(Answer(413, result(None, 413, "file too large")))
    service.fails("too large", RefusedError, image=PICTURE)
    assert service.submits == 0


def test_an_upload_that_the_service_does_not_know(service):
    service.server.script["upload"].append(Answer(404, b""))
    service.fails("Nothing was submitted", image=PICTURE)
    assert service.server.count("upload") == 1


def test_an_upload_is_tried_again(service):
    service.server.script["upload"].extend([Answer(500, b""), DROPPED, Answer(content=result({}))])
    service.make(image=PICTURE)
    assert service.server.count("upload") == 4


def test_an_upload_that_never_works(service):
    service.server.script["upload"].extend([Answer(503, b"")] * 9)
    service.fails("Nothing was submitted", image=PICTURE)
    assert service.submits == 0
    assert service.records == []

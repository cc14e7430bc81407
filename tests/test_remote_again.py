"""The same request again: after success, failure or a crash, it is paid for once."""

import threading
import time

import pytest

from magi.remote.fake_server import Answer, result
from tests.remote_service import PICTURE


def test_the_same_request_is_paid_for_once(service):
    first, second = service.make(), service.make()
    assert first.task_id == second.task_id
    assert second.facts.frames == 96


def test_another_request_is_another_task(service):
    service.most_submits = 4
    service.make()
    service.make(seed=8)
    service.make(prompt="A dog")
    service.make(image=PICTURE)
    assert len(service.server.tasks) == 4


def test_without_a_seed_every_run_is_another_video(service):
    service.most_submits = 2
    assert service.make(seed=None).task_id != service.make(seed=None).task_id


def test_without_a_seed_an_unfinished_task_is_gone_on_with(service):
    service.server.script["poll"].extend([Answer(500, b"")] * 4)
    service.fails("is not lost", seed=None)
    assert service.make(seed=None).task_id == service.task


def test_a_task_is_fetched_by_its_id(service):
    made = service.make()
    again = service.make(resume_id=f" {made.task_id} ", prompt="whatever", seed=99)
    assert again.task_id == made.task_id
    assert service.submits == 1


@pytest.mark.parametrize("id", ["../secrets", "a b", "x", "http://example.org", "id?x=1"])
def test_an_id_that_cannot_be_one(service, id):
    service.fails("not the id of a task", resume_id=id)
    assert service.server.requests == []


def test_an_id_that_the_service_does_not_know(service):
    service.fails("does not know task 0123456789", resume_id="0123456789")
    assert service.submits == 0


def test_a_task_that_the_service_has_lost(service):
    service.server.script["poll"].extend([Answer(500, b"")] * 4)
    service.fails("is not lost")
    service.server.tasks.clear()
    word = service.fails("does not know").split("put ")[-1].split()[0]
    service.most_submits = 2
    assert service.make(resume_id=word).facts.frames == 96
    assert service.submits == 2


def test_a_record_lives_as_long_as_the_service_keeps_videos(service, monkeypatch):
    service.make()
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 6.9 * 24 * 3600)
    service.make()
    assert service.submits == 1
    monkeypatch.setattr("time.time", lambda: now + 7.1 * 24 * 3600)
    service.most_submits = 2
    service.make()
    assert service.submits == 2


@pytest.mark.parametrize("days", [-1, 10])
def test_a_clock_that_is_wrong_does_not_pay_twice(service, monkeypatch, days):
    """A note that looks far too old, or from tomorrow: the service is asked before anything is submitted."""
    service.server.script["poll"].extend([Answer(500, b"")] * 4)
    service.fails("is not lost")
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + days * 24 * 3600)
    assert service.make().task_id == service.task
    assert service.submits == 1


def test_an_old_task_that_the_service_has_forgotten_is_made_anew(service, monkeypatch):
    service.server.script["poll"].extend([Answer(500, b"")] * 4)
    service.fails("is not lost")
    service.server.tasks.clear()
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 8 * 24 * 3600)
    service.most_submits = 2
    assert service.make().task_id == service.task


def test_a_service_that_refuses_to_speak_of_a_task(service):
    service.server.script["poll"].extend([Answer(400, result(None, 400, "deleted"))] * 3)
    service.fails("is not lost")
    word = f"new-{int(service.records[0]['sent_at'] * 1000) % 100_000:05d}"
    service.fails("is not lost")
    service.most_submits = 2
    assert service.make(resume_id=word).facts.frames == 96
    assert service.submits == 2


@pytest.mark.parametrize("seed", [None, 7])
def test_a_video_that_was_not_taken_is_fetched_again(service, seed):
    """The user's program fails on it, or is cancelled: it is paid for."""

    def fail(path, facts):
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError):
        service.make(seed=seed, take=fail)
    taken = []
    assert service.make(seed=seed, take=lambda *made: taken.append(made)).task_id == service.task
    assert taken[0][1].frames == 96
    assert service.submits == 1


def test_a_damaged_record_stops_everything(service):
    service.make()
    (path,) = (service.folder / "records").glob("*.json")
    path.write_bytes(path.read_bytes()[:40])
    service.fails("cannot be read.*predictions")
    assert service.submits == 1
    path.unlink()


def test_two_at_a_time_share_a_task(service):
    service.server.statuses = ("processing",) * 20
    made = []
    others = [threading.Thread(target=lambda: made.append(service.make())) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join(20)
    assert len(made) == 3
    assert len({video.task_id for video in made}) == 1


def test_a_folder_for_notes_that_cannot_be_written(service):
    (service.folder / "records").write_text("a file in its place")
    service.fails("nothing was sent")
    assert service.server.requests == []
    (service.folder / "records").unlink()


def test_a_folder_for_videos_that_cannot_be_written(service):
    (service.folder / "videos").write_text("a file in its place")
    service.fails("cannot be written")
    assert service.server.requests == []
    (service.folder / "videos").unlink()

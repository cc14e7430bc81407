"""The same request again: after success, failure or a crash, it is paid for once."""

import errno
import json
import math
import os
import shutil
import tempfile
import threading
import time

import pytest

from magi.errors import MagiError
from magi.remote.errors import EndedError, UnclearError
from magi.remote.fake_server import Answer, result
from magi.remote.records import Records
from tests.support.remote_service import DROPPED, PICTURE, poll_answer, quick


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


def test_without_a_seed_a_video_that_did_not_come_is_not_paid_for_twice(service):
    service.server.script["download"].extend([Answer(404, b"gone")] * 2)
    service.fails("could not be downloaded", seed=None)
    assert service.make(seed=None).task_id == service.task


def test_a_task_by_its_id_leaves_that_of_the_request_alone(service):
    """The same widgets, but for resume_id: whatever becomes of the other task, the request's own one is not forgotten."""
    service.most_submits = 2
    other = service.make(seed=8).task_id
    service.server.script["poll"].extend([Answer(500, b"")] * 4)
    service.fails("is not lost", seed=None)
    (own,) = set(service.server.tasks) - {other}
    service.server.script["poll"].append(poll_answer("failed"))
    service.fails("failed to make", EndedError, seed=None, resume_id="another-task")
    assert service.make(seed=None, resume_id=other).task_id == other
    assert service.make(seed=None).task_id == own


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
    service.fails("does not know task 0123456789", resume_id="0123456789", limits=quick(unknown=1, retries=5))
    assert service.submits == 0
    assert service.server.count("poll") == 2, "once more, as a new task may not be known at once"


def test_a_task_that_the_service_has_lost(service):
    service.server.script["poll"].extend([Answer(500, b"")] * 4)
    service.fails("is not lost")
    service.server.tasks.clear()
    code = service.fails("does not know").split("put ")[-1].split()[0]
    service.most_submits = 2
    assert service.make(resume_id=code).facts.frames == 96
    assert service.submits == 2


def test_a_record_lives_as_long_as_the_service_keeps_videos(service, monkeypatch):
    service.make()
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 6.9 * 24 * 3600)
    service.make()
    assert service.submits == 1
    monkeypatch.setattr("time.time", lambda: now + 7.1 * 24 * 3600)
    service.server.tasks.clear()
    service.most_submits = 2
    service.make()
    assert service.submits == 2


CLOCKS = {
    "1969": lambda now: -3e7,
    "the first second": lambda now: 0.0,
    "yesterday": lambda now: now - 86_400,
    "in ten days": lambda now: now + 864_000,
    "in 6000 years": lambda now: now + 2e11,
}


@pytest.mark.parametrize("delivered", [True, False], ids=["delivered", "on its way"])
@pytest.mark.parametrize("clock", CLOCKS.values(), ids=CLOCKS)
def test_a_clock_that_is_wrong_does_not_pay_twice(service, monkeypatch, clock, delivered):
    """A note that looks far too old, or from tomorrow: the service is asked before anything is submitted."""
    if delivered:
        service.make()
    else:
        service.server.script["poll"].extend([Answer(500, b"")] * 4)
        service.fails("is not lost")
    then = clock(time.time())
    monkeypatch.setattr("time.time", lambda: then)
    assert service.make().task_id == service.task
    assert service.submits == 1


@pytest.mark.parametrize("day", [-1e300, -3e7, 2.5e11, 1e17, 1e300])
def test_a_note_from_a_day_that_cannot_be(service, day):
    """Written by a wrong clock, and read by a right one."""
    service.make()
    (path,) = (service.folder / "records").glob("*.json")
    path.write_text(json.dumps(service.records[0] | {"sent_at": day}))
    assert service.make().task_id == service.task


def test_a_clock_that_stands(service, monkeypatch):
    """Two attempts at the same time: the code for the second one is not that for the third."""
    monkeypatch.setattr("time.time", lambda: 0.0)
    service.server.script["submit"].extend([DROPPED] * 2)
    codes = iter([11111, 22222])
    monkeypatch.setattr("secrets.randbelow", lambda most: next(codes))
    service.fails("a task may have been made", UnclearError)
    service.most_submits = 2
    service.fails("a task may have been made", UnclearError, resume_id="new-11111")
    service.fails("a task may have been made", UnclearError, resume_id="new-11111")
    assert service.submits == 2


def test_a_note_of_an_earlier_version(service):
    service.server.script["submit"].append(DROPPED)
    service.fails("a task may have been made", UnclearError)
    (path,) = (service.folder / "records").glob("*.json")
    fields = {name: value for name, value in service.records[0].items() if name != "code"} | {"sent_at": 1700000012.345}
    path.write_text(json.dumps(fields))
    service.most_submits = 2
    assert service.make(resume_id="new-12345").facts.frames == 96


def test_an_old_task_that_the_service_has_forgotten_is_made_anew(service, monkeypatch):
    service.server.script["poll"].extend([Answer(500, b"")] * 4)
    service.fails("is not lost")
    service.server.tasks.clear()
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 8 * 24 * 3600)
    service.most_submits = 2
    assert service.make().task_id == service.task


def test_a_task_that_the_service_does_not_know_yet(service, monkeypatch):
    """It was made just now, and a wrong clock calls it old: that it is unknown for a moment does not count."""
    service.server.script["poll"].extend([Answer(500, b"")] * 4)
    service.fails("is not lost")
    then = time.time() + 864_000
    monkeypatch.setattr("time.time", lambda: then)
    service.server.script["poll"].extend([Answer(404, result(None, 404, "not yet"))] * 2)
    assert service.make().task_id == service.task
    assert service.submits == 1


def test_a_service_that_refuses_to_speak_of_a_task(service):
    service.server.script["poll"].extend([Answer(400, result(None, 400, "deleted"))] * 3)
    service.fails("is not lost")
    code = f"new-{service.records[0]['code']}"
    service.fails("is not lost")
    service.most_submits = 2
    assert service.make(resume_id=code).facts.frames == 96
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
    with pytest.raises(MagiError, match=r"cannot be read.*predictions") as kept:  # as ComfyUI keeps it, for its history
        service.make()
    assert service.submits == 1
    path.unlink()
    service.most_submits = 2

    def seen(at) -> None:
        assert "another run" not in at.text, "the request is free again"

    assert service.make(seen=seen).facts.frames == 96
    assert kept


def test_a_full_disk_damages_no_note(tmp_path, file_size_limit):
    entry = Records(tmp_path).open("0123", lambda: None)
    with file_size_limit(20), pytest.raises(MagiError, match="nothing was sent"):
        entry.begin("https://a.b", "v2", {})
    entry.begin("https://a.b", "v2", {})
    with file_size_limit(20):
        entry.update(task_id="0123456789")
    assert entry.record.task_id == "0123456789", "a video is not given up for that"
    entry.release()
    again = Records(tmp_path).open("0123", lambda: None)
    assert again.record is not None
    again.release()


WRONG = {
    "sent_at": [None, "today", math.nan, math.inf, 10**400, []],
    "task_id": [5, "../../etc", "", ["x"], {}],
    "cancelled": ["no", None, 0],
    "delivered": ["yes", {}],
    "code": [12345, None],
    "more": [1],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_note_with_another_kind_of_value(service, name, value):
    """It is somebody else's work, and its task may have been paid for."""
    service.make()
    (path,) = (service.folder / "records").glob("*.json")
    path.write_text(json.dumps(service.records[0] | {name: value}))
    service.fails("cannot be read.*predictions")


@pytest.mark.parametrize(
    "content", [b"[" * 10_000, b"[]", b"null", b"\xff\xfe", b"1" * 5000], ids=["deep", "list", "null", "bytes", "long"]
)
def test_a_note_that_is_none(service, content):
    service.make()
    (path,) = (service.folder / "records").glob("*.json")
    path.write_bytes(content)
    service.fails("cannot be read.*predictions")


def test_no_note_goes_for_its_age(service):
    """The day may be wrong by weeks, and the task be at work."""
    service.make()
    (note,) = (service.folder / "records").glob("*.json")
    os.utime(note, (0, 0))
    service.make(seed=8, resume_id=service.task)
    assert note.exists()


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


def test_a_folder_for_videos_that_is_full(service, monkeypatch):
    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    service.fails("No space left.*Make room")
    assert service.server.requests == []


def test_a_disk_that_is_full_when_the_video_comes(service, file_size_limit):
    with file_size_limit(20_000):
        service.fails("cannot be written.*Make room")
    assert service.videos == []
    assert service.make().task_id == service.task


def test_a_folder_for_videos_that_goes_away(service):
    def seen(at) -> None:
        if "at work" in at.text:
            shutil.rmtree(service.folder / "videos", ignore_errors=True)

    service.fails("cannot be written", seen=seen)
    assert service.make().task_id == service.task


def test_what_a_killed_run_left_goes(service):
    folder = service.folder / "videos"
    folder.mkdir()
    for name, hours in (("magi1_dead.mp4.part", 2), ("magi1_busy.mp4.part", 0), ("mine.mp4.part", 2)):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - hours * 3600,) * 2)
    service.make()
    left = {path for path in folder.iterdir() if path.suffix == ".part"}
    assert {path.name for path in left} == {"magi1_busy.mp4.part", "mine.mp4.part"}
    for path in left:
        path.unlink()

"""A cancel stops within two seconds in every phase, and gives up what is not finished."""

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from magi.errors import MagiError
from magi.remote.errors import UnclearError
from magi.remote.fake_server import Answer, FakeServer
from tests.support.remote_service import PICTURE, poll_answer, quick, wait_for

SLOW = 8.0  # seconds that a server takes where a cancel is to find the client waiting


def phase(word: str, seconds: float = 0.0):
    """When the phase has been on for so long: the time at which it had, which may be a while before the next report."""
    began: list[float] = []

    def since(at) -> float | None:
        if word in at.text:
            began.append(time.monotonic())
        return began[0] + seconds if began and began[-1] - began[0] >= seconds else None

    return since


def test_cancel_while_uploading(service):
    service.server.script["upload"].append(lambda usual: Answer(content=usual.content, wait=SLOW))
    assert service.cancels(phase("uploading", 0.3), image=PICTURE) < 2
    assert service.submits == 0


def test_cancel_while_submitting(service):
    """The answer comes after the user has gone: the task is noted, and given up."""
    service.server.script["submit"].append(lambda usual: Answer(content=usual.content, wait=2.0))
    assert service.cancels(phase("submitting", 0.3)) < 2
    wait_for(lambda: service.server.count("delete") == 1)
    wait_for(lambda: service.records and service.records[0]["cancelled"])
    assert service.records[0]["task_id"] == service.task
    wait_for(lambda: not service.threads)


def test_queued_again_while_the_cancelled_request_is_still_answered(service):
    """It waits until the task is known, instead of not knowing what became of it."""
    service.server.script["submit"].append(lambda usual: Answer(content=usual.content, wait=2.0))
    service.server.script["delete"].append(Answer(500, b""))
    service.cancels(phase("submitting", 0.1))
    assert service.make().task_id == service.task


def test_cancel_while_submitting_what_never_is_answered(service):
    service.server.script["submit"].append(lambda usual: Answer(keep=0, wait=2.0))
    assert service.cancels(phase("submitting", 0.3)) < 2
    wait_for(lambda: not service.threads)
    service.fails("a task may have been made", UnclearError)


def test_cancel_while_submitting_what_is_refused(service):
    service.server.script["submit"].append(Answer(402, b"", wait=1.0))
    service.cancels(phase("submitting", 0.1))
    wait_for(lambda: not service.threads)
    assert service.records == [], "no task was made, and nothing is in the way of another try"


def test_cancel_before_anybody_was_reached(service):
    """A connection that is still being made: nothing is sent after the user has gone."""
    with FakeServer() as other:
        gone = other.url
    service.server.url, url = gone, service.server.url
    assert service.cancels(phase("submitting", 0.2), limits=quick(retry_first=5.0, retry_most=5.0)) < 2
    service.server.url = url
    wait_for(lambda: not service.threads)
    assert service.records == []
    service.make()


def test_cancel_while_the_connection_is_made(service, monkeypatch):
    found = socket.getaddrinfo

    def slow(*args, **options):
        time.sleep(1.0)
        return found(*args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    assert service.cancels(phase("submitting", 0.2)) < 2
    wait_for(lambda: not service.threads)
    assert service.server.tasks == {}, "nothing is bought for nobody"
    assert service.records == []


@pytest.mark.parametrize("wait", [0.0, SLOW], ids=["between two polls", "in a poll"])
def test_cancel_while_waiting(service, wait):
    service.server.statuses = ("processing",) * 1000
    if wait:
        service.server.script["poll"].extend([poll_answer("processing"), Answer(wait=wait)])
    assert service.cancels(phase("at work", 0.3), limits=quick(poll_first=0.1, poll_most=5.0)) < 2
    wait_for(lambda: service.server.count("delete") == 1)
    time.sleep(0.1)
    assert [r.target for r in service.server.requests if r.method == "DELETE"] == [
        f"/api/v3/predictions/{service.task}"  # v2 has no such call
    ]
    assert service.records[0]["cancelled"]


@pytest.mark.parametrize(
    "answer", [Answer(wait=SLOW), Answer(content=b" " * 1000, block=1, pause=0.2)], ids=["silent", "dripping"]
)
def test_cancel_in_a_poll_at_a_service_that_has_stopped_answering(service, answer):
    """The deletion is sent all the same, and before the cancel returns: a command ends then, with all its threads."""
    service.server.statuses = ("processing",) * 1000
    service.server.script["poll"].extend([poll_answer("processing"), *[answer] * 9])
    assert service.cancels(phase("at work", 0.3)) < 2
    assert service.server.count("delete") == 1
    assert service.records[0]["cancelled"]


def test_cancel_of_a_submission_that_is_never_answered_says_where_to_look(service):
    service.server.script["submit"].append(lambda usual: Answer(content=usual.content, wait=SLOW))
    assert service.cancels(phase("submitting", 0.2)) < 2
    assert "wavespeed.ai/predictions" in service.log[-1]


def test_cancel_while_a_retry_waits(service):
    service.server.script["poll"].extend([Answer(429, b"", {"Retry-After": "60"})])
    assert service.cancels(phase("asking for task", 0.3)) < 2
    wait_for(lambda: service.server.count("delete") == 1)  # new, though nobody has seen it run


def test_a_cancel_does_not_give_up_what_was_completed_before(service):
    """Fetched again after a restart: it is paid for, whatever the user does now."""
    service.make()
    service.server.script["poll"].append(Answer(wait=SLOW))
    assert service.cancels(phase("asking for task", 0.3)) < 2
    assert f"Task {service.task} is left as it is" in service.log[-1]
    service.server.script["poll"].append(Answer(wait=SLOW))
    assert service.cancels(phase("asking for task", 0.3), resume_id=service.task) < 2
    assert service.server.count("delete") == 0
    assert service.make().task_id == service.task


def test_cancel_of_a_task_that_is_followed_by_its_id(service):
    service.server.statuses = ("processing",) * 1000
    service.cancels(phase("at work"))
    wait_for(lambda: service.server.count("delete") == 1)
    service.server.tasks[service.task].statuses.extend(["processing"] * 1000)
    service.server.tasks[service.task].statuses.popleft()
    service.cancels(phase("at work"), resume_id=service.task, prompt="Another")
    wait_for(lambda: service.server.count("delete") == 2)


def test_cancel_while_another_run_of_the_same_request_works(service):
    service.server.statuses = ("processing",) * 1000
    stop = threading.Event()
    first = threading.Thread(target=lambda: service.cancels(lambda at: time.monotonic() if stop.is_set() else None))
    first.start()
    wait_for(lambda: service.server.count("poll"))
    assert service.cancels(phase("waiting for another run", 0.3)) < 2
    assert service.server.count("delete") == 0
    stop.set()
    first.join(10)


def test_cancel_while_downloading_keeps_what_is_paid(service):
    def slow(usual):
        return Answer(content=usual.content + bytes(1 << 20), headers=usual.headers, pause=0.5)

    service.server.script["download"].append(slow)
    assert service.cancels(phase("downloading", 0.6)) < 2
    wait_for(lambda: not service.threads)  # nothing goes on loading unseen
    assert service.server.count("delete") == 0, "a completed task is paid for"
    wait_for(lambda: service.videos == [])
    assert service.make().task_id == service.task


@pytest.mark.parametrize("kind", ["upload", "submit", "download"])
def test_cancel_while_an_answer_drips(service, kind):
    drips = Answer(content=b" " * 1000, headers={"Content-Type": "video/mp4"}, block=1, pause=0.2)
    service.server.script[kind].append(lambda usual: drips)
    word = {"upload": "uploading", "submit": "submitting", "download": "downloading"}[kind]
    assert service.cancels(phase(word, 0.5), image=PICTURE, limits=quick(answer=4.0)) < 2
    wait_for(lambda: not service.threads, 10)


def test_cancel_while_downloading_from_a_silent_server(service):
    service.server.script["download"].append(lambda usual: Answer(content=usual.content, wait=SLOW))
    assert service.cancels(phase("downloading", 0.3)) < 2


@pytest.mark.parametrize("word", ["reading", "reading the video, 5"], ids=["before", "within"])
def test_cancel_while_reading(service, monkeypatch, word):
    remove, open_ones = Path.unlink, []

    def removed(path, *args, **options):  # Windows does not remove open files
        open_ones.extend(name for name in open_files() if path.name in name)
        remove(path, *args, **options)

    monkeypatch.setattr(Path, "unlink", removed)
    assert service.cancels(phase(word)) < 2
    assert service.videos == []
    assert open_ones == []


def open_files() -> list[str]:
    """Where the system tells them; else none."""
    numbers = Path("/proc/self/fd")
    return [os.path.realpath(number) for number in numbers.iterdir()] if numbers.exists() else []


def test_a_task_that_was_completed_since_the_last_poll_is_kept(service):
    """Nobody has told the client yet; the video is paid for all the same."""
    assert service.cancels(phase("at work")) < 2
    wait_for(lambda: not service.threads)
    assert service.server.count("delete") == 0
    assert any("completed before the cancel" in line for line in service.log)
    assert service.make().task_id == service.task


def test_a_log_that_is_gone(service):
    """As after `| tee log`, which Ctrl-C ends too: the task is given up, and found again."""

    class Gone(list):
        def append(self, sentence: str) -> None:
            raise BrokenPipeError(32, "Broken pipe")

    service.log = Gone()
    service.server.statuses = ("processing",) * 1000
    assert service.cancels(phase("at work")) < 2
    wait_for(lambda: service.server.count("delete") == 1)
    assert service.records[0]["task_id"] == service.task


def test_an_error_of_the_caller_s_while_submitting(service):
    """Of whatever kind: the same request waits until it is known what became of it."""
    service.server.script["submit"].append(lambda usual: Answer(content=usual.content, wait=1.0))
    during = phase("submitting", 0.2)

    def seen(at) -> None:
        if during(at):
            raise MagiError("the caller's own")

    service.fails("the caller's own", seen=seen)
    assert service.make().task_id == service.task


def test_a_service_that_does_not_answer_to_a_cancel(service):
    service.server.statuses = ("processing",) * 1000
    service.server.script["delete"].append(lambda usual: Answer(wait=SLOW))
    assert service.cancels(phase("at work")) < 2


def test_an_answer_to_a_cancel_that_only_drips(service):
    """The same request does not wait for its end."""
    service.server.statuses = ("processing",) * 1000
    service.server.script["delete"].append(lambda usual: Answer(content=b" " * (1 << 20), pause=0.2))
    limits = quick(answer=0.5)
    assert service.cancels(phase("at work"), limits=limits) < 2
    began = time.monotonic()
    service.most_submits = 2
    service.server.statuses = ()
    service.make(limits=limits)
    assert time.monotonic() - began < 5


def test_a_cancelled_request_is_made_anew(service):
    service.server.statuses = ("processing",) * 1000
    service.cancels(phase("at work"))
    wait_for(lambda: service.server.count("delete") == 1)
    service.server.statuses = ()
    service.most_submits = 2
    assert service.make().task_id == list(service.server.tasks)[1]


def test_a_cancel_that_came_too_late_is_not_paid_for_twice(service):
    service.server.statuses = ("processing",) * 1000
    service.server.script["delete"].append(Answer(500, b""))
    service.cancels(phase("at work"))
    wait_for(lambda: not service.threads)
    service.server.tasks[service.task].statuses.clear()
    assert service.make().task_id == service.task
    assert service.submits == 1
    assert not service.records[0]["cancelled"], "it is wanted again"


def test_a_cancelled_task_that_cannot_be_asked_about(service):
    service.server.statuses = ("processing",) * 1000
    service.cancels(phase("at work"))
    wait_for(lambda: not service.threads)
    service.server.script["poll"].extend([Answer(500, b"")] * 4)
    service.fails("could not be asked about task")
    assert service.submits == 1


@pytest.mark.parametrize("doing", ["submitting", "at work"])
def test_an_end_that_is_no_cancel_leaves_the_task(service, doing):
    """ComfyUI ends the graph because another node failed."""
    service.server.statuses = ("processing",) * 1000
    service.server.script["submit"].append(lambda usual: Answer(content=usual.content, wait=0.5))
    ends = phase(doing, 0.2)

    def seen(at) -> None:
        if ends(at):
            raise RuntimeError("somebody else's")

    with pytest.raises(RuntimeError):
        service.make(seen=seen)
    wait_for(lambda: not service.threads)
    assert service.server.count("delete") == 0
    service.server.tasks[service.task].statuses.clear()
    assert service.make().task_id == service.task


def test_nothing_is_left_behind(service):
    service.make()
    wait_for(lambda: not service.threads)
    assert len(service.videos) == 1
    with pytest.raises(MagiError):
        service.make(prompt=" ")

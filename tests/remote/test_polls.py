"""What the service can say of a task: in all of it the task is not lost."""

import itertools
import time

import pytest

from magi.remote.errors import EndedError
from magi.remote.fake_server import Answer, result
from tests.support.remote_service import CUT_JSON, DROPPED, KEY, PAGE, PICTURE, SOON_SILENT, poll_answer, quick

PASSING = {
    "500": Answer(500, result(None, 500, "oops")),
    "503": Answer(503, b""),
    "429": Answer(429, b"", {"Retry-After": "0"}),
    "dropped": DROPPED,
    "no answer in time": Answer(wait=1.5),
    "HTML": PAGE,
    "cut JSON": CUT_JSON,
    "null": Answer(content=result(None)),
    "another code": Answer(content=result(None, 500, "database")),
    "404 for a moment": Answer(404, result(None, 404, "not yet")),
}


@pytest.mark.parametrize("answer", PASSING.values(), ids=PASSING)
def test_passing_troubles_are_waited_out(service, answer):
    service.server.script["poll"].extend([answer, answer])
    assert service.make(timeouts=SOON_SILENT).facts.frames == 96


@pytest.mark.parametrize("answer", PASSING.values(), ids=PASSING)
def test_lasting_troubles_end_with_the_task_kept(service, answer):
    service.server.script["poll"].extend([answer] * 4)
    text = service.fails("Task|task", timeouts=SOON_SILENT)
    assert service.task in text
    service.server.script["poll"].clear()
    assert service.make().task_id == service.task
    assert service.submits == 1


def test_an_answer_that_only_drips(service):
    service.server.script["poll"].append(lambda usual: Answer(content=b" " * (1 << 20), pause=0.05))
    began = time.monotonic()
    assert service.make(limits=quick(answer=0.5)).facts.frames == 96
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("kind", ["upload", "poll", "download"])
def test_a_server_that_asks_to_wait_is_obeyed(service, kind):
    service.server.script[kind].append(Answer(429, b"", {"Retry-After": "1"}))
    service.make(image=PICTURE)
    path = {"upload": "/upload/", "poll": "/result", "download": "/outputs/"}[kind]
    refused, again = [request.at for request in service.server.requests if path in request.target][:2]
    assert again - refused > 0.9


@pytest.mark.parametrize(("status", "code"), [(401, 401), (403, 403), (200, 401)])
def test_a_key_that_is_refused_later(service, status, code):
    service.server.script["poll"].append(Answer(status, result(None, code, f"bad key {KEY}")))
    text = service.fails("API key.*is not lost")
    assert "***" in text, "what a server repeats of the key is not shown"
    assert service.make().task_id == service.task


CODES = {
    1200: "moderation",
    1400: "settings",
    1401: "settings",
    1402: "picture",
    1403: "failed to make",
    1405: "failed to make",
    5000: "trouble",
    5003: "trouble",
    5004: "too long",
    None: "failed to make",
    9999: "failed to make",
}


@pytest.mark.parametrize("code", CODES, ids=str)
def test_a_failed_task(service, code):
    service.server.script["poll"].append(poll_answer("failed", code=code, error="worker said no"))
    text = service.fails(CODES[code], EndedError)
    assert "worker said no" in text
    assert service.task in text
    assert service.records == [], "the same request may be made anew"


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ("cancelled", "was cancelled or deleted at the service"),
        ("canceled", "was cancelled or deleted at the service"),
        ("deleted", "was cancelled or deleted at the service"),
        ("timeout", "took too long.*refunded"),
        ("error", "failed to make the video.*refunded"),
        ("Failed", "failed to make the video.*refunded"),
    ],
)
def test_other_ends(service, status, reason):
    service.server.script["poll"].append(poll_answer(status))
    assert status.lower() in service.fails(reason, EndedError)
    assert service.records == []


def test_a_code_of_0_is_no_trouble(service):
    service.server.script["poll"].extend([lambda usual: Answer(content=usual.content | {"code": 0})] * 20)
    assert service.make().facts.frames == 96


@pytest.mark.parametrize(
    "answer", [poll_answer("warming_up"), Answer(content=result({"id": "x"})), poll_answer(None), poll_answer(7)]
)
def test_an_unknown_status_is_waited_out(service, answer):
    service.server.script["poll"].extend([answer] * 5)
    assert service.make().facts.frames == 96


@pytest.mark.parametrize("outputs", [[], None, [None], [5], {}, "", ["not an address"], ["http://example.org/v.mp4"]])
def test_completed_without_a_video_that_can_be_fetched(service, outputs):
    service.server.script["poll"].extend([poll_answer("completed", outputs=outputs)] * 8)
    service.fails("completed.*gives no video" if outputs in ([], None, {}) else "completed.*nothing may be fetched")
    assert service.records[0]["task_id"] == service.task, "it may still be written down"


def test_a_video_that_is_written_down_late(service):
    service.server.script["poll"].extend([poll_answer("completed")] * 2)
    assert service.make().facts.frames == 96


@pytest.mark.parametrize(("status", "flags"), [("completed", [True]), ("completed", True), ("failed", [False, True])])
def test_flagged_and_withheld(service, status, flags):
    service.server.script["poll"].append(poll_answer(status, has_nsfw_contents=flags))
    service.fails("safety checker withheld", EndedError)


def test_flagged_and_delivered(service):
    service.server.script["submit"].append(lambda usual: usual)
    made = service.make(seen=lambda _: [setattr(task, "flagged", True) for task in service.server.tasks.values()])
    assert any("flagged" in note for note in made.notes)


def test_time_in_the_queue_does_not_count(service):
    service.server.statuses = ("created", "queued", "pending") * 15 + ("processing",)
    limits = quick(running=0.5)
    began = time.monotonic()
    assert service.make(limits=limits).facts.frames == 96
    assert time.monotonic() - began > limits.running


@pytest.mark.parametrize(("status", "word"), [("processing", "run"), ("created", "queue"), ("dancing", "run")])
def test_a_task_that_never_ends(service, status, word):
    service.server.statuses = (status,) * 10_000
    text = service.fails(f"{word}.* is not lost", limits=quick(running=0.3, queued=0.3))
    assert service.task in text
    service.server.tasks[service.task].statuses.clear()
    assert service.make().task_id == service.task


def test_polls_become_rarer(service):
    service.server.statuses = ("created",) * 8 + ("processing",) * 12
    service.make(limits=quick(poll_first=0.1, poll_most=0.4, running=20))
    asked = [request.at for request in service.server.requests if request.target.endswith("/result")]
    gaps = [after - before for before, after in itertools.pairwise(asked)]
    assert gaps[0] < 0.3 < gaps[6] < 0.7
    assert gaps[8] < 0.3, "quick again when something has happened"
    assert 0.3 < gaps[15] < 0.7

"""What the service can answer to a submission: in all of it nothing is paid for twice."""

import re
import time

import pytest

from magi.remote.errors import RefusedError, UnclearError
from magi.remote.fake_server import Answer, FakeServer, result
from tests.support.remote_service import CUT_JSON, DROPPED, PAGE, PAGE_502, SOON_SILENT, stranger


@pytest.mark.parametrize(
    ("status", "said", "remedy"),
    [
        (401, "invalid authentication", "does not accept the API key.*accesskey"),
        (402, "insufficient credits", "credit"),
        (403, "not allowed", "not allowed"),
        (404, "no such model", "API version"),
        (400, "num_frames must be at most 100", "num_frames must be at most 100"),
        (413, "too large", "too large"),
        (422, "unknown field", "unknown field"),
    ],
)
def test_a_refused_request(service, status, said, remedy):
    service.server.script["submit"].append(Answer(status, result(None, status, said)))
    text = service.fails(remedy, RefusedError)
    assert str(status) in text
    assert said in text, "the server's own words"
    assert service.records == []
    assert service.server.tasks == {}
    service.most_submits = 2
    service.make()  # nothing is in the way of another try


@pytest.mark.parametrize(
    "body",
    [
        {"detail": "told so"},
        {"detail": {"msg": "told so"}},
        {"error": {"code": 5, "message": "told so"}},
        {"error": "told so", "message": "an error"},
        result({"error": "told so"}, 400, "an error"),
    ],
)
def test_the_services_own_words_wherever_they_stand(service, body):
    service.server.script["submit"].append(Answer(400, body))
    service.fails(r"HTTP 400: told so\)", RefusedError)


def test_too_many_requests_on_submit(service):
    service.server.script["submit"].append(Answer(429, result(None, 429, "slow down"), {"Retry-After": "17"}))
    assert "in 17 s" in service.fails("no more requests", RefusedError)


UNCLEAR = {
    "500": (Answer(500, result(None, 500, "oops")), "oops"),
    "503": (Answer(503, b"busy"), "503"),
    "a gateway's page": (PAGE_502, "502"),
    "accepted, then dropped": (DROPPED, "closed|reset|abort"),
    "dropped within the answer": (
        lambda usual: Answer(content=usual.content, keep=20),
        "bytes|incomplete|ended|broken|without the id",  # older versions of requests see JSON that is cut
    ),
    "no answer in time": (lambda usual: Answer(content=usual.content, wait=2.0), "no answer within 1 s"),
    "another code": (Answer(content=result(None, 500, "database")), "database"),
    "no id": (Answer(content=result({"status": "created"})), "without the id"),
    "an id that is none": (Answer(content=result({"id": "../../etc"})), "without the id"),
    "a number as id": (Answer(content=result({"id": 5})), "without the id"),
    "null": (Answer(content=result(None)), "without the id"),
    "HTML": (PAGE, "without the id"),
    "cut JSON": (CUT_JSON, "without the id"),
    "a list": (Answer(content=[1]), "without the id"),
    "a redirect to see": (Answer(303, b"", {"Location": "/elsewhere"}), "303"),
    "408": (Answer(408, b""), "408"),
    "408 within an answer": (Answer(content=result(None, 408, "took too long")), "took too long"),
    "a gateway that lost patience": (Answer(499, b""), "499"),
}


@pytest.mark.parametrize("answer", UNCLEAR.values(), ids=UNCLEAR)
def test_an_unclear_submission_is_never_repeated(service, answer):
    scripted, reason = answer
    service.server.script["submit"].append(scripted)
    text = service.fails("a task may have been made", UnclearError, timeouts=SOON_SILENT)
    assert "wavespeed.ai/predictions" in text
    assert "resume_id" in text
    assert re.search(reason, text, re.IGNORECASE), text
    # Queued again, as a user would: it still does not know, and does not guess.
    service.fails("a task may have been made", UnclearError)
    assert service.submits == 1


def test_the_task_of_an_unclear_submission_is_fetched_by_its_id(service):
    service.server.script["submit"].append(DROPPED)
    service.fails("a task may have been made", UnclearError)
    assert service.make(resume_id=service.task).facts.frames == 96
    assert service.make().task_id == service.task, "it belongs to this request now"
    assert service.submits == 1


def test_a_wrong_id_does_not_hide_an_unclear_submission(service):
    service.server.script["submit"].append(DROPPED)
    service.fails("a task may have been made", UnclearError)
    service.fails("does not know task", resume_id="mistyped-id")
    service.fails("a task may have been made", UnclearError)
    assert service.make(resume_id=service.task).facts.frames == 96


def test_an_unclear_submission_is_sent_again_if_the_user_says_so(service):
    service.server.script["submit"].append(DROPPED)
    service.fails("a task may have been made", UnclearError)
    code = service.fails("a task may have been made", UnclearError).split("put ")[-1].split()[0]
    assert re.fullmatch(r"new-\d{5}", code)
    service.fails("a task may have been made", UnclearError, resume_id="new-00000" if code != "new-00000" else "new-1")
    assert service.submits == 1
    service.most_submits = 2
    service.server.script["submit"].append(DROPPED)
    service.fails("a task may have been made", UnclearError, resume_id=code)
    assert service.submits == 2
    service.fails("a task may have been made", UnclearError, resume_id=code)
    assert service.submits == 2, "the code is for one try: left in the node it does not pay again"


def test_the_word_for_another_try_does_not_leave_a_task_alone(service):
    service.server.script["poll"].extend([Answer(500, b"")] * 4)
    service.fails("is not lost")
    assert service.make(resume_id="new-12345").task_id == service.task
    (record,) = service.records
    assert service.make(resume_id=f"new-{record['code']}").task_id == service.task


def test_an_id_is_followed_whatever_else_the_answer_says(service):
    service.server.script["submit"].append(lambda usual: Answer(500, usual.content | {"code": 500}))
    assert service.make().task_id == service.task


def test_a_refusal_within_an_answer_of_200(service):
    service.server.script["submit"].append(Answer(content=result({"code": 1400}, 400, "bad fps")))
    text = service.fails("does not accept the settings", RefusedError)
    assert "bad fps" in text
    assert service.records == []


def test_nobody_listens(service):
    with FakeServer() as other:
        gone = other.url
    service.server.url, url = gone, service.server.url
    began = time.monotonic()
    service.fails("cannot be reached.*network.*Nothing was sent")
    assert time.monotonic() - began < 5
    assert service.records == [], "nothing stands in the way of another try"
    service.server.url = url


@pytest.mark.parametrize("target", ["https://[", "http://a b:port", "/elsewhere"])
def test_a_redirect_of_a_submission_is_a_refusal_wherever_to(service, target):
    service.server.script["submit"].append(Answer(307, b"", {"Location": target}))
    service.fails("HTTP 307", RefusedError)
    assert service.records == []


def test_redirects_of_a_submission_are_not_followed(service):
    with stranger() as (url, asked):
        service.server.script["submit"].append(Answer(308, b"", {"Location": f"{url}/api/v2/wavespeed-ai/magi-1-24b"}))
        service.fails("HTTP 308", RefusedError)
        assert asked == []

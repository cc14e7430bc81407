"""What the service can do to a client, each over real HTTP: in all of it nothing is paid for twice, and no video is lost."""

import itertools
import re
import threading
import time
from dataclasses import replace

import av
import pytest
import torch

from magi.errors import MagiError
from magi.remote.errors import EndedError, RefusedError, UnclearError
from magi.remote.fake_server import Answer, FakeServer, result
from magi.remote.fake_video import make_video
from tests.remote_service import KEY, QUICK, Service, stranger, wait_for

HTML = Answer(200, b"<html>Bad gateway</html>", {"Content-Type": "text/html"})
HTML_502 = Answer(502, b"<html>Bad gateway</html>", {"Content-Type": "text/html"})
CUT_JSON = Answer(200, b'{"code": 200, "data": {"id": "abc')
DROPPED = Answer(keep=0)
SIZE = (832, 480)


def Quick(**changes):
    """The tests' limits, but for some."""
    return replace(QUICK, **changes)


@pytest.fixture(scope="module")
def videos() -> dict:
    """Videos that were made already, for all servers: a second each."""
    return {}


@pytest.fixture
def service(tmp_path, videos):
    server = FakeServer(key=KEY, statuses=("processing",))
    server.videos = videos
    with server:
        found = Service(server, tmp_path)
        yield found
        found.check()


def frames_of(path) -> int:
    with av.open(str(path)) as container:
        return len(list(container.decode(video=0)))


def data(status: str, **more) -> Answer:
    """A look at a task, as it is answered."""
    return Answer(content=result({"id": "x", "status": status, "outputs": [], **more}))


# -- it works ----------------------------------------------------------------------------------------------------------


def test_created_processing_completed(service):
    service.server.statuses = ("created", "processing", "processing")
    made = service.make()
    assert (made.task_id, made.notes) == (service.task, ())
    assert (made.facts.frames, made.facts.fps, made.facts.width, made.facts.height) == (96, 24, *SIZE)
    assert frames_of(made.path) == 96
    assert made.url.startswith(service.server.url)
    texts = " | ".join(at.text for at in service.progress)
    for phase in ("submitting", "waiting in the service's queue", "the service is at work (processing)", "downloading"):
        assert phase in texts
    assert service.task in texts
    parts = [at.part for at in service.progress]
    assert parts == sorted(parts)
    assert parts[0] >= 0
    assert parts[-1] == 1
    assert any(service.task in line for line in service.said), "in the log as soon as it is known"


def test_what_is_submitted(service):
    service.make(prompt="A dog", num_frames=120, fps=30, aspect_ratio="9:16", seed=3, safety_checker=False)
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
    assert sent.startswith(b"\x89PNG")
    assert "uploading the picture" in " ".join(at.text for at in service.progress)


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


# -- submitting --------------------------------------------------------------------------------------------------------


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


def test_too_many_requests_on_submit(service):
    service.server.script["submit"].append(Answer(429, result(None, 429, "slow down"), {"Retry-After": "17"}))
    assert "in 17 s" in service.fails("no more requests", RefusedError)


UNCLEAR = {
    "500": (Answer(500, result(None, 500, "oops")), "oops"),
    "503": (Answer(503, b"busy"), "503"),
    "a gateway's page": (HTML_502, "502"),
    "accepted, then dropped": (DROPPED, "closed|reset|abort"),
    "dropped within the answer": (
        lambda usual: Answer(content=usual.content, keep=20),
        "bytes|incomplete|ended|broken",
    ),
    "no answer in time": (lambda usual: Answer(content=usual.content, wait=2.0), "no answer within 1 s"),
    "another code": (Answer(content=result(None, 500, "database")), "database"),
    "no id": (Answer(content=result({"status": "created"})), "without the id"),
    "an id that is none": (Answer(content=result({"id": "../../etc"})), "without the id"),
    "a number as id": (Answer(content=result({"id": 5})), "without the id"),
    "null": (Answer(content=result(None)), "without the id"),
    "HTML": (HTML, "without the id"),
    "cut JSON": (CUT_JSON, "without the id"),
    "a list": (Answer(content=[1]), "without the id"),
    "a redirect to see": (Answer(303, b"", {"Location": "/elsewhere"}), "303"),
    "408": (Answer(408, b""), "408"),
}


@pytest.mark.parametrize("answer", UNCLEAR.values(), ids=UNCLEAR)
def test_an_unclear_submission_is_never_repeated(service, answer):
    scripted, reason = answer
    service.server.script["submit"].append(scripted)
    text = service.fails("a task may have been made", UnclearError)
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


def test_an_unclear_submission_is_sent_again_if_the_user_says_so(service):
    service.server.script["submit"].append(DROPPED)
    service.fails("a task may have been made", UnclearError)
    service.most_submits = 2
    made = service.make(resume_id="new")
    assert made.task_id == list(service.server.tasks)[1]


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


def test_redirects_of_a_submission_are_not_followed(service):
    with stranger() as (url, asked):
        service.server.script["submit"].append(Answer(308, b"", {"Location": f"{url}/api/v2/wavespeed-ai/magi-1-24b"}))
        service.fails("HTTP 308", RefusedError)
        assert asked == []


# -- asking how it stands ----------------------------------------------------------------------------------------------

PASSING = {
    "500": Answer(500, result(None, 500, "oops")),
    "503": Answer(503, b""),
    "429": Answer(429, b"", {"Retry-After": "0"}),
    "dropped": DROPPED,
    "no answer in time": Answer(wait=1.5),
    "HTML": HTML,
    "cut JSON": CUT_JSON,
    "null": Answer(content=result(None)),
    "another code": Answer(content=result(None, 500, "database")),
    "404 for a moment": Answer(404, result(None, 404, "not yet")),
}


@pytest.mark.parametrize("answer", PASSING.values(), ids=PASSING)
def test_passing_troubles_are_waited_out(service, answer):
    service.server.script["poll"].extend([answer, answer])
    assert service.make().facts.frames == 96


@pytest.mark.parametrize("answer", PASSING.values(), ids=PASSING)
def test_lasting_troubles_end_with_the_task_kept(service, answer):
    service.server.script["poll"].extend([answer] * 4)
    text = service.fails("Task|task")
    assert service.task in text
    service.server.script["poll"].clear()
    assert service.make().task_id == service.task
    assert service.submits == 1


def test_a_server_that_asks_to_wait_is_obeyed(service):
    service.server.script["poll"].append(Answer(429, b"", {"Retry-After": "1"}))
    began = time.monotonic()
    service.make()
    assert time.monotonic() - began > 1


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_refused_later(service, status):
    service.server.script["poll"].append(Answer(status, result(None, status, f"bad key {KEY}")))
    text = service.fails("is not lost")
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
    service.server.script["poll"].append(data("failed", code=code, error="worker said no"))
    text = service.fails(CODES[code], EndedError)
    assert "worker said no" in text
    assert service.task in text
    assert service.records == [], "the same request may be made anew"


@pytest.mark.parametrize("status", ["cancelled", "canceled", "timeout", "deleted", "Failed"])
def test_other_ends(service, status):
    service.server.script["poll"].append(data(status))
    assert status.lower() in service.fails("Queue again", EndedError)
    assert service.records == []


@pytest.mark.parametrize("answer", [data("warming_up"), Answer(content=result({"id": "x"})), data(None), data(7)])
def test_an_unknown_status_is_waited_out(service, answer):
    service.server.script["poll"].extend([answer] * 5)
    assert service.make().facts.frames == 96


@pytest.mark.parametrize("outputs", [[], None, [None], [5], {}, "", ["not an address"], ["http://example.org/v.mp4"]])
def test_completed_without_a_video_that_can_be_fetched(service, outputs):
    service.server.script["poll"].extend([data("completed", outputs=outputs)] * 8)
    service.fails("completed.*gives")
    assert service.records[0]["task_id"] == service.task, "it may still be written down"


def test_a_video_that_is_written_down_late(service):
    service.server.script["poll"].extend([data("completed")] * 2)
    assert service.make().facts.frames == 96


def test_flagged_and_withheld(service):
    service.server.script["poll"].append(data("completed", has_nsfw_contents=[True]))
    service.fails("safety checker withheld", EndedError)


def test_flagged_and_delivered(service):
    service.server.script["submit"].append(lambda usual: usual)
    made = service.make(seen=lambda _: [setattr(task, "flagged", True) for task in service.server.tasks.values()])
    assert any("flagged" in note for note in made.notes)


def test_time_in_the_queue_does_not_count(service):
    service.server.statuses = ("created",) * 40 + ("processing",)
    limits = Quick(running=0.5)
    began = time.monotonic()
    assert service.make(limits=limits).facts.frames == 96
    assert time.monotonic() - began > limits.running


@pytest.mark.parametrize(("status", "word"), [("processing", "run"), ("created", "queue"), ("dancing", "run")])
def test_a_task_that_never_ends(service, status, word):
    service.server.statuses = (status,) * 10_000
    text = service.fails(f"{word}.* is not lost", limits=Quick(running=0.3, queued=0.3))
    assert service.task in text
    service.server.tasks[service.task].statuses.clear()
    assert service.make().task_id == service.task


def test_looks_become_rarer(service):
    service.server.statuses = ("created",) * 8 + ("processing",) * 12
    service.make(limits=Quick(poll_first=0.1, poll_most=0.4, running=20))
    asked = [request.at for request in service.server.requests if request.target.endswith("/result")]
    gaps = [after - before for before, after in itertools.pairwise(asked)]
    assert gaps[0] < 0.3 < gaps[6] < 0.7
    assert gaps[8] < 0.3, "quick again when something has happened"
    assert 0.3 < gaps[15] < 0.7


# -- the video ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [403, 404, 410])
def test_an_address_that_has_run_out_is_asked_for_anew(service, status):
    service.server.script["download"].append(Answer(status, b"expired", {"Content-Type": "text/plain"}))
    before = service.server.count("poll")
    assert service.make().facts.frames == 96
    assert service.server.count("poll") == before + 3


@pytest.mark.parametrize("status", [403, 404])
def test_an_address_that_is_gone_for_good(service, status):
    service.server.script["download"].extend([Answer(status, b"gone")] * 2)
    text = service.fails("could not be downloaded")
    assert service.task in text
    assert "sig=" not in text, "a signature opens the video"
    assert service.make().task_id == service.task


def test_a_page_in_the_place_of_a_video(service):
    service.server.script["download"].append(HTML)
    assert service.make().facts.frames == 96
    service.server.script["download"].extend([HTML, HTML])
    service.fails("text/html instead of a video")


@pytest.mark.parametrize(
    "answer",
    [
        lambda usual: Answer(content=usual.content, headers=usual.headers, keep=5000),
        DROPPED,
        Answer(503, b"busy"),
        Answer(429, b"", {"Retry-After": "0"}),
    ],
    ids=["cut short", "dropped", "503", "429"],
)
def test_a_download_is_tried_again(service, answer):
    service.server.script["download"].extend([answer, answer])
    assert service.make().facts.frames == 96
    assert len(service.videos) == 1


def test_a_download_that_never_works(service):
    service.server.script["download"].extend([lambda usual: Answer(content=usual.content, keep=5000)] * 4)
    text = service.fails("could not be downloaded")
    assert service.task in text
    assert service.videos == []


@pytest.mark.parametrize("told", [True, False])
def test_far_too_much(service, told):
    def endless(usual):
        kind = {"Content-Type": "video/mp4"}
        return Answer(content=b"\0" * 300_000, headers=kind if told else kind | {"Content-Length": ""}, pause=0.001)

    service.server.script["download"].append(endless)
    service.fails("larger than 100,000 bytes", limits=Quick(video=100_000))
    assert service.videos == []


@pytest.mark.parametrize("content", [b"not a video at all" * 50, b""])
def test_what_is_no_video(service, content):
    service.server.script["download"].append(Answer(content=content, headers={"Content-Type": "video/mp4"}))
    text = service.fails("no whole video")
    assert service.task in text
    assert service.videos == []


def test_a_damaged_video(service):
    def damaged(usual):
        return Answer(content=usual.content[: len(usual.content) // 2], headers={"Content-Type": "video/mp4"})

    service.server.script["download"].append(damaged)
    service.fails("no whole video")
    assert service.make().facts.frames == 96


def test_another_video_than_was_asked_for(service):
    small = make_video(30, 12, "480p", "1:1")
    service.server.script["download"].append(Answer(content=small, headers={"Content-Type": "video/mp4"}))
    made = service.make()
    told = " ".join(made.notes)
    assert "30 frames instead of 96" in told
    assert "12 frames a second instead of 24" in told
    assert "480x480 instead of 16:9" in told
    assert all(note.rstrip(".") in " ".join(service.said) for note in made.notes)


def test_a_newer_api_that_ignores_settings(service):
    notes = service.make(version="v3", num_frames=120, fps=30).notes
    assert any("instead of 120" in note for note in notes)
    assert any("instead of 30" in note for note in notes)


def test_a_newer_api_that_rejects_settings(service):
    service.server.v3 = "rejects"
    assert "v2" in service.fails("unknown field", RefusedError, version="v3")


def test_a_signed_address_is_asked_for_byte_by_byte(service):
    service.make()
    (asked,) = [r.target for r in service.server.requests if r.target.startswith("/outputs/")]
    assert asked == f"/outputs/{service.task}.mp4?sig=a%2fb~c%2d%c3%a9&e=1"


def test_the_key_does_not_follow_a_redirect_of_the_video(service):
    whole = make_video(96, 24, "480p", "16:9")
    with stranger(Answer(content=whole, headers={"Content-Type": "video/mp4"})) as (url, asked):
        target = f"{url}/outputs/a%2fb.mp4?x=%c3"
        service.server.script["download"].append(Answer(302, b"", {"Location": target}))
        assert service.make().facts.frames == 96
        assert [r.target for r in asked] == ["/outputs/a%2fb.mp4?x=%c3"]


def test_the_key_does_not_follow_a_redirect_of_a_look(service):
    with stranger() as (url, asked):
        answer = data("completed", outputs=[f"{service.server.url}/outputs/x.mp4"])
        service.server.script["poll"].append(Answer(302, b"", {"Location": f"{url}/api/v2/predictions/x/result"}))
        service.make()
        assert answer
        assert len(asked) == 1


def test_the_key_is_not_sent_where_a_task_says_it_can_be_asked(service):
    with stranger() as (url, asked):
        elsewhere = {"get": f"{url}/api/v2/predictions/x/result"}
        service.server.script["submit"].append(
            lambda usual: Answer(content=result(usual.content["data"] | {"urls": elsewhere}))
        )
        service.make()
        assert asked == []


def test_the_key_is_not_sent_with_a_download(service):
    with stranger(Answer(content=make_video(96, 24, "480p", "16:9"), headers={"Content-Type": "video/mp4"})) as (
        url,
        asked,
    ):
        service.server.script["poll"].append(data("completed", outputs=[f"{url}/outputs/v.mp4"]))
        service.make()
        assert len(asked) == 1


@pytest.mark.parametrize("target", ["http://example.org/v.mp4", "file:///etc/passwd", "ftp://example.org/v"])
def test_redirects_to_where_nothing_may_be_fetched(service, target):
    service.server.script["download"].extend([Answer(302, b"", {"Location": target})] * 4)
    service.fails("nothing may be fetched")


def test_redirects_in_circles(service):
    def back(usual):
        return Answer(302, b"", {"Location": "/outputs/again.mp4"})

    service.server.script["download"].extend([back] * 40)
    service.fails("circles")


# -- uploading ---------------------------------------------------------------------------------------------------------

PICTURE = torch.full((64, 64, 3), 90, dtype=torch.uint8)


def test_an_upload_that_is_too_large(service):
    service.server.script["upload"].append(Answer(413, result(None, 413, "file too large")))
    service.fails("too large", RefusedError, image=PICTURE)
    assert service.submits == 0


def test_an_upload_is_tried_again(service):
    service.server.script["upload"].extend([Answer(500, b""), DROPPED, Answer(content=result({}))])
    service.make(image=PICTURE)
    assert service.server.count("upload") == 4


def test_an_upload_that_never_works(service):
    service.server.script["upload"].extend([Answer(503, b"")] * 9)
    service.fails("Nothing was submitted", image=PICTURE)
    assert service.submits == 0
    assert service.records == []


# -- the same request again --------------------------------------------------------------------------------------------


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


# -- cancel ------------------------------------------------------------------------------------------------------------

SLOW = 8.0  # seconds that a server takes where a cancel is to find the client waiting
PATIENT = {"timeouts": (1.0, 20.0)}


def phase(word: str, seconds: float = 0.0):
    """A condition: the phase is on, for so long."""
    began: list[float] = []

    def holds(at) -> bool:
        if word in at.text:
            began.append(time.monotonic())
        return bool(began) and began[-1] - began[0] >= seconds

    return holds


def test_cancel_while_uploading(service):
    service.server.script["upload"].append(lambda usual: Answer(content=usual.content, wait=SLOW))
    assert service.cancels(phase("uploading", 0.3), image=PICTURE, **PATIENT) < 2
    assert service.submits == 0


def test_cancel_while_submitting(service):
    """The answer comes after the user has gone: the task is noted, and given up."""
    service.server.script["submit"].append(lambda usual: Answer(content=usual.content, wait=2.0))
    assert service.cancels(phase("submitting", 0.3), **PATIENT) < 2
    wait_for(lambda: service.server.count("delete") == 1)
    wait_for(lambda: service.records and service.records[0]["cancelled"])
    assert service.records[0]["task_id"] == service.task
    wait_for(lambda: not service.threads)


def test_cancel_while_submitting_what_never_is_answered(service):
    service.server.script["submit"].append(lambda usual: Answer(keep=0, wait=2.0))
    assert service.cancels(phase("submitting", 0.3), **PATIENT) < 2
    wait_for(lambda: not service.threads)
    service.fails("a task may have been made", UnclearError)


def test_cancel_before_anybody_was_reached(service):
    """A connection that is still being made: nothing is sent after the user has gone."""
    with FakeServer() as other:
        gone = other.url
    service.server.url, url = gone, service.server.url
    assert service.cancels(phase("submitting", 0.2), limits=Quick(retry_first=5.0, retry_most=5.0)) < 2
    service.server.url = url
    wait_for(lambda: not service.threads)
    assert service.records == []
    service.make()


@pytest.mark.parametrize("wait", [0.0, SLOW], ids=["between two looks", "in a look"])
def test_cancel_while_waiting(service, wait):
    service.server.statuses = ("processing",) * 1000
    if wait:
        service.server.script["poll"].extend([data("processing"), Answer(wait=wait)])
    assert service.cancels(phase("at work", 0.3), limits=Quick(poll_first=0.1, poll_most=5.0), **PATIENT) < 2
    wait_for(lambda: service.server.count("delete") == 1)
    time.sleep(0.1)
    assert service.server.count("delete") == 1
    assert service.records[0]["cancelled"]


def test_cancel_while_a_retry_waits(service):
    service.server.script["poll"].extend([Answer(429, b"", {"Retry-After": "60"})])
    assert service.cancels(phase("asking for task", 0.3)) < 2


def test_cancel_while_downloading_keeps_what_is_paid(service):
    def slow(usual):
        return Answer(content=usual.content, headers=usual.headers, pause=0.5)

    service.server.script["download"].append(slow)
    assert service.cancels(phase("downloading", 0.6), **PATIENT) < 2
    assert service.server.count("delete") == 0, "a completed task is paid for"
    wait_for(lambda: service.videos == [])
    assert service.make().task_id == service.task


def test_cancel_while_downloading_from_a_silent_server(service):
    service.server.script["download"].append(lambda usual: Answer(content=usual.content, wait=SLOW))
    assert service.cancels(phase("downloading", 0.3), **PATIENT) < 2


def test_cancel_while_reading(service):
    assert service.cancels(phase("reading")) < 2
    assert service.videos == []


def test_a_service_that_does_not_answer_to_a_cancel(service):
    service.server.statuses = ("processing",) * 1000
    service.server.script["delete"].append(lambda usual: Answer(wait=SLOW))
    assert service.cancels(phase("at work"), **PATIENT) < 2


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


def test_a_cancelled_task_that_cannot_be_asked_about(service):
    service.server.statuses = ("processing",) * 1000
    service.cancels(phase("at work"))
    wait_for(lambda: not service.threads)
    service.server.script["poll"].extend([Answer(500, b"")] * 4)
    service.fails("could not be asked about task")
    assert service.submits == 1


def test_an_end_that_is_no_cancel_leaves_the_task(service):
    """ComfyUI ends the graph because another node failed."""
    service.server.statuses = ("processing",) * 1000

    def seen(at) -> None:
        if "at work" in at.text:
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

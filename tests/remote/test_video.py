"""How a finished video can fail to arrive, and where the key does not go."""

import errno
import gzip
import io
import os
from pathlib import Path

import pytest

from magi.remote.address import BaseUrl
from magi.remote.download import Facts, check_folder
from magi.remote.errors import RefusedError
from magi.remote.fake_server import Answer, FakeServer, result
from magi.remote.fake_video import make_video
from magi.remote.request import RemoteRequest, encode_image
from tests.support.remote_service import DROPPED, PAGE, PICTURE, poll_answer, quick, stranger


@pytest.fixture
def anywhere(monkeypatch):
    """The strangers here are on this machine; taken for public, they are asked."""
    monkeypatch.setattr(BaseUrl, "may_fetch", lambda base, url: True)
    monkeypatch.setattr("magi.remote.exact.is_public", lambda address: True)


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_an_address_that_has_run_out_is_asked_for_anew(service, status):
    service.server.script["download"].append(Answer(status, b"expired", {"Content-Type": "text/plain"}))
    before = service.server.count("poll")
    assert service.make().facts.frames == 96
    assert service.server.count("poll") == before + 3


def test_the_address_that_is_given_anew_is_used(service):
    old = f"{service.server.url}/outputs/old.mp4?sig=1"
    service.server.script["poll"].append(poll_answer("completed", outputs=[old]))
    made = service.make()
    assert made.facts.frames == 96
    assert f"/outputs/{service.task}.mp4" in made.url


@pytest.mark.parametrize("status", [403, 404])
def test_an_address_that_is_gone_for_good(service, status):
    service.server.script["download"].extend([Answer(status, b"gone")] * 2)
    text = service.fails("could not be downloaded")
    assert service.task in text
    assert "sig=" not in text, "a signature opens the video"
    assert service.make().task_id == service.task


@pytest.mark.usefixtures("anywhere")
def test_an_address_where_nobody_listens(service):
    """What is said of it does not open the video."""
    with FakeServer() as other:
        gone = f"{other.url}/outputs/v.mp4?sig=secret"
    service.server.script["poll"].append(poll_answer("completed", outputs=[gone]))
    text = service.fails("could not be downloaded: .*refused")
    assert "secret" not in text


@pytest.mark.parametrize("host", ["a%zz", "a..b", "a" * 70, "[v1.x]"])
def test_an_address_that_cannot_be(service, host):
    """Libraries put all of it into what they say."""
    service.server.script["poll"].extend([poll_answer("completed", outputs=[f"https://{host}/v.mp4?sig=secret"])] * 9)
    assert "secret" not in service.fails("video")


@pytest.mark.parametrize("page", [PAGE, Answer(content=result(None, 403, "expired"))], ids=["HTML", "JSON"])
def test_a_page_in_the_place_of_a_video(service, page):
    service.server.script["download"].append(page)
    assert service.make().facts.frames == 96
    service.server.script["download"].extend([page, page])
    service.fails("(text/html|application/json) instead of a video")


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
    service.fails("larger than 100,000 bytes", limits=quick(video=100_000))
    assert service.videos == []


def test_far_too_much_is_not_even_begun(service):
    service.server.script["download"].append(Answer(headers={"Content-Type": "video/mp4", "Content-Length": "9" * 12}))
    service.fails("larger than")


PNG = encode_image(PICTURE)[0]


@pytest.mark.parametrize("content", [b"not a video at all" * 50, b"", PNG], ids=["text", "nothing", "a picture"])
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
    assert "12 frames per second instead of 24" in told
    assert "480x480 instead of 16:9" in told
    assert all(note.rstrip(".") in " ".join(service.log) for note in made.notes)


@pytest.mark.parametrize(
    ("size", "asked", "differs"),
    [
        ((1280, 720), ("720p", "16:9"), False),
        ((720, 1280), ("720p", "9:16"), False),
        ((832, 480), ("480p", "16:9"), False),
        ((720, 720), ("720p", "1:1"), False),
        ((960, 960), ("720p", "1:1"), False),  # as many pixels as 1280x720
        ((832, 480), ("720p", "16:9"), True),
        ((1280, 720), ("480p", "auto"), True),
    ],
)
def test_a_size_that_is_not_the_one_asked_for(size, asked, differs):
    found = Facts(96, 24.0, *size).differences(RemoteRequest("A cat", resolution=asked[0], aspect_ratio=asked[1]))
    assert found == ([f"The video is {size[0]}x{size[1]} instead of {asked[0]}."] if differs else [])


def test_a_newer_api_that_ignores_settings(service):
    notes = service.make(version="v3", num_frames=120, fps=30).notes
    assert any("instead of 120" in note for note in notes)
    assert any("instead of 30" in note for note in notes)


def test_a_newer_api_that_rejects_settings(service):
    service.server.v3 = "rejects"
    assert "v2" in service.fails("unknown field", RefusedError, version="v3")


def test_a_signed_address_is_asked_for_byte_by_byte(service):
    service.make()
    (asked,) = [r for r in service.server.requests if r.target.startswith("/outputs/")]
    assert asked.target == f"/outputs/{service.task}.mp4?sig=a%2fb~c%2d%c3%a9&e=1"
    assert asked.headers["accept-encoding"] == "identity", "so that its length is the file's"


def test_a_server_that_compresses_all_the_same(service):
    def compressed(usual):
        return Answer(content=gzip.compress(usual.content), headers=usual.headers | {"Content-Encoding": "gzip"})

    service.server.script["download"].extend([compressed] * 4)
    assert service.make().facts.frames == 96


@pytest.mark.usefixtures("anywhere")
def test_the_key_does_not_follow_a_redirect_of_the_video(service):
    whole = make_video(96, 24, "480p", "16:9")
    with stranger(Answer(content=whole, headers={"Content-Type": "video/mp4"})) as (url, asked):
        target = f"{url}/outputs/a%2fb.mp4?x=%c3"
        service.server.script["download"].append(Answer(302, b"", {"Location": target}))
        assert service.make().facts.frames == 96
        assert [r.target for r in asked] == ["/outputs/a%2fb.mp4?x=%c3"]


@pytest.mark.usefixtures("anywhere")
def test_the_key_does_not_follow_a_redirect_of_a_poll(service):
    with stranger() as (url, asked):
        answer = poll_answer("completed", outputs=[f"{service.server.url}/outputs/x.mp4"])
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


@pytest.mark.usefixtures("anywhere")
def test_the_key_is_not_sent_with_a_download(service):
    with stranger(Answer(content=make_video(96, 24, "480p", "16:9"), headers={"Content-Type": "video/mp4"})) as (
        url,
        asked,
    ):
        service.server.script["poll"].append(poll_answer("completed", outputs=[f"{url}/outputs/v.mp4"]))
        service.make()
        assert len(asked) == 1


@pytest.mark.parametrize(
    ("status", "target"),
    [
        (301, "http://example.org/v.mp4"),
        (302, "file:///etc/passwd"),
        (303, "ftp://example.org/v"),
        (307, "https://a@example.org/v"),
        (308, "data:,v"),
    ],
)
def test_redirects_to_where_nothing_may_be_fetched(service, status, target):
    service.server.script["download"].extend([Answer(status, b"", {"Location": target})] * 4)
    service.fails("nothing may be fetched")


def test_redirects_in_circles(service):
    def back(usual):
        return Answer(302, b"", {"Location": "/outputs/again.mp4"})

    service.server.script["download"].extend([back] * 40)
    service.fails("circles")


# -- disks -------------------------------------------------------------------------------------------------------------


def test_a_full_disk(service, monkeypatch):
    """The video is paid for: the message says that it is fetched when there is room."""

    class Full(io.FileIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path: Path, *args, **options):
        return Full(path, "x") if path.suffix == ".part" else usual(path, *args, **options)

    usual = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        service.fails("No space left.*Make room there.*resumed")
    assert service.videos == []
    assert service.make().task_id == service.task


def test_a_file_that_cannot_be_renamed(service, monkeypatch):
    """Windows, where a virus scanner looks at it."""

    def renamed(path: Path, *args):
        if path.suffix == ".part":
            raise PermissionError(errno.EACCES, "Access is denied")
        return usual(path, *args)

    usual = Path.replace
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", renamed)
        service.fails("Access is denied.*resumed")
    assert service.videos == []
    assert service.make().task_id == service.task


def test_a_download_beside_this_one_that_is_just_finished(tmp_path, monkeypatch):
    """Its file is there when the folder is read, and has its final name when it is looked at."""
    (tmp_path / "magi1_x.mp4").touch()
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: iter([folder / "magi1_x.mp4.part"]))
    check_folder(tmp_path)


def test_what_a_killed_download_has_left_is_removed(tmp_path):
    old, new = tmp_path / "magi1_old.mp4.part", tmp_path / "magi1_new.mp4.part"
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    check_folder(tmp_path)
    assert list(tmp_path.iterdir()) == [new]

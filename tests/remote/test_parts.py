"""The parts of the remote client on their own: addresses, the key, the request, the picture, and what of an answer counts."""

import copy
import io
import os
import pickle
import stat
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
import torch
from PIL import Image

from magi.errors import MagiError
from magi.remote.address import DEFAULT, BaseUrl, is_allowed, redact_url
from magi.remote.answers import Task
from magi.remote.key import ApiKey, find_key, save_key
from magi.remote.polling import Limits
from magi.remote.request import RemoteRequest, encode_image
from magi.remote.transport import Transport, retry_after
from tests.support.remote_service import KEY

OURS = BaseUrl(DEFAULT)


# -- addresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [f"{DEFAULT}/", f" {DEFAULT} ", DEFAULT])
def test_one_address_one_text(text):
    assert str(BaseUrl(text)) == DEFAULT


@pytest.mark.parametrize("text", ["http://localhost:8190", "http://127.0.0.1:1", "http://[::1]:80", "https://a.b/gate"])
def test_addresses_that_may_be_used(text):
    assert str(BaseUrl(text)) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no address"),
        ("api.wavespeed.ai", "no address"),
        ("ftp://a.b", "no address"),
        ("https://", "no address"),
        ("https://a.b:port", "no address"),
        ("http://a.b", "unencrypted"),
        ("http://127.0.0.1.evil.example", "unencrypted"),
        ("http://10.0.0.1", "unencrypted"),
        ("https://user:pass@a.b", "user"),
        ("https://a.b?key=1", "parameters"),
        ("https://a.b#x", "parameters"),
        (f"{DEFAULT}/api/v2", "version"),
    ],
)
def test_addresses_that_may_not(text, reason):
    with pytest.raises(MagiError, match=reason) as found:
        BaseUrl(text)
    assert "pass" not in str(found.value).replace("password", "")


@pytest.mark.parametrize(
    ("url", "ours"),
    [
        (f"{DEFAULT}/x", True),
        ("https://api.wavespeed.ai:443/x", True),
        ("http://api.wavespeed.ai/x", False),
        ("https://api.wavespeed.ai:444/x", False),
        ("https://api.wavespeed.ai.evil.example/x", False),
        ("https://api.wavespeed.ai@evil.example/x", False),
        ("https://cdn.wavespeed.ai/x", False),
        ("https://evil.example\\@api.wavespeed.ai/x", False),
        ("https://evil.example\\.api.wavespeed.ai/x", False),
        ("https://user@api.wavespeed.ai/x", False),
    ],
)
def test_who_gets_the_key(url, ours):
    assert OURS.owns(url) is ours


@pytest.mark.parametrize(
    "url",
    [
        "http://a.b/v",
        "file:///etc/passwd",
        "",
        "nonsense",
        "https://",
        "https://[",
        "data:,x",
        "https://a.b\\@c.d/v",
        "https://a.b\\.c.d/v",
        "https://a@b.c/v",
    ],
)
def test_from_where_nothing_is_fetched(url):
    assert not is_allowed(url)


def test_a_signature_is_not_shown():
    assert redact_url("https://u:p@cdn.example/a/v.mp4?sig=secret#x") == "https://cdn.example/a/v.mp4"


# -- the key -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_environment(monkeypatch):
    for name in ("WAVESPEED_API_KEY", "WAVESPEED_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_key_shows_nowhere():
    key = ApiKey(f" {KEY}\n")
    assert key.header == f"Bearer {KEY}"
    for text in (repr(key), str(key), f"{key}", repr([key]), repr(vars(Transport(OURS, key, (1, 1))))):
        assert KEY not in text
    for keep in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            keep(key)
    assert key.redact(f"bad key {KEY}!") == "bad key ***!"


@pytest.mark.parametrize("text", ["abc1234", f"{KEY} {KEY}", f"{KEY}é", f"{KEY}\n{KEY}", ""])
def test_a_damaged_key(text):
    with pytest.raises(MagiError, match="damaged") as found:
        ApiKey(text)
    assert not text or text not in str(found.value)


def test_no_key_says_where_it_belongs(tmp_path, no_environment):
    with pytest.raises(MagiError) as found:
        find_key(tmp_path / "key.txt", OURS)
    for part in ("WAVESPEED_API_KEY", str(tmp_path / "key.txt"), "accesskey", "does not belong into a node"):
        assert part in str(found.value)


def test_where_the_key_is_found(tmp_path, no_environment):
    file = tmp_path / "key.txt"
    file.write_text(f"\ufeff{KEY}  \r\n", encoding="utf-8")
    assert find_key(file, OURS).header == f"Bearer {KEY}"
    no_environment.setenv("WAVESPEED_API_KEY", "  ")
    assert find_key(file, OURS).header == f"Bearer {KEY}"
    no_environment.setenv("WAVESPEED_API_KEY", "another-key-0123\n")
    assert find_key(file, OURS).header == "Bearer another-key-0123", "the environment goes first"


def test_a_workflow_cannot_send_the_key_elsewhere(tmp_path, no_environment):
    """Workflows are shared, and the address is part of them."""
    file, gateway = tmp_path / "key.txt", BaseUrl("https://gateway.example")
    file.write_text(KEY)
    with pytest.raises(MagiError, match=r"gateway\.example, which is not WaveSpeed") as found:
        find_key(file, gateway)
    assert "second line" in str(found.value)
    file.write_text(f"{KEY}\nhttps://gateway.example/\n")
    assert find_key(file, gateway) is not None
    with pytest.raises(MagiError, match="not WaveSpeed"):
        find_key(file, BaseUrl("https://other.example"))
    no_environment.setenv("WAVESPEED_API_KEY", KEY)
    with pytest.raises(MagiError, match="WAVESPEED_BASE_URL"):
        find_key(file, gateway)
    no_environment.setenv("WAVESPEED_BASE_URL", "https://gateway.example")
    assert find_key(file, gateway) is not None
    assert find_key(file, BaseUrl("https://other.example"), chosen_here=True) is not None


def test_this_machine_needs_no_key(tmp_path, no_environment):
    assert find_key(tmp_path / "none", BaseUrl("http://127.0.0.1:8190")) is None


def test_a_key_file_as_powershell_writes_it(tmp_path, no_environment):
    (tmp_path / "key.txt").write_bytes(f"{KEY}\r\n".encode("utf-16"))
    assert find_key(tmp_path / "key.txt", OURS).header == f"Bearer {KEY}"


def test_a_key_file_that_is_none(tmp_path, no_environment):
    (tmp_path / "key.txt").write_bytes(b"\xff\x00\xfek")
    with pytest.raises(MagiError, match="no text file"):
        find_key(tmp_path / "key.txt", OURS)
    with pytest.raises(MagiError, match="cannot be read"):
        find_key(tmp_path, OURS)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_the_key_file_is_for_its_owner_alone(tmp_path, no_environment):
    file = tmp_path / "new" / "key.txt"
    save_key(file, f" {KEY} ")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o644)
    assert find_key(file, OURS).header == f"Bearer {KEY}"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o644)
    save_key(file, "another-key-0123")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(MagiError, match="damaged"):
        save_key(file, "x")
    assert file.read_text() == "another-key-0123\n"
    file.write_text(f"{KEY}\nhttps://gateway.example\n")
    save_key(file, "another-key-0123")
    assert file.read_text() == "another-key-0123\nhttps://gateway.example\n", "the address that it may go to stays"


# -- the request -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": " \n"}, "prompt is blank"),
        ({"num_frames": 95}, "frames is 95; the service takes 96 to 192"),
        ({"num_frames": 193}, "193"),
        ({"fps": 4}, "fps is 4"),
        ({"fps": 31}, "fps is 31"),
        ({"seed": -2}, "seed -2"),
        ({"seed": 2**31}, "2147483647"),
        ({"resolution": "1080p"}, "480p, 720p"),
        ({"aspect_ratio": "4:3"}, "16:9"),
        ({"image": torch.zeros(31, 64, 3, dtype=torch.uint8)}, "64x31"),
        ({"image": "http://example.org/cat.jpg"}, "https://"),
    ],
)
def test_what_is_refused_before_it_costs(changes, reason):
    with pytest.raises(MagiError, match=reason):
        RemoteRequest(**{"prompt": "A cat"} | changes)


def test_the_limits_themselves_are_taken():
    least = torch.zeros(32, 32, 3, dtype=torch.uint8)
    assert RemoteRequest("A cat", least, 96, 5, seed=0).body(None)["seed"] == 0
    assert RemoteRequest("A cat", least, 192, 30, seed=2**31 - 1).body(None)["num_frames"] == 192


def test_auto_without_a_picture_is_said():
    assert "no picture" in RemoteRequest("A cat").notes()[0]
    assert RemoteRequest("A cat", aspect_ratio="1:1").notes() == []
    assert RemoteRequest("A cat", image="https://example.org/cat.jpg").notes() == []


def test_the_digest_is_that_of_the_request():
    def digest(base=DEFAULT, version="v2", **changes):
        return RemoteRequest(**{"prompt": "A cat", "seed": 1} | changes).digest(base, version)

    black, white = (torch.full((40, 40, 3), value, dtype=torch.uint8) for value in (0, 255))
    others = [
        digest(base="https://a.b"),
        digest(version="v3"),
        digest(prompt="A dog"),
        digest(seed=2),
        digest(seed=None),
        digest(num_frames=97),
        digest(fps=25),
        digest(resolution="480p"),
        digest(aspect_ratio="1:1"),
        digest(safety_checker=False),
        digest(image=black),
        digest(image=white),
        digest(image="https://a.b/c"),
    ]
    assert len({digest(), *others}) == len(others) + 1
    assert digest() == digest()
    assert digest(image=black) == digest(image=black.clone())


def test_a_picture_as_it_is_sent():
    smooth = torch.arange(300 * 200 * 3).reshape(300, 200, 3).remainder(256).to(torch.uint8)
    data, kind = encode_image(smooth)
    assert kind == "image/png"
    sent = Image.open(io.BytesIO(data))
    assert (sent.format, sent.size) == ("PNG", (200, 300))
    assert sent.tobytes() == smooth.numpy().tobytes()


def test_a_large_picture_is_made_to_fit():
    noise = torch.randint(0, 256, (3000, 4500, 3), dtype=torch.uint8)
    data, kind = encode_image(noise)
    assert len(data) <= 10 << 20
    sent = Image.open(io.BytesIO(data))
    assert sent.size == (2048, 1365)
    assert f"image/{sent.format.lower()}" == kind


def test_a_noisy_picture_becomes_a_jpeg():
    noise = torch.randint(0, 256, (2048, 2048, 3), dtype=torch.uint8)
    data, kind = encode_image(noise)
    assert kind == "image/jpeg"
    assert len(data) <= 10 << 20
    assert Image.open(io.BytesIO(data)).size == (2048, 2048)


# -- answers and waiting -----------------------------------------------------------------------------------------------


def test_words_of_the_wrong_type_do_not_count():
    task = Task.of(
        "x", {"status": 5, "outputs": 7, "has_nsfw_contents": "yes", "code": True, "error": {"message": "m"}}
    )
    assert (task.status, task.outputs, task.flagged, task.code, task.error) == ("", (), False, None, "m")


def test_other_forms_of_the_same_words():
    task = Task.of("x", {"status": " Completed ", "outputs": "https://a.b/v.mp4", "code": "1400"})
    assert (task.status, task.outputs, task.code) == ("completed", ("https://a.b/v.mp4",), 1400)


def test_how_long_to_wait():
    limits = Limits(retry_first=1.0, retry_most=30.0)
    assert [limits.before_retry(n, None) for n in (1, 2, 3, 10)] == [1, 2, 4, 30]
    assert limits.before_retry(1, 17.0) == 17
    interval, waits = limits.poll_first, []
    for _ in range(10):
        waits.append(interval)
        interval = limits.next_poll(interval)
    assert waits[0] == 2
    assert waits == sorted(waits)
    assert waits[-1] == 10


def test_retry_after():
    in_a_minute = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=60))
    assert 55 < retry_after(in_a_minute) <= 60
    assert retry_after("17") == 17
    assert retry_after("100000") == 120
    assert retry_after("Thu, 01 Jan 1970 00:00:00 GMT") == 0
    for text in (None, "", "soon", "-5"):
        assert retry_after(text) is None

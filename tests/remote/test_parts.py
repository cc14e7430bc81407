"""The parts of the remote client on their own: addresses, the key, the request, the picture, and what of an answer counts."""

import copy
import io
import os
import pickle
import stat

import pytest
import torch
from PIL import Image

from magi.errors import MagiError
from magi.remote.address import DEFAULT, BaseUrl, can_be_opened, redact_url
from magi.remote.key import ApiKey, find_key, save_key
from magi.remote.request import RemoteRequest, encode_image
from magi.remote.transport import Transport
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


NO_PLACE = [
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
    "https://a.b/v\r\nX-Header: 1",
    "https://a.b/\x1b[2J",
    "https://a.b/\u202egpj.exe",
    "https://a.b/\ud800",
]


@pytest.mark.parametrize("url", NO_PLACE)
def test_what_the_service_cannot_open(url):
    assert not can_be_opened(url)


PRIVATE = [
    "http://127.0.0.1:8188/v",
    "http://localhost:8188/v",
    "https://127.0.0.1/v",
    "https://127.9.9.9/v",
    "https://localhost/v",
    "https://LOCALHOST./v",
    "https://a.localhost/v",
    "https://0.0.0.0/v",
    "https://10.0.0.1/v",
    "https://172.16.0.1/v",
    "https://192.168.1.1/v",
    "https://100.64.0.1/v",
    "https://169.254.169.254/latest/meta-data",
    "https://224.0.0.1/v",
    "https://240.0.0.1/v",
    "https://255.255.255.255/v",
    "https://[::1]/v",
    "https://[::]/v",
    "https://[::ffff:127.0.0.1]/v",
    "https://[::ffff:a00:1]/v",
    "https://[::127.0.0.1]/v",
    "https://[64:ff9b::7f00:1]/v",
    "https://[64:ff9b::10.0.0.1]/v",
    "https://[2002:7f00:1::]/v",
    "https://[fe80::1]/v",
    "https://[fe80::1%25eth0]/v",
    "https://[fc00::1]/v",
    "https://[fd12::1]/v",
    "https://[fec0::1]/v",
    "https://[ff02::1]/v",
]


@pytest.mark.parametrize("url", NO_PLACE + PRIVATE)
def test_from_where_nothing_is_fetched(url):
    assert not OURS.may_fetch(url)
    assert not BaseUrl("http://127.0.0.1:8190").may_fetch(url), "nor where the service is a server on this machine"


@pytest.mark.parametrize(
    "url",
    [
        f"{DEFAULT}/v",
        "https://cdn.example/v.mp4?sig=a%2f",
        "https://8.8.8.8/v",
        "https://[2606:4700::1111]:8443/v",
        "https://[64:ff9b::808:808]/v",
        "https://localhost.example/v",
        "https://cdn.example/v%20\u00e9 1.mp4",
    ],
)
def test_from_where_a_video_is_fetched(url):
    assert OURS.may_fetch(url)


def test_a_server_on_this_machine_gives_its_own_videos_only():
    """By whatever name it calls this machine."""
    for base in ("http://localhost:8190", "http://127.0.0.1:8190", "http://[::1]:8190/gate"):
        for host in ("127.0.0.1", "localhost", "[::1]"):
            assert BaseUrl(base).may_fetch(f"http://{host}:8190/outputs/v.mp4")
            assert not BaseUrl(base).may_fetch(f"http://{host}:8191/outputs/v.mp4")
            assert not BaseUrl(base).may_fetch(f"https://{host}:8190/outputs/v.mp4")
    assert not BaseUrl("http://localhost:8190").owns("http://127.0.0.1:8190/v"), "the key goes to the very same"
    assert BaseUrl("https://192.168.1.5:8443/gate").may_fetch("https://192.168.1.5:8443/v"), "its owner has said so"
    assert not BaseUrl("https://192.168.1.5:8443/gate").may_fetch("https://192.168.1.5/v")


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


@pytest.mark.parametrize("url", ["http://127.0.0.1:8190", "http://localhost:9", "http://[::1]:80", "https://127.0.0.1"])
def test_this_machine_gets_the_key_where_its_owner_says_so_alone(tmp_path, no_environment, url):
    """Whose port it is nobody knows; and it needs none."""
    file, base = tmp_path / "key.txt", BaseUrl(url)
    assert find_key(file, base) is None
    file.write_text(KEY)
    assert find_key(file, base) is None
    file.write_text(f"{KEY}\n{url}/\n")
    assert find_key(file, base) is not None
    no_environment.setenv("WAVESPEED_API_KEY", KEY)
    assert find_key(file, base) is None
    no_environment.setenv("WAVESPEED_BASE_URL", "http://127.0.0.1:8191")
    assert find_key(file, base) is None
    no_environment.setenv("WAVESPEED_BASE_URL", url)
    assert find_key(file, base) is not None
    no_environment.delenv("WAVESPEED_BASE_URL")
    assert find_key(file, base, chosen_here=True) is not None


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

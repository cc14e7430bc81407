"""How requests leave this machine: to exactly the address that was given, and the key to its owner alone."""

import socket
import threading
import time

import pytest

from magi.errors import MagiError
from magi.remote.address import DEFAULT, BaseUrl
from magi.remote.api import Api, NotSentError
from magi.remote.deadline import Deadline
from magi.remote.errors import TemporaryError
from magi.remote.exact import exact_session
from magi.remote.key import ApiKey
from magi.remote.transport import Lost, Transport
from tests.support.remote_service import KEY

OURS = BaseUrl(DEFAULT)


class Wire:
    """A server that notes the bytes that come, and sends bytes."""

    def __init__(self, answer: bytes) -> None:
        self.came: list[bytes] = []
        self._answer = answer
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                self.came.append(connection.recv(1 << 16))
                connection.sendall(self._answer)

    def close(self) -> None:
        self._socket.close()


def test_an_unknown_version_of_the_api():
    with pytest.raises(MagiError, match=r"'v1' is unknown\. Use one of: v2, v3"):
        Api(OURS, "v1", None)


@pytest.fixture
def wire():
    found = Wire(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
    yield found
    found.close()


@pytest.mark.parametrize(
    "path",
    [
        "/v.mp4?X-Amz-Signature=a%2fb%3d&q=~.%7e",
        "/a/../b//c.mp4?x=%zz&y=100%",
        "/%e4%BD%a0.mp4?a=b+c%20d&e=[1]|{2}",
        "?only=a%2fquery",
        "",
        "/v.mp4?url=https://a.b/c?d=e/f",
    ],
)
def test_an_address_is_asked_for_as_it_is_spelled(wire, path):
    transport = Transport(BaseUrl(wire.url), None, (2, 2))
    with transport.opened(wire.url + path) as response:
        assert response.content == b"ok"
    assert wire.came[0].split(b"\r\n")[0] == f"GET {path if path.startswith('/') else '/' + path} HTTP/1.1".encode()


def test_by_a_proxy_it_is_spelled_so_too(wire):
    url = "http://example.org/a%2fb?sig=%7e"
    with Deadline(2) as deadline, exact_session(url, deadline) as (session, request):
        session.send(request, proxies={"http": wire.url})
    assert wire.came[0].startswith(f"GET {url} HTTP/1.1".encode())


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("/my vidéo.mp4#part", b"/my%20vid%C3%A9o.mp4"),
        ("/my video.mp4", b"/my%20video.mp4"),
    ],
)
def test_what_no_request_can_hold_is_quoted(wire, path, sent):
    with Transport(BaseUrl(wire.url), None, (2, 2)).opened(f"{wire.url}{path}") as response:
        assert response.status_code == 200
    assert wire.came[0].startswith(b"GET " + sent + b" HTTP/1.1\r\n")


def test_passwords_of_netrc_stay_there(wire, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret-of-netrc\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with Transport(BaseUrl(wire.url), None, (2, 2)).opened(f"{wire.url}/v"):
        pass
    assert b"uthorization" not in wire.came[0]


def test_a_proxy_is_used_and_does_not_see_the_key(monkeypatch):
    """It refuses the tunnel, so nothing has been sent."""
    proxy = Wire(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, proxy.url)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    api = Api(OURS, "v2", ApiKey(KEY), (2, 2))
    with pytest.raises(NotSentError, match="proxy"):
        api.submit({"prompt": "x"}, lambda: False)
    proxy.close()
    assert proxy.came
    assert all(came.startswith(b"CONNECT api.wavespeed.ai:443 ") for came in proxy.came)
    assert all(KEY.encode() not in came for came in proxy.came)


@pytest.mark.parametrize("proxy", ["http://me:secret@127.0.0.1:port", "http://me:secret@", "ftp://me:secret@a.b:9"])
def test_a_proxy_that_cannot_be(monkeypatch, proxy):
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, proxy)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(NotSentError, match="Nothing was sent") as found:
        Api(OURS, "v2", ApiKey(KEY), (2, 2)).submit({"prompt": "x"}, lambda: False)
    assert "secret" not in str(found.value)


def test_no_proxy_for_this_machine(wire, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    transport = Transport(BaseUrl(wire.url), None, (2, 2))
    assert transport.get(f"{wire.url}/x").status == 200
    assert transport.send("POST", f"{wire.url}/x").status == 200


def test_no_network(monkeypatch):
    def nobody(*args, **options):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    with pytest.raises(NotSentError, match=r"reached: [^=]*Is there a network\? Nothing was sent"):
        Api(OURS, "v2", ApiKey(KEY), (2, 2)).submit({"prompt": "x"}, lambda: False)


def test_a_server_without_encryption(wire):
    """https to a port that does not speak it: a clear end, and nothing was sent."""
    api = Api(BaseUrl(wire.url.replace("http:", "https:")), "v2", ApiKey(KEY), (2, 2))
    with pytest.raises(NotSentError):
        api.submit({"prompt": "x"}, lambda: False)
    assert all(KEY.encode() not in came for came in wire.came)


NO_HOST = ["https://a..b", f"https://{'a' * 70}.example"]


@pytest.mark.parametrize("url", NO_HOST)
def test_a_base_url_whose_host_cannot_be(url):
    with pytest.raises(NotSentError, match="Nothing was sent"):
        Api(BaseUrl(url), "v2", ApiKey(KEY), (2, 2)).submit({"prompt": "x"}, lambda: False)


@pytest.mark.parametrize("url", [*NO_HOST, "https://a%zz"])
def test_a_video_at_a_host_that_cannot_be(url):
    with pytest.raises(Lost), Transport(OURS, ApiKey(KEY), (2, 2)).opened(f"{url}/v.mp4"):
        pass


@pytest.mark.parametrize("target", ["https://[", "https://a@b/c", "//\\@"])
def test_a_redirect_to_no_address(target):
    to = Wire(f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n".encode())
    with pytest.raises(TemporaryError, match="nothing may be fetched"):
        Transport(BaseUrl(to.url), None, (2, 2)).get(f"{to.url}/x")
    to.close()


def test_an_answer_that_never_ends():
    flood = Wire(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b" " * (3 << 20))
    began = time.monotonic()
    with pytest.raises(Exception, match="too long"):
        Transport(BaseUrl(flood.url), None, (2, 2)).get(f"{flood.url}/x")
    flood.close()
    assert time.monotonic() - began < 5

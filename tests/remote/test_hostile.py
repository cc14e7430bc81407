"""A server that means harm, or is broken: what it sends is bounded in time and memory, and leads nowhere else."""

import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from magi.remote import exact
from magi.remote.address import DEFAULT, BaseUrl
from magi.remote.api import Api
from magi.remote.deadline import Deadline
from magi.remote.errors import RefusedError, RemoteError, TemporaryError, UnclearError
from magi.remote.fake_server import Answer, FakeServer, result
from magi.remote.key import ApiKey
from magi.remote.transport import Lost, Transport
from tests.support.remote_service import KEY, PICTURE, poll_answer, quick, wait_for

OURS = BaseUrl(DEFAULT)
JUNK = "\x1b[31m<img src=x>\u202e\ud800" + KEY
SHOWN = "‹img src=x›***"
DRIP = 0.05  # seconds between two bytes
SOON = 0.3  # seconds that an answer has


@contextmanager
def speaking(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that talks to each connection in a thread of its own."""
    listening, stop = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            talk(connection)

    def accept() -> None:
        while not stop.is_set():
            with suppress(OSError):
                connection, _ = listening.accept()
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        stop.set()
        with suppress(OSError), socket.create_connection(listening.getsockname(), 1):  # wakes it
            pass
        thread.join(2)
        listening.close()


def dripping(first: bytes, then: bytes) -> Callable[[socket.socket], None]:
    def talk(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        connection.sendall(first)
        while True:
            connection.sendall(then)
            time.sleep(DRIP)

    return talk


OK = b"HTTP/1.1 200 OK\r\n"
DRIPS = {
    "before the headers": (b"", b"H"),
    "in the status": (b"HTTP/1.1 200 ", b"O"),
    "in the headers": (OK, b"X: y\r\n"),
    "in one header": (OK + b"X: ", b"y"),
    "in the content": (OK + b"Content-Length: 100000\r\n\r\n{", b" "),
    "in content without a length": (OK + b"Connection: close\r\n\r\n{}", b" "),
    "in chunks": (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "before it goes on": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}


def get(transport: Transport, url: str) -> None:
    transport.get(url, SOON)


def post(transport: Transport, url: str) -> None:
    transport.send("POST", url, SOON, data=b"x")


def download(transport: Transport, url: str) -> None:
    with transport.opened(url, Deadline(SOON)) as response:
        list(response.iter_content(1 << 14))


@pytest.mark.parametrize(
    ("drip", "ask"),
    [(drip, download) for drip in DRIPS]
    + [(drip, ask) for drip in ("in one header", "in the content") for ask in (get, post)],
)
def test_what_only_drips_ends_in_time(drip, ask):
    before = set(threading.enumerate())  # some of other tests' still wait for a silent server
    with speaking(dripping(*DRIPS[drip])) as url:
        transport = Transport(BaseUrl(url), None, (2.0, 20.0))
        began = time.monotonic()
        with pytest.raises(Lost, match=r"no whole answer within 0\.3 s"):
            ask(transport, f"{url}/v.mp4")
        assert time.monotonic() - began < 2
    wait_for(lambda: not [t for t in threading.enumerate() if t.name == "magi-deadline" and t not in before])


def test_a_server_that_hardly_reads():
    """It takes a picture a byte at a time."""

    def talk(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        while connection.recv(1):
            time.sleep(DRIP)

    with speaking(talk) as url:
        began = time.monotonic()
        with pytest.raises(TemporaryError, match="no whole answer within"):
            Api(BaseUrl(url), "v2", None, (2.0, 20.0)).upload(bytes(8 << 20), "image/png", SOON - (8 << 20) / 4000)
        assert time.monotonic() - began < 3


def test_a_slow_line_has_its_time(service):
    """More than an answer may take, but it comes on."""

    def slowly(usual):
        return Answer(content=usual.content + bytes(1 << 18), headers=usual.headers, block=1 << 15, pause=0.1)

    service.make()
    service.server.script["download"].append(slowly)
    began = time.monotonic()
    service.make(limits=quick(answer=0.4))
    assert time.monotonic() - began > 0.8
    assert service.server.count("download") == 2


@pytest.mark.parametrize("kind", ["upload", "submit", "download"])
def test_drips_in_every_phase(service, kind):
    slow = Answer(content=b" " * 1000, headers={"Content-Type": "video/mp4"}, block=1, pause=DRIP)
    service.server.script[kind].extend([lambda usual: slow] * 4)
    began = time.monotonic()
    service.fails("no whole answer within", image=PICTURE, limits=quick(answer=0.4))
    assert time.monotonic() - began < 6
    if kind == "submit":  # nobody knows of a task, and nobody makes another one
        service.fails("a task may have been made", UnclearError, image=PICTURE)
    else:
        service.server.script[kind].clear()
        assert service.make(image=PICTURE).facts.frames == 96
    assert service.submits == 1
    wait_for(lambda: not service.threads)


def test_a_cancelled_download_is_cut_off():
    """Its thread does not go on waiting for the next byte."""
    with speaking(dripping(OK + b"Content-Length: 100000\r\n\r\n", b"x")) as url:
        deadline, ended = Deadline(60), threading.Event()

        def work() -> None:
            with suppress(Lost), Transport(BaseUrl(url), None, (2, 20)).opened(f"{url}/v.mp4", deadline) as response:
                list(response.iter_content(1 << 14))
            ended.set()

        threading.Thread(target=work, daemon=True).start()
        time.sleep(0.2)
        deadline.expire()
        assert ended.wait(1)


# -- headers -----------------------------------------------------------------------------------------------------------

NINES = b"9" * 5000


@pytest.mark.parametrize("length", ["9" * 5000, "9" * 30])
def test_a_length_that_python_does_not_parse(service, length):
    service.server.script["download"].append(
        Answer(content=b"x", headers={"Content-Type": "video/mp4", "Content-Length": length})
    )
    service.fails("larger than")
    assert service.make().task_id == service.task


HEADERS = {
    "a length": b"Content-Length: " + NINES,
    "a negative length": b"Content-Length: -5",
    "two lengths": b"Content-Length: 5\r\nContent-Length: 6",
    "a wait": b"Retry-After: " + NINES,
    "a day": b"Retry-After: Thu, " + NINES + b" Jan 1970 00:00:00 GMT",
    "a range": b"Content-Range: bytes " + NINES + b"-/x",
    "an age": b"Set-Cookie: a=b; Max-Age=" + NINES + b"; Expires=" + NINES,
    "a type": b"Content-Type: " + b';="\\\xff' * 900,
    "no colon": b"nonsense",
    "no name": b": x",
    "many": b"\r\n".join(b"X-%d: y" % i for i in range(500)),
    "a long one": b"X: " + b"y" * 70_000,
    "an unknown encoding": b"Content-Encoding: br",
    "many encodings": b"Content-Encoding: " + b", ".join([b"gzip"] * 9),
    "no encoding": b"Content-Encoding: gzip",
    "a chunk": b"Transfer-Encoding: chunked\r\n\r\n" + NINES + b"\r\n",
    "a place": b"Location: \x1b[31m\xff" + NINES,
}


@pytest.mark.parametrize("status", [b"200 OK", b"302 Found", b"503 Busy", b"9" * 5000, b"\xff"])
@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_any_header(header, status):
    """It is an answer or none, and no traceback."""

    def talk(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.1 " + status + b"\r\n" + header + b"\r\n\r\n{}")

    with speaking(talk) as url:
        api = Api(BaseUrl(url), "v2", ApiKey(KEY), (1.0, 1.0))
        for call in (lambda: api.result("0123"), lambda: api.upload(b"x", "image/png"), lambda: api.submit({}, bool)):
            with pytest.raises(RemoteError) as found:
                call()
            assert str(found.value).isprintable()
        with suppress(Lost, TemporaryError), api.transport.opened(f"{url}/v.mp4") as response:
            list(response.iter_content(1 << 14))


def test_what_is_packed_to_burst(service):
    """A megabyte of it is a gigabyte."""
    packed = gzip.compress(gzip.compress(bytes(64 << 20)))
    twice = {"Content-Encoding": "gzip, gzip"}
    service.server.script["poll"].extend([Answer(content=packed, headers=twice)] * 4)
    service.fails("compressed in a way that was not asked for, gzip, gzip")
    once = {"Content-Encoding": "gzip"}
    service.server.script["poll"].extend([Answer(content=gzip.compress(bytes(64 << 20)), headers=once)] * 4)
    service.fails("far too long")


@pytest.mark.parametrize("name", ["aws-chunked", "none", "UTF-8", "identity"])
def test_an_encoding_that_is_none(service, name):
    """As stores hand out what was uploaded to them in an odd way: the video is as it is."""
    service.server.script["download"].append(
        lambda usual: Answer(content=usual.content, headers=usual.headers | {"Content-Encoding": name})
    )
    assert service.make().facts.frames == 96
    assert service.server.count("download") == 1


# -- content -----------------------------------------------------------------------------------------------------------

DEEP = b'{"a":' * 10_000 + b"1" + b"}" * 10_000
BODIES = {
    "deep": DEEP,
    "deep lists": b"[" * 10_000 + b"]" * 10_000,
    "deep data": b'{"data": ' + DEEP + b"}",
    "a bit deep": json.dumps(result({"error": [[[[[[[[[["x"]]]]]]]]]]}, 400)).encode(),
    "no number": b'{"code": NaN, "data": {"code": Infinity, "error": -Infinity, "status": NaN, "id": NaN}}',
    "a long number": b'{"code": ' + NINES + b', "data": {}}',
    "a number of 4000 digits": b'{"code": ' + b"9" * 4000 + b', "data": {"code": ' + b"9" * 4000 + b"}}",
    "half a character": b'{"code": 400, "message": "\\ud800", "data": {"id": "\\udfff"}}',
    "not UTF-8": b'{"message": "\xff\xfe"}',
    "UTF-16": json.dumps(result(None, 500, "oops")).encode("utf-16"),
    "a zero": b"\0" * 1000,
    "huge": b'{"message": "' + b"x" * 900_000 + b'"}',
    "too huge": b" " * (2 << 20),
    "types": b'{"code": [], "message": {"message": []}, "data": {"id": {}, "download_url": {}, "outputs": {}, "error": true}}',
    "a list of data": b'{"data": [{"id": "0123456789"}]}',
    "many": b'{"data": {"outputs": [' + b"1," * 200_000 + b"1]}}",
    "the same name twice": b'{"data": {"id": "a"}, "data": 5}',
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("kind", ["submit", "poll", "upload"])
def test_any_content(service, body, kind):
    """Of it comes no traceback, and no second task."""
    service.server.script[kind].extend([Answer(content=body)] * 5)
    with suppress(RemoteError):
        service.make(image=PICTURE, limits=quick(running=0.2))
    assert all(len(text) < 12_000 for text in service.errors)
    assert all(len(at.text) < 200 and at.text.isprintable() for at in service.progress)
    assert service.submits <= 1


def test_texts_are_shown_in_one_way(service):
    """In progress, errors and the log: without the key, codes for a terminal, and HTML."""
    service.server.script["poll"].extend([poll_answer(JUNK)] * 10)
    service.make()
    assert any(f"at work ({SHOWN})" in at.text for at in service.progress)
    page = {"Content-Type": f"text/{'<b>' + KEY}"}
    dirty = f"{service.server.url}/outputs/<b>%1b{KEY[:-1]}/" + "x" * 5000
    texts = []
    for kind, answer, seed in [
        ("submit", Answer(400, result(None, 400, JUNK)), 1),
        ("submit", Answer(content=result({"code": 1400}, 400, JUNK)), 2),
        ("submit", Answer(500, result(None, 500, JUNK)), 3),
        ("submit", Answer(content=result({"id": KEY})), 4),
        ("upload", Answer(413, {"detail": [{"loc": [JUNK], "msg": JUNK}]}), 5),
        ("poll", poll_answer("failed", error=JUNK), 6),
        ("poll", Answer(content=JUNK.encode("utf-8", "ignore")), 7),
        ("poll", poll_answer("completed", outputs=[f"https://a.b/{KEY}", f"https://a.b/{JUNK}"]), 8),
        ("poll", poll_answer("completed", outputs=[dirty]), 9),
        ("poll", Answer(302, b"", {"Location": f"https://127.0.0.1/<b>{KEY}"}), 10),
        ("download", Answer(content=b"x", headers=page), 11),
    ]:
        service.server.script.clear()
        service.server.script[kind].extend([answer] * 12)
        service.most_submits += 1
        texts.append(service.fails(".", seed=seed, image=PICTURE))
    texts += [*service.log, *(at.text for at in service.progress)]
    for text in texts:
        assert text.isprintable(), text
        assert "<" not in text
        assert len(text) < 1500
    assert sum(SHOWN in text for text in texts) >= 5


def test_an_id_that_is_the_key(service):
    """It would be written down, and logged."""
    service.server.script["submit"].append(Answer(content=result({"id": KEY})))
    service.fails("without the id of a task", UnclearError)


# -- where a service leads ---------------------------------------------------------------------------------------------


@pytest.fixture
def bystander() -> Iterator[FakeServer]:
    """Another server on this machine, which has nothing to do with it, and must not be asked."""
    with FakeServer() as found:
        yield found
        assert found.requests == []


def test_a_video_on_another_port_of_this_machine(service, bystander):
    service.server.script["poll"].extend([poll_answer("completed", outputs=[f"{bystander.url}/outputs/v.mp4"])] * 8)
    service.fails("completed.*nothing may be fetched")


@pytest.mark.parametrize("kind", ["poll", "download"])
def test_a_redirect_to_another_port_of_this_machine(service, bystander, kind):
    service.server.script[kind].extend([Answer(302, b"", {"Location": f"{bystander.url}/outputs/v.mp4"})] * 8)
    assert bystander.url in service.fails("nothing may be fetched")


def test_a_picture_is_not_uploaded_to_where_an_answer_leads(service, bystander):
    service.server.script["upload"].extend([Answer(307, b"", {"Location": f"{bystander.url}/outputs/v"})] * 8)
    service.fails("could not be uploaded", image=PICTURE)


PRIVATE = ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "fe80::1%1", "fd00::1", "::ffff:192.168.0.1", "0.0.0.0"]


@pytest.mark.parametrize("address", PRIVATE)
def test_a_name_that_leads_into_a_private_network(monkeypatch, address):
    """It is seen before anything is sent there."""
    tried = lead("cdn.example", [address], monkeypatch)
    transport = Transport(OURS, ApiKey(KEY), (1, 1))
    with (
        pytest.raises(Lost, match=r"cdn\.example leads to .*nothing may be fetched"),
        transport.opened("https://cdn.example/v.mp4"),
    ):
        pass
    assert tried == []


@pytest.mark.parametrize("host", ["2130706433", "0x7f.1", "127.1"])
def test_an_address_that_is_written_as_a_name(host):
    with (
        pytest.raises((Lost, TemporaryError)) as found,
        Transport(OURS, ApiKey(KEY), (1, 1)).opened(f"https://{host}:1/v.mp4"),
    ):
        pass
    assert "refused" not in str(found.value), "it has not been tried"


def test_public_addresses_of_a_name_are_tried_in_turn(monkeypatch):
    """Also those that stand for a name in many VPN programs."""
    tried = lead("cdn.example", ["10.0.0.1", "198.18.0.7", "93.184.216.34"], monkeypatch)
    with pytest.raises(Lost, match="unreachable"), Transport(OURS, None, (1, 1)).opened("https://cdn.example/v.mp4"):
        pass
    assert tried == ["198.18.0.7", "93.184.216.34"]


def test_a_gateway_of_the_users_may_be_anywhere(monkeypatch):
    tried = lead("gateway.lan", ["192.168.1.5"], monkeypatch)
    with pytest.raises(TemporaryError):
        Api(BaseUrl("https://gateway.lan"), "v2", ApiKey(KEY), (1, 1)).result("0123")
    assert tried == ["gateway.lan"]


def lead(name: str, addresses: list[str], monkeypatch) -> list[str]:
    """Has a name lead to addresses; returns where connections will have been tried, none of which comes about."""
    usual, tried = socket.getaddrinfo, []

    def found(host, port, *args, **options):
        if host != name:
            return usual(host, port, *args, **options)
        return [
            (socket.AF_INET6 if ":" in a else socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses
        ]

    def connect(place, *args, **options):
        tried.append(place[0])
        raise OSError(101, "Network is unreachable")

    for variable in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(exact.socket, "getaddrinfo", found)
    monkeypatch.setattr("urllib3.util.connection.create_connection", connect)
    return tried


def test_a_key_is_wanted_where_none_is_sent(service):
    """By a server on this machine to which a workflow leads."""
    api = Api(BaseUrl(service.server.url), "v2", None)
    with pytest.raises(RefusedError, match=f"none was sent.*WAVESPEED_BASE_URL={service.server.url}"):
        api.submit({"prompt": "x"}, lambda: False)

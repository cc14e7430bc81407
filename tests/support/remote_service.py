"""A client and a server that speaks as the service does, over real HTTP; and what must hold however it goes."""

import json
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from magi.errors import MagiError
from magi.remote.address import BaseUrl
from magi.remote.api import Api
from magi.remote.client import Client, RemoteVideo
from magi.remote.errors import Cancelled
from magi.remote.fake_server import Answer, FakeServer, Request, result
from magi.remote.key import ApiKey
from magi.remote.polling import Limits
from magi.remote.progress import RemoteProgress
from magi.remote.request import RemoteRequest

KEY = "wsk_live_7Hq2-do-not-leak-9Zx"
QUICK = Limits(
    poll_first=0.02, poll_most=0.05, retries=3, unknown=2, retry_first=0.01, retry_most=0.05, running=1.5, queued=5.0
)
TIMEOUTS = (1.0, 20.0)  # the second is for making a video, too
SOON_SILENT = (1.0, 1.0)

# What a server, or a gateway before it, may answer instead of what it should.
PAGE = Answer(200, b"<html>Bad gateway</html>", {"Content-Type": "text/html"})
PAGE_502 = Answer(502, b"<html>Bad gateway</html>", {"Content-Type": "text/html"})
CUT_JSON = Answer(200, b'{"code": 200, "data": {"id": "abc')
DROPPED = Answer(keep=0)
PICTURE = torch.full((64, 64, 3), 90, dtype=torch.uint8)


def quick(**changes) -> Limits:
    """The tests' limits, but for some."""
    return replace(QUICK, **changes)


def poll_answer(status: object, **more) -> Answer:
    """The answer to a poll of a task."""
    return Answer(content=result({"id": "x", "status": status, "outputs": [], **more}))


class Service:
    """One user with an account at a server.

    Attributes:
        server: the service.
        most_submits: how many submissions may have come in the end.
        log: what was logged.
        progress: what was shown.
        errors: texts of all errors, with their tracebacks.
    """

    def __init__(self, server: FakeServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.most_submits = 1
        self.log: list[str] = []
        self.progress: list[RemoteProgress] = []
        self.errors: list[str] = []
        self._others = set(threading.enumerate())  # of earlier tests, still waiting for a silent server

    @property
    def threads(self) -> list[str]:
        """The client's threads that have not ended."""
        found = [t for t in threading.enumerate() if t not in self._others]
        return [t.name for t in found if t.name.startswith(("magi-remote", "magi-worker"))]

    def client(self, version: str = "v2", key: str = KEY, limits: Limits = QUICK, timeouts=TIMEOUTS) -> Client:
        api = Api(BaseUrl(self.server.url), version, ApiKey(key), timeouts)
        return Client(api, self.folder / "records", self.log.append, limits)

    def make(
        self,
        resume_id: str = "",
        version: str = "v2",
        key: str = KEY,
        limits: Limits = QUICK,
        seen: Callable[[RemoteProgress], None] | None = None,
        timeouts=TIMEOUTS,
        take: Callable[..., None] = lambda *_: None,
        **request,
    ) -> RemoteVideo:
        def on_progress(at: RemoteProgress) -> None:
            self.progress.append(at)
            if seen:
                seen(at)

        asked = {"prompt": "A cat", "resolution": "480p", "aspect_ratio": "16:9", "seed": 7} | request
        client = self.client(version, key, limits, timeouts)
        try:
            return client.make(RemoteRequest(**asked), self.folder / "videos", on_progress, resume_id, take)
        except BaseException as error:
            self.errors.append("".join(traceback.format_exception(error)))
            raise

    def fails(self, match: str, kind: type[Exception] = MagiError, **options) -> str:
        """The text of the error that it ends with."""
        with pytest.raises(kind, match=match) as found:
            self.make(**options)
        return str(found.value)

    def cancels(self, when: Callable[[RemoteProgress], float | None], **options) -> float:
        """Cancels at the first progress for which `when` gives the time at which the user wanted to; the seconds from then to the end."""
        asked: list[float] = []

        def seen(at: RemoteProgress) -> None:
            if (wanted := when(at)) is not None:
                asked.append(wanted)
                raise Cancelled

        with pytest.raises(Cancelled):
            self.make(seen=seen, **options)
        return time.monotonic() - asked[0]

    @property
    def submits(self) -> int:
        return self.server.count("submit")

    @property
    def task(self) -> str:
        """The id of the only task."""
        (found,) = self.server.tasks
        return found

    @property
    def records(self) -> list[dict]:
        return [json.loads(path.read_bytes()) for path in (self.folder / "records").glob("*.json")]

    @property
    def videos(self) -> list[str]:
        """Names in the folder for videos."""
        folder = self.folder / "videos"
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []

    def check(self) -> None:
        """However it went: submitted once, nothing half finished, the key nowhere, and sent to nobody else."""
        assert self.submits <= self.most_submits, "more tasks than were paid for knowingly"
        assert not [name for name in self.videos if not name.endswith(".mp4")]
        shown = [*self.log, *(at.text for at in self.progress), *self.errors]
        assert not [text for text in shown if KEY in text]
        for path in self.folder.rglob("*"):
            assert KEY not in path.name
            assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
        assert not [r for r in self.server.requests if KEY.encode() in r.body or KEY in r.target]


@contextmanager
def stranger(*answers: Answer) -> Iterator[tuple[str, list[Request]]]:
    """(address, requests) of another server, which must not see the key."""
    server = FakeServer()
    server.script["download"].extend(answers)
    server.script["poll"].extend(answers)
    with server:
        yield server.url, server.requests
    for request in server.requests:
        assert "authorization" not in request.headers


def wait_for(condition: Callable[[], object], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)

"""The service's calls: each one exchange, whose answer is a value or an error that says what may have been paid for."""

import json
import re
from collections.abc import Callable
from typing import Any

from ..errors import MagiError
from .address import BaseUrl
from .answers import Task, refusal, words
from .errors import GoneError, RefusedError, TemporaryError, UnclearError
from .key import ApiKey
from .request import MODEL
from .transport import Lost, Reply, SentOnce, Transport

VERSIONS = ("v2", "v3")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{3,127}")
_TOO_MUCH = (408, 425, 429)  # statuses after which a GET or an upload may be tried again


class NotSentError(TemporaryError):
    """No part of the request has left this machine."""


class Api:
    """One account at the service.

    Attributes:
        base: before /api/...
        version: "v2" or "v3", of all calls.
        transport: how they are sent.
    """

    def __init__(
        self, base: BaseUrl, version: str, key: ApiKey | None, timeouts: tuple[float, float] = (15.0, 60.0)
    ) -> None:
        """`timeouts`: seconds to connect, and of silence after which a request is given up."""
        if version not in VERSIONS:
            raise MagiError(f"The API version {version!r} is unknown. Use one of: {', '.join(VERSIONS)}.")
        self.base, self.version = base, version
        self.transport = Transport(base, key, timeouts)

    def upload(self, data: bytes, kind: str) -> str:
        """Puts a picture of the media type `kind` where the service can open it; returns its address.

        Raises:
            RefusedError, TemporaryError
        """
        name = "image." + kind.rpartition("/")[2]
        try:
            reply = self.transport.send("POST", self._url("media/upload/binary"), files={"file": (name, data, kind)})
        except Lost as lost:
            raise TemporaryError(str(lost)) from None
        found = self._data(reply)
        url = found.get("download_url") or found.get("url")
        if not isinstance(url, str) or not url:
            raise TemporaryError("the service took it and did not say where it is")
        return url

    def submit(self, body: dict[str, Any], unwanted: Callable[[], bool]) -> str:
        """Sends the request, once; returns the task's id. From here on it costs money.

        `unwanted` is asked just before: if it says so, nothing is sent.

        Raises:
            NotSentError: nothing was sent.
            RefusedError: no task was made.
            UnclearError: anything else; its text is the reason alone.
        """
        data = SentOnce(json.dumps(body).encode(), unwanted)
        headers = {"Content-Type": "application/json"}
        try:
            reply = self.transport.send("POST", self._url(MODEL), data=data, headers=headers)
        except Lost as lost:
            if not data.sent:
                raise NotSentError(
                    f"{self.base} cannot be reached: {lost}. Is there a network? Nothing was sent."
                ) from None
            raise UnclearError(str(lost)) from None
        answer = reply.json()
        task = answer.get("data") if answer else None
        if isinstance(task, dict) and is_id(task.get("id")):
            return str(task["id"])
        said, code = words(answer)
        status = _status(reply, answer)
        said = self.transport.hide(said)
        if 300 <= reply.status < 500 and reply.status not in (303, 408, 499):
            raise RefusedError(refusal(reply.status, said, reply.wait, code))
        if reply.status < 300 and 400 <= status < 500 and status not in (408, 499):
            raise RefusedError(refusal(status, said, reply.wait, code))
        named = f"the service answered {reply.status}" + (f" with {status}" if status != reply.status else "")
        raise UnclearError(
            f"{named}{', without the id of a task' if reply.status < 300 else ''}{f': {said}' if said else ''}"
        )

    def result(self, task_id: str) -> Task:
        """How a task stands.

        Raises:
            RefusedError: the key is not accepted.
            GoneError: the service does not know the task.
            TemporaryError: it could not be asked, or its answer makes no sense.
        """
        try:
            reply = self.transport.get(self._url(f"predictions/{task_id}/result"))
        except Lost as lost:
            raise TemporaryError(str(lost)) from None
        return Task.of(task_id, self._data(reply))

    def delete(self, task_id: str) -> None:
        """Asks for a task to be given up, which need not stop it. Raises Lost where the request got no answer."""
        self.transport.send("DELETE", f"{self.base}/api/v3/predictions/{task_id}")  # v2 has no such call

    def _url(self, path: str) -> str:
        return f"{self.base}/api/{self.version}/{path}"

    def _data(self, reply: Reply) -> dict[str, Any]:
        """The `data` of an answer to a request that may be sent again."""
        answer = reply.json()
        said, code = words(answer)
        said, status = self.transport.hide(said), _status(reply, answer)
        if status in (404, 410):
            raise GoneError(f"it answers {status}{f': {said}' if said else ''}")
        if 400 <= status < 500 and status not in _TOO_MUCH:
            raise RefusedError(refusal(status, said, code=code))
        if not 200 <= status < 300:
            raise TemporaryError(f"it answers {status}{f': {said}' if said else ''}", reply.wait)
        data = answer.get("data") if answer else None
        if not isinstance(data, dict):
            raise TemporaryError(
                f"its answer is not what was expected: {self.transport.hide(reply.content[:9999].decode('utf-8', 'replace'))[:80]!r}"
            )
        return data


def is_id(value: object) -> bool:
    """Whether something is a task's id."""
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def _status(reply: Reply, answer: dict[str, Any] | None) -> int:
    """The HTTP status, or the one within an answer that came with 200."""
    inner = answer.get("code") if answer else None
    if 200 <= reply.status < 300 and isinstance(inner, int) and not isinstance(inner, bool) and not 0 <= inner < 300:
        return inner if 300 <= inner < 600 else 500
    return reply.status

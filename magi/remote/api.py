"""The service's calls: each is one HTTP exchange, and ends in a value or an error that tells what may have been billed."""

import json
from collections.abc import Callable
from typing import Any

from ..errors import MagiError
from .address import BaseUrl
from .answers import Task, error_of, is_id, refusal
from .errors import GoneError, RefusedError, TemporaryError, UnclearError
from .key import ApiKey
from .request import MODEL
from .transport import ANSWER_SECONDS, SLOWEST, Lost, Reply, SentOnce, Transport

VERSIONS = ("v2", "v3")
_MOST_EXCERPT = 80  # characters of an answer that makes no sense
_TOO_MUCH = (408, 425, 429)  # statuses after which a GET or an upload may be retried


class NotSentError(TemporaryError):
    """No part of the request has left this machine."""


class Api:
    """One account at the service. A call ends after `most` seconds, however slowly an answer drips.

    Attributes:
        base: what precedes /api/... in every URL.
        version: "v2" or "v3", for all calls.
        transport: sends them.
    """

    def __init__(
        self, base: BaseUrl, version: str, key: ApiKey | None, timeouts: tuple[float, float] = (15.0, 60.0)
    ) -> None:
        """Sends nothing yet. `timeouts`: seconds to connect, and of silence after which a request fails."""
        if version not in VERSIONS:
            raise MagiError(f"The API version {version!r} is unknown. Use one of: {', '.join(VERSIONS)}.")
        self.base, self.version = base, version
        self.transport = Transport(base, key, timeouts)

    def upload(self, data: bytes, kind: str, most: float = ANSWER_SECONDS) -> str:
        """Uploads a picture of the media type `kind` to the service and returns its URL there.

        `most` is for the answer; sending has as much time more as a slow line takes.

        Raises:
            RefusedError, TemporaryError
        """
        name = "image." + kind.rpartition("/")[2]
        try:
            files = {"file": (name, data, kind)}
            reply = self.transport.send(
                "POST", self._url("media/upload/binary"), most + len(data) / SLOWEST, files=files
            )
        except Lost as lost:
            raise TemporaryError(str(lost)) from None
        media = self._data(reply)
        url = media.get("download_url") or media.get("url")
        if not isinstance(url, str) or not url:
            raise TemporaryError("the service took it and did not say where it is")
        return url

    def submit(self, body: dict[str, Any], is_cancelled: Callable[[], bool], most: float = ANSWER_SECONDS) -> str:
        """Sends the request once and returns the task's id. From here on it costs money.

        `is_cancelled` is called just before; where it returns True, nothing is sent.

        Raises:
            NotSentError: nothing was sent.
            RefusedError: no task was created.
            UnclearError: anything else; its text is the reason alone.
        """
        data = SentOnce(json.dumps(body).encode(), is_cancelled)
        headers = {"Content-Type": "application/json"}
        try:
            reply = self.transport.send("POST", self._url(MODEL), most, data=data, headers=headers)
        except Lost as lost:
            if not data.sent:
                raise NotSentError(
                    f"{self.base} cannot be reached: {lost}. Is there a network? Nothing was sent."
                ) from None
            raise UnclearError(str(lost)) from None
        answer = reply.json()
        task = answer.get("data") if answer else None
        if isinstance(task, dict) and is_id(task.get("id")) and not self.transport.holds_key(task["id"]):
            return str(task["id"])
        text, code = self._error_of(answer)
        status = _status(reply, answer)
        if 300 <= reply.status < 500 and reply.status not in (303, 408, 499):
            raise self._refused(reply.status, text, reply.wait, code)
        if reply.status < 300 and 400 <= status < 500 and status not in (408, 499):
            raise self._refused(status, text, reply.wait, code)
        named = f"the service answered {reply.status}" + (f" with {status}" if status != reply.status else "")
        raise UnclearError(
            f"{named}{', without the id of a task' if reply.status < 300 else ''}{f': {text}' if text else ''}"
        )

    def result(self, task_id: str, most: float = ANSWER_SECONDS) -> Task:
        """Asks for a task's state.

        Raises:
            RefusedError: the key is not accepted.
            GoneError: the service does not know the task.
            TemporaryError: the service is out of reach, or its answer makes no sense.
        """
        try:
            reply = self.transport.get(self._url(f"predictions/{task_id}/result"), most)
        except Lost as lost:
            raise TemporaryError(str(lost)) from None
        return Task.of(task_id, self._data(reply), self.transport.may_fetch, self.transport.redact)

    def delete(self, task_id: str, most: float = ANSWER_SECONDS) -> None:
        """Asks the service to delete a task, which need not stop it. Raises Lost where the request got no answer."""
        self.transport.send("DELETE", f"{self.base}/api/v3/predictions/{task_id}", most)  # v2 has no such call

    def _url(self, path: str) -> str:
        return f"{self.base}/api/{self.version}/{path}"

    def _data(self, reply: Reply) -> dict[str, Any]:
        """Returns the `data` of an answer to a request that may be repeated, or raises what the answer means."""
        answer = reply.json()
        text, code = self._error_of(answer)
        status = _status(reply, answer)
        if status in (404, 410):
            raise GoneError(f"it answers {status}{f': {text}' if text else ''}")
        if 400 <= status < 500 and status not in _TOO_MUCH:
            raise self._refused(status, text, None, code)
        if not 200 <= status < 300:
            raise TemporaryError(f"it answers {status}{f': {text}' if text else ''}", reply.wait)
        data = answer.get("data") if answer else None
        if not isinstance(data, dict):
            begins = self.transport.redact(reply.content.decode("utf-8", "replace"), _MOST_EXCERPT)
            raise TemporaryError(f"its answer is not what was expected: {begins!r}")
        return data

    def _error_of(self, answer: dict[str, Any] | None) -> tuple[str, int | None]:
        text, code = error_of(answer)
        return self.transport.redact(text), code

    def _refused(self, status: int, text: str, wait: float | None, code: int | None) -> RefusedError:
        return RefusedError(refusal(status, text, wait, code, None if self.transport.has_key else str(self.base)))


def _status(reply: Reply, answer: dict[str, Any] | None) -> int:
    """Returns the HTTP status, or the one within an answer whose HTTP status is 2xx."""
    inner = answer.get("code") if answer else None
    if 200 <= reply.status < 300 and isinstance(inner, int) and not isinstance(inner, bool) and not 0 <= inner < 300:
        return inner if 300 <= inner < 600 else 500
    return reply.status

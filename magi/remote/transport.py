"""HTTP: each request is sent once, to exactly the given URL, and the key goes to the service only."""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from io import BytesIO
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from .address import BaseUrl, is_allowed, redact_url
from .errors import TemporaryError
from .key import ApiKey

if TYPE_CHECKING:
    import requests

_MOST_ANSWER = 1 << 20  # bytes of JSON
_MOST_HOPS = 5
_PASSWORD = re.compile(r"//[^/\s]*@")  # of a proxy, in its address
_LONGEST_WAIT = 120.0  # seconds that a server may ask to wait


class Lost(Exception):  # noqa: N818 (whether it is an error is for the caller to say)
    """No answer came, or not all of it; the text tells why."""


class SentOnce(BytesIO):
    """A request's body that knows whether any of it was sent: unsent, no server can have acted on it."""

    def __init__(self, data: bytes, is_cancelled: Callable[[], bool]) -> None:
        """Takes `is_cancelled`, called just before sending; where it returns True, nothing is sent."""
        super().__init__(data)
        self.sent = False
        self._unwanted = is_cancelled

    def read(self, size: int | None = -1) -> bytes:
        """Returns the bytes to send next. Raises OSError where it is cancelled before the first of them."""
        if not self.sent and self._unwanted():
            raise OSError("it is cancelled")
        self.sent = True
        return super().read(size)


@dataclass(frozen=True)
class Reply:
    """A server's answer: its HTTP status, its bytes, and how many seconds it asks to wait."""

    status: int
    content: bytes
    wait: float | None = None

    def json(self) -> dict[str, Any] | None:
        """Parses the content as a JSON object; returns None where it is none."""
        try:
            found = json.loads(self.content)
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None


class Transport:
    """Sends requests. The key goes to `base` alone: not to another host that the service names or redirects to."""

    def __init__(self, base: BaseUrl, key: ApiKey | None, timeouts: tuple[float, float]) -> None:
        """Takes `timeouts`: seconds to connect, and of silence."""
        self._base, self._key, self._timeouts = base, key, timeouts

    def send(self, method: str, url: str, **content: Any) -> Reply:
        """Sends one request to the service, once; follows no redirect.

        Raises:
            Lost
        """
        from .exact import PlainSession

        try:
            # A new connection: a kept-alive one may be dead, and then it is unknown what has arrived.
            with PlainSession() as session:
                session.trust_env = not self._base.is_local  # no proxy reaches this machine
                options: dict[str, Any] = {"allow_redirects": False, "stream": True, "timeout": self._timeouts}
                response = session.request(method, url, auth=self._authorise, **options, **content)
                return _reply(response)
        except Exception as error:  # of any kind: a proxy setting that requests cannot read, for example, sends nothing
            raise Lost(self._reason(error)) from None  # requests' errors hold the request, and it the key

    def get(self, url: str) -> Reply:
        """Sends a GET request to the service and returns the whole answer.

        Raises:
            Lost
            TemporaryError: it redirects to a URL that may not be requested.
        """
        with self.opened(url) as response:
            return _reply(response)

    @contextmanager
    def opened(self, url: str) -> "Iterator[requests.Response]":
        """Sends a GET request for exactly this URL, follows redirects and yields the answer as a stream.

        Raises:
            Lost: also from within the with-block, where the connection breaks.
            TemporaryError: it redirects in circles, or to a URL that may not be requested.
        """
        import requests
        from urllib3.exceptions import HTTPError

        from .exact import exact_session

        try:
            for _ in range(_MOST_HOPS):
                with exact_session(url) as (session, request):
                    request.headers["Accept-Encoding"] = "identity"  # else lengths would not be the file's
                    request = self._authorise(request)
                    session.trust_env = urlsplit(url).scheme == "https"  # else it is this machine
                    settings = session.merge_environment_settings(url, {}, True, None, None)
                    response = session.send(request, allow_redirects=False, timeout=self._timeouts, **settings)
                    target = response.headers.get("Location")
                    if target is None or response.status_code not in (301, 302, 303, 307, 308):
                        yield response
                        return
                url = _joined(url, target)
                if not is_allowed(url):
                    raise TemporaryError(
                        f"The server redirects to {redact_url(url)}, from where nothing may be fetched."
                    )
        except (requests.RequestException, HTTPError, OSError) as error:
            raise Lost(self._reason(error)) from None
        raise TemporaryError(f"The server redirects in circles, at last to {redact_url(url)}.")

    def _authorise(self, request: Any) -> Any:
        """Adds the key to a request to the service. As requests' `auth` it also keeps the user's .netrc unread."""
        if self._key is not None and self._base.owns(request.url):
            request.headers["Authorization"] = self._key.header
        return request

    def redact(self, text: str) -> str:
        """Returns a server's text for a message: without the key and control characters, 500 characters at most."""
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        text = self._key.redact(text) if self._key is not None else text
        return text[:500]

    def _reason(self, error: BaseException) -> str:
        """Words the innermost cause of an error."""
        import requests

        if isinstance(error, requests.ConnectTimeout):
            return f"no connection within {self._timeouts[0]:g} s"
        if isinstance(error, requests.Timeout):
            return f"no answer within {self._timeouts[1]:g} s"
        inner = error
        while (deeper := getattr(inner, "reason", None) or next((a for a in inner.args if _is_error(a)), None)) and (
            _is_error(deeper)
        ):
            inner = deeper
        message = _PASSWORD.sub("//", str(inner))
        text = self.redact(message.rpartition(">: ")[2] or message) or type(inner).__name__
        return "the proxy: " + text if isinstance(error, requests.exceptions.ProxyError) else text


def _joined(url: str, target: str) -> str:
    try:
        return urljoin(url, target)
    except ValueError:  # no URL
        return target


def _is_error(value: object) -> bool:
    return isinstance(value, BaseException)


def _reply(response: "requests.Response") -> Reply:
    content = bytearray()
    for block in response.iter_content(1 << 16):
        content += block
        if len(content) > _MOST_ANSWER:
            raise OSError("the answer is far too long")
    return Reply(response.status_code, bytes(content), retry_after(response.headers.get("Retry-After")))


def retry_after(value: str | None) -> float | None:
    """Parses a Retry-After header and returns its seconds, two minutes at most; None without a readable one."""
    if not value:
        return None
    try:
        seconds = float(value) if value.strip().isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError, OSError):  # OSError: Windows, for times before 1970
        return None
    return min(max(seconds, 0.0), _LONGEST_WAIT)

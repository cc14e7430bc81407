"""HTTP: one request is sent once, to exactly the address that was given, and the key goes to its owner only."""

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

from .address import BaseUrl, is_allowed, shown
from .errors import TemporaryError
from .key import ApiKey

if TYPE_CHECKING:
    import requests

_MOST_ANSWER = 1 << 20  # bytes of JSON
_MOST_HOPS = 5
_PASSWORD = re.compile(r"//[^/\s]*@")  # of a proxy, in its address
_LONGEST_WAIT = 120.0  # seconds that a server may ask to wait


class Lost(Exception):  # noqa: N818 (whether it is an error is for the caller to say)
    """No answer came, or not all of it; the text says why."""


class SentOnce(BytesIO):
    """A request's body that knows whether any of it was sent: without it no server can have acted."""

    def __init__(self, data: bytes, unwanted: Callable[[], bool]) -> None:
        """Where `unwanted` says so just before, nothing is sent."""
        super().__init__(data)
        self.sent = False
        self._unwanted = unwanted

    def read(self, size: int | None = -1) -> bytes:
        """What is sent next."""
        if not self.sent and self._unwanted():
            raise OSError("it is cancelled")
        self.sent = True
        return super().read(size)


@dataclass(frozen=True)
class Reply:
    """A server's answer: its status, its bytes, and how many seconds it asks to wait."""

    status: int
    content: bytes
    wait: float | None = None

    def json(self) -> dict[str, Any] | None:
        """The object that it is in JSON, or None."""
        try:
            found = json.loads(self.content)
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None


class Transport:
    """Sends requests. The key goes to `base` alone: not to another host that the service names or redirects to."""

    def __init__(self, base: BaseUrl, key: ApiKey | None, timeouts: tuple[float, float]) -> None:
        """`timeouts`: seconds to connect, and of silence."""
        self._base, self._key, self._timeouts = base, key, timeouts

    def send(self, method: str, url: str, **content: Any) -> Reply:
        """One request to the service, sent once; redirects are not followed.

        Raises:
            Lost
        """
        from .exact import PlainSession

        try:
            # A new connection: one that was kept may be dead, and then nobody knows what has arrived.
            with PlainSession() as session:
                session.trust_env = not self._base.is_local  # no proxy reaches this machine
                options: dict[str, Any] = {"allow_redirects": False, "stream": True, "timeout": self._timeouts}
                response = session.request(method, url, auth=self._authorise, **options, **content)
                return _reply(response)
        except (
            Exception
        ) as error:  # of any kind: settings that requests stumbles over are no reason to think that something was sent
            raise Lost(self._reason(error)) from None  # requests' errors hold the request, and it the key

    def get(self, url: str) -> Reply:
        """What lies at an address of the service.

        Raises:
            Lost
            TemporaryError: it redirects to where nothing may be fetched from.
        """
        with self.opened(url) as response:
            return _reply(response)

    @contextmanager
    def opened(self, url: str) -> "Iterator[requests.Response]":
        """The answer to a GET of exactly these bytes, as a stream. Redirects are followed.

        Raises:
            Lost: also from within the with-block, where the connection breaks.
            TemporaryError: it redirects in circles, or to where nothing may be fetched from.
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
                    raise TemporaryError(f"The server redirects to {shown(url)}, from where nothing may be fetched.")
        except (requests.RequestException, HTTPError, OSError) as error:
            raise Lost(self._reason(error)) from None
        raise TemporaryError(f"The server redirects in circles, at last to {shown(url)}.")

    def _authorise(self, request: Any) -> Any:
        """As requests' `auth`, which also keeps it from looking for passwords in the user's .netrc."""
        if self._key is not None and self._base.owns(request.url):
            request.headers["Authorization"] = self._key.header
        return request

    def hide(self, text: str) -> str:
        """A text from elsewhere, fit to be shown: without the key, without control characters, not too long."""
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        text = self._key.hide(text) if self._key is not None else text
        return text[:500]

    def _reason(self, error: BaseException) -> str:
        """The innermost cause in a few words."""
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
        told = _PASSWORD.sub("//", str(inner))
        text = self.hide(told.rpartition(">: ")[2] or told) or type(inner).__name__
        return "the proxy: " + text if isinstance(error, requests.exceptions.ProxyError) else text


def _joined(url: str, target: str) -> str:
    try:
        return urljoin(url, target)
    except ValueError:  # no address
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
    """Seconds that a Retry-After header asks to wait, at most two minutes; None where it does not say."""
    if not value:
        return None
    try:
        seconds = float(value) if value.strip().isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError, OSError):  # OSError: Windows, for times before 1970
        return None
    return min(max(seconds, 0.0), _LONGEST_WAIT)

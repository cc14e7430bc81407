"""HTTP: each request is sent once, to exactly the given URL, and the key goes to the service only."""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from io import BytesIO
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from ..errors import MagiError
from .address import BaseUrl, is_loopback, redact_url
from .deadline import Deadline
from .errors import TemporaryError
from .key import ApiKey
from .shown import MOST_TEXT, shown

if TYPE_CHECKING:
    from email.message import Message

    import requests

ANSWER_SECONDS = 120.0  # that a whole answer may take
SLOWEST = 4000.0  # bytes per second of the slowest line that large contents have time for

_MOST_ANSWER = 1 << 20  # bytes of JSON
_BLOCK = 1 << 14  # bytes before they are unpacked, which may make a thousand times more of them
_EASILY_UNPACKED = {"gzip", "x-gzip", "deflate"}
_PACKED = {*_EASILY_UNPACKED, "br", "zstd"}  # the other names that there are, such as aws-chunked, change nothing
_MOST_HOPS = 5
_MOST_URL = 200  # characters
_CONNECTION = re.compile(r"^(?:<.*?>|\w+\(host=.*?\)): ")  # which urllib3 names first
_QUERY = re.compile(r"\?[^\s?'\"]*=[^\s'\"]*")  # of a URL, which may be a signature
_PASSWORD = re.compile(r"//[^/\s]*@")  # of a proxy, in its address
_MOST_DIGITS = 18  # of a length; Python refuses to parse thousands, and nothing is that long
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
        except (ValueError, RecursionError):  # numbers of thousands of digits, or lists in lists in lists, too
            return None
        return found if isinstance(found, dict) else None


class Transport:
    """Sends requests. The key goes to `base` alone: not to another host that the service names or redirects to."""

    def __init__(self, base: BaseUrl, key: ApiKey | None, timeouts: tuple[float, float]) -> None:
        """Takes `timeouts`: seconds to connect, and of silence."""
        self._base, self._key, self._timeouts = base, key, timeouts

    def send(self, method: str, url: str, most: float = ANSWER_SECONDS, **content: Any) -> Reply:
        """Sends one request to the service, once; follows no redirect. The whole answer has `most` seconds.

        Raises:
            Lost
        """
        with Deadline(most) as deadline, self._exchange(method, url, deadline, **content) as response:
            return _reply(response)

    def get(self, url: str, most: float = ANSWER_SECONDS) -> Reply:
        """Sends a GET request to the service and returns the whole answer, which has `most` seconds.

        Raises:
            Lost
            TemporaryError: it redirects to a URL that may not be requested.
        """
        with self.opened(url, Deadline(most)) as response:
            return _reply(response)

    @contextmanager
    def opened(self, url: str, deadline: Deadline | None = None) -> "Iterator[requests.Response]":
        """Sends a GET request for exactly this URL, follows redirects and yields the answer as a stream.

        Args:
            url: where to.
            deadline: until when the with-block must have ended; whoever reads a long answer extends it.

        Raises:
            Lost: also from within the with-block, where the connection breaks.
            TemporaryError: it redirects in circles, or to a URL that may not be requested.
        """
        with deadline or Deadline(ANSWER_SECONDS) as deadline:
            for _ in range(_MOST_HOPS):
                if not self.may_fetch(url):
                    raise TemporaryError(
                        f"the service leads to {self.shown_url(url)}, from where nothing may be fetched"
                    )
                with self._exchange("GET", url, deadline) as response:
                    target = response.headers.get("Location")
                    if target is None or response.status_code not in (301, 302, 303, 307, 308):
                        yield response
                        return
                url = _joined(url, target)
        raise TemporaryError(f"the service redirects in circles, at last to {self.shown_url(url)}")

    @contextmanager
    def _exchange(self, method: str, url: str, deadline: Deadline, **content: Any) -> "Iterator[requests.Response]":
        """Sends one request over a connection of its own and yields the answer as a stream. Raises Lost."""
        from .exact import exact_session

        public_only = not self._base.serves(url)
        try:
            # A new connection: a kept-alive one may be dead, and then it is unknown what has arrived.
            with exact_session(url, deadline, method=method, public_only=public_only, **content) as (session, request):
                request = self._authorise(request)
                request.headers["Accept-Encoding"] = "identity"  # else lengths would not be the file's
                session.trust_env = not is_loopback(urlsplit(url).hostname or "")  # no proxy reaches this machine
                settings = session.merge_environment_settings(url, {}, True, None, None)
                response = session.send(request, allow_redirects=False, timeout=self._timeouts, **settings)
                _check_encoding(response)
                yield response
                if deadline.passed:  # what looked like the end of the answer was not
                    raise OSError
        except MagiError:  # of the caller's
            raise
        except Exception as error:  # of any kind: a proxy setting that requests cannot read, for example, sends nothing
            late = f"no whole answer within {deadline.seconds:.3g} s" if deadline.passed else ""
            raise Lost(late or self._reason(error)) from None  # requests' errors hold the request, and it the key

    def _authorise(self, request: Any) -> Any:
        """Adds the key to a request to the service."""
        if self._key is not None and self._base.owns(request.url):
            request.headers["Authorization"] = self._key.header
        return request

    # -- what may be fetched, and shown --------------------------------------------------------------------------------

    @property
    def has_key(self) -> bool:
        """Returns whether requests to the service carry a key."""
        return self._key is not None

    def holds_key(self, text: str) -> bool:
        """Returns whether a text of a server's, which would be saved, has the key in it."""
        return self._key is not None and self._key.stands_in(text)

    def may_fetch(self, url: str) -> bool:
        """Returns whether a URL that the service names may be requested, and handed on."""
        return self._base.may_fetch(url) and not self.holds_key(url)

    def redact(self, text: str, most: int = MOST_TEXT) -> str:
        """Returns a server's text fit to be shown, `most` characters at most."""
        return shown(text, self._key, most)

    def shown_url(self, url: str) -> str:
        """Returns a server's URL fit to be shown, without what may open it."""
        return self.redact(redact_url(url), _MOST_URL)

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
        message = _QUERY.sub("?...", _PASSWORD.sub("//", str(inner)))
        text = self.redact(_CONNECTION.sub("", message)) or type(inner).__name__
        return "the proxy: " + text if isinstance(error, requests.exceptions.ProxyError) else text


def _check_encoding(response: "requests.Response") -> None:
    """Raises OSError for content packed in ways that were not asked for, by which a few bytes become gigabytes."""
    encoding = response.headers.get("Content-Encoding", "").lower()
    packed = [name for name in map(str.strip, encoding.split(",")) if name in _PACKED]
    if len(packed) > 1 or not _EASILY_UNPACKED.issuperset(packed):
        raise OSError(f"it is compressed in a way that was not asked for, {', '.join(packed[:3])}")


def _joined(url: str, target: str) -> str:
    with suppress(UnicodeError):  # headers are read as Latin-1, and mostly are UTF-8
        target = target.encode("latin-1").decode()
    try:
        return urljoin(url, target)
    except ValueError:  # no URL
        return target


def _is_error(value: object) -> bool:
    return isinstance(value, BaseException)


def _reply(response: "requests.Response") -> Reply:
    content = bytearray()
    for block in response.iter_content(_BLOCK):
        content += block
        if len(content) > _MOST_ANSWER:
            raise OSError("the answer is far too long")
    return Reply(response.status_code, bytes(content), retry_after(response.headers.get("Retry-After")))


def content_length(headers: "Mapping[str, str] | Message") -> int:
    """Parses a Content-Length header and returns its bytes; 0 where the length of what is read is unknown."""
    value = headers.get("Content-Length", "").strip()
    if not value.isdecimal() or "Content-Encoding" in headers or "Transfer-Encoding" in headers:
        return 0
    return int(value.lstrip("0")[:_MOST_DIGITS] or 0)


def retry_after(value: str | None) -> float | None:
    """Parses a Retry-After header and returns its seconds, two minutes at most; None without a readable one."""
    if not value:
        return None
    try:
        seconds = float(value) if value.strip().isdecimal() else parsedate_to_datetime(value).timestamp() - time.time()
    except Exception:  # the library's parser of dates raises whatever it stumbles over
        return None
    return min(max(seconds, 0.0), _LONGEST_WAIT)

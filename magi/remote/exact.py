"""Sends a request whose URL is spelled byte for byte as given, over a connection that leads where it may.

A signed URL is valid in one spelling only, and requests and urllib3 both normalise percent-encodings. `urllib.request` keeps the
spelling too, but it has no proxies over TLS or SOCKS, one timeout for connecting and reading, no certifi bundle or
REQUESTS_CA_BUNDLE, and decodes no gzip.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError

from .address import is_public
from .deadline import Deadline


class PlainSession(requests.Session):
    """A session that ignores redirects. With allow_redirects=False, requests still reads their bodies and parses their targets."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """Returns None, so that requests does nothing with a redirect: the caller handles it."""
        return None


@contextmanager
def exact_session(
    url: str, deadline: Deadline, *, method: str = "GET", public_only: bool = True, **content: Any
) -> Iterator[tuple[requests.Session, requests.PreparedRequest]]:
    """Yields a session and a prepared request for `url`, to be sent in it.

    Characters that no request line can hold, such as spaces, are percent-encoded all the same.

    Args:
        url: where to, without control characters.
        deadline: it watches the connection.
        method: of the request.
        public_only: whether a host whose name leads to this machine or into a private network is refused, with an OSError. A
            proxy looks names up itself, and is not asked.
        content: what `requests.Request` takes.
    """
    if not url.isascii() or " " in url:
        url = requests.utils.requote_uri(url)
    with PlainSession() as session:
        adapter = _Adapter(url.partition("#")[0], deadline, public_only)
        session.mount("http://", adapter)
        session.mount("https://", adapter)
        request = session.prepare_request(requests.Request(method, url, auth=_no_password, **content))
        request.url = url
        yield session, request


def _no_password(request: Any) -> Any:
    """Returns the request as it is. Given as `auth`, it keeps requests from reading passwords from .netrc."""
    return request


class _Adapter(HTTPAdapter):
    """Sends one URL as it is spelled, directly or through a proxy."""

    def __init__(self, url: str, deadline: Deadline, public_only: bool) -> None:
        self._url, self._deadline, self._public_only = url, deadline, public_only
        super().__init__()

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self._adapt(self.poolmanager, self._public_only)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **options)
        self._adapt(manager, False)
        return manager

    def _adapt(self, manager: Any, public_only: bool) -> None:
        """Gives a pool manager pools whose connections are `_exact` ones."""
        manager.pool_classes_by_scheme = {
            scheme: type(
                pool.__name__,
                (pool,),
                {"ConnectionCls": _exact(pool.ConnectionCls, self._url, self._deadline, public_only)},
            )
            for scheme, pool in manager.pool_classes_by_scheme.items()
        }


def _exact(connection: Any, url: str, deadline: Deadline, public_only: bool) -> Any:
    """Derives a class of connections that always request `url`, are watched, and may be limited to public addresses."""
    rest = url.partition("://")[2]
    path = rest[min((rest.index(mark) for mark in "/?" if mark in rest), default=len(rest)) :]
    path = path if path.startswith("/") else f"/{path}"

    class Exact(connection):
        host: str

        def putrequest(self, method: str, target: str, *args: Any, **options: Any) -> None:
            # An HTTP proxy gets the whole URL, a server what comes after the host.
            super().putrequest(method, path if target.startswith("/") else url, *args, **options)

        def _new_conn(self) -> Any:
            connected = self._connect_publicly() if public_only else super()._new_conn()
            deadline.watch(connected)
            return connected

        def _connect_publicly(self) -> Any:
            """Connects to the first public address of the host: to just what was checked, whatever its name leads to next."""
            name = self.host
            found = [str(entry[4][0]) for entry in socket.getaddrinfo(name, self.port, type=socket.SOCK_STREAM)]
            failure: Exception = OSError(
                f"{name} leads to {found[0]}, on this machine or in a private network, from where nothing may be fetched"
            )
            for address in filter(is_public, dict.fromkeys(found)):
                if deadline.passed:
                    break
                self.host = address
                try:
                    return super()._new_conn()
                except (OSError, HTTPError) as error:
                    failure = error
                finally:
                    self.host = name  # which the certificate must have
            raise failure

    return Exact

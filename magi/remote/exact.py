"""Sends a GET request whose URL is spelled byte for byte as given.

A signed URL is valid in one spelling only, and requests and urllib3 both normalise percent-encodings. `urllib.request` keeps the
spelling too, but it would give downloads another network configuration than the paid request, which requests sends: it has no proxies
over TLS or SOCKS, one timeout for connecting and reading, no certifi bundle or REQUESTS_CA_BUNDLE, and decodes no gzip.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool


class PlainSession(requests.Session):
    """A session that ignores redirects. With allow_redirects=False, requests still reads their bodies and parses their targets."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """Returns None, so that requests does nothing with a redirect: the caller handles it."""
        return None


@contextmanager
def exact_session(url: str) -> Iterator[tuple[requests.Session, requests.PreparedRequest]]:
    """Yields a session and a prepared GET request for `url`, to be sent in it.

    Characters that no request line can hold, such as spaces, are percent-encoded all the same.
    """
    if not url.isascii() or not url.isprintable() or " " in url:
        url = requests.utils.requote_uri(url)
    with PlainSession() as session:
        adapter = _Adapter(url.partition("#")[0])
        session.mount("http://", adapter)
        session.mount("https://", adapter)
        request = session.prepare_request(requests.Request("GET", url, auth=_no_password))
        request.url = url
        yield session, request


def _no_password(request: Any) -> Any:
    """Returns the request as it is. Given as `auth`, it keeps requests from reading passwords from .netrc."""
    return request


class _Adapter(HTTPAdapter):
    """Sends one URL as it is spelled, directly or through a proxy."""

    def __init__(self, url: str) -> None:
        self._pools = _pools(url)
        super().__init__()

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **options)
        manager.pool_classes_by_scheme = self._pools
        return manager


def _pools(url: str) -> dict[str, Any]:
    """Returns urllib3's connection pools by scheme, with connections that always request `url`."""
    rest = url.partition("://")[2]
    path = rest[min((rest.index(mark) for mark in "/?" if mark in rest), default=len(rest)) :]
    path = path if path.startswith("/") else f"/{path}"

    def pool(base: Any) -> Any:
        def putrequest(self: Any, method: str, target: str, *args: Any, **options: Any) -> None:
            # An HTTP proxy gets the whole URL, a server what comes after the host.
            connection.putrequest(self, method, path if target.startswith("/") else url, *args, **options)

        connection = base.ConnectionCls
        exact = type(connection.__name__, (connection,), {"putrequest": putrequest})
        return type(base.__name__, (base,), {"ConnectionCls": exact})

    return {"http": pool(HTTPConnectionPool), "https": pool(HTTPSConnectionPool)}

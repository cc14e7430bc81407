"""A GET of exactly the bytes of an address. Signed addresses hold for one spelling; requests and urllib3 both tidy spellings up."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool


class PlainSession(requests.Session):
    """Leaves redirects alone. Asked not to follow them, requests still reads all of their bodies and parses their targets."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """None: whoever sends looks himself."""
        return None


@contextmanager
def exact_session(url: str) -> Iterator[tuple[requests.Session, requests.PreparedRequest]]:
    """A session and a GET request for `url` in it. What no request can hold, as spaces, is quoted all the same."""
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
    """As `auth`: keeps requests from looking into the user's .netrc."""
    return request


class _Adapter(HTTPAdapter):
    """Sends one address as it is spelled, directly or by a proxy."""

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
    """urllib3's connection pools, with connections that ask for `url`."""
    rest = url.partition("://")[2]
    path = rest[min((rest.index(mark) for mark in "/?" if mark in rest), default=len(rest)) :]
    path = path if path.startswith("/") else f"/{path}"

    def pool(base: Any) -> Any:
        def putrequest(self: Any, method: str, target: str, *args: Any, **options: Any) -> None:
            # By a plain proxy the whole address is asked for, else what comes after the host.
            connection.putrequest(self, method, path if target.startswith("/") else url, *args, **options)

        connection = base.ConnectionCls
        exact = type(connection.__name__, (connection,), {"putrequest": putrequest})
        return type(base.__name__, (base,), {"ConnectionCls": exact})

    return {"http": pool(HTTPConnectionPool), "https": pool(HTTPSConnectionPool)}

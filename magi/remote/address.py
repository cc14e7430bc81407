"""URLs: which may be requested, and what of them may be shown."""

import ipaddress
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from ..errors import MagiError

DEFAULT = "https://api.wavespeed.ai"
_PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # IPv4 addresses as IPv6-only networks write them
_STAND_INS = ipaddress.IPv4Network("198.18.0.0/15")  # what many VPN programs resolve every name to


@dataclass(frozen=True)
class BaseUrl:
    """What precedes /api/... in every URL of the service; its text is `str(base)`.

    Raises:
        MagiError: the text is no URL that a key may be sent to.
    """

    text: str

    def __post_init__(self) -> None:
        text = self.text.strip().rstrip("/")
        parts = _split(text)
        advice = f"Give it as {DEFAULT}, without anything behind it."
        if parts is None or parts.scheme not in _PORTS or not parts.hostname or not text.isprintable():
            named = "" if "@" in text else f" {self.text!r}"  # which may have a password in it
            raise MagiError(f"The base URL{named} is no address. {advice}")
        if parts.username or parts.password or parts.query or parts.fragment or "?" in text or "#" in text:
            raise MagiError(
                f"The base URL for {parts.hostname} has a user, a password or parameters in it; a workflow would give them away. {advice}"
            )
        if "/api/v" in parts.path:
            raise MagiError(
                f"The base URL {self.text!r} has the API version in it, which is a setting of its own. {advice}"
            )
        if parts.scheme == "http" and not is_loopback(parts.hostname):
            raise MagiError(f"The base URL {self.text!r} would send your key unencrypted. Use https.")
        object.__setattr__(self, "text", text)

    def __str__(self) -> str:
        return self.text

    @property
    def is_local(self) -> bool:
        """Returns whether the host is this machine."""
        return is_loopback(urlsplit(self.text).hostname or "")

    def owns(self, url: str) -> bool:
        """Returns whether `url` has the same scheme, host and port: only such a URL gets the key."""
        return _origin(url) is not None and _origin(url) == _origin(self.text)

    def serves(self, url: str) -> bool:
        """Returns whether `url` leads to the same server, which may call this machine by another name than the user does."""
        ours, other = _origin(self.text), _origin(url)
        if ours is None or other is None or ours == other:
            return ours is not None and ours == other
        return self.is_local and is_loopback(other[1] or "") and (ours[0], ours[2]) == (other[0], other[2])

    def may_fetch(self, url: str) -> bool:
        """Returns whether a URL that the service names may be requested: its own, or one by https that is not private.

        To which address the name of a host leads is seen when it is connected to.
        """
        parts = _plain(url)
        if parts is None or not parts.hostname:
            return False
        return self.serves(url) or (parts.scheme == "https" and not _is_private(parts.hostname))


def can_be_opened(url: str) -> bool:
    """Returns whether a picture's URL is one that the service may be given: by https, or from a test server on this machine."""
    parts = _plain(url)
    if parts is None or not parts.hostname:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname))


def redact_url(url: str) -> str:
    """Returns a URL for a message: without user, password and query, which may be a signature that opens it."""
    parts = _split(url)
    return (
        "an unreadable address" if parts is None else f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    )


def is_public(address: str) -> bool:
    """Returns whether an IP address is in the internet: not this machine's, a private network's or a reserved one."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        inner = (
            found.ipv4_mapped
            or found.sixtofour
            or (ipaddress.IPv4Address(int(found) % 2**32) if found in _NAT64 else None)
        )
        if inner is not None:
            return is_public(str(inner))
        return found.is_global and not (found.is_multicast or found.is_reserved or found.is_site_local)
    return (found.is_global and not found.is_multicast) or found in _STAND_INS


def is_loopback(host: str) -> bool:
    """Returns whether a host is this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_private(host: str) -> bool:
    """Returns whether a host is known, without looking up its name, not to be in the internet."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return f".{host.rstrip('.')}".endswith(".localhost")
    return not is_public(host)


def _origin(url: str) -> tuple[str, str | None, int | None] | None:
    parts = _plain(url)
    return None if parts is None else (parts.scheme, parts.hostname, parts.port or _PORTS.get(parts.scheme))


def _plain(url: str) -> SplitResult | None:
    """Splits a URL whose host every library reads alike; returns None for others, which may be made to deceive one."""
    parts = _split(url)
    return None if parts is None or "@" in parts.netloc or "\\" in url or not url.isprintable() else parts


def _split(url: str) -> SplitResult | None:
    try:
        url.encode()  # fails for lone surrogates
        parts = urlsplit(url)
        _ = parts.port  # raises where it is no number
    except ValueError:
        return None
    return parts

"""The API key: finding it, and keeping it out of everything that is shown or saved."""

import codecs
import os
import re
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from ..errors import MagiError
from ..system.whole_files import write_whole
from .address import DEFAULT, BaseUrl

VARIABLE = "WAVESPEED_API_KEY"
ADDRESS_VARIABLE = "WAVESPEED_BASE_URL"
PAGE = "https://wavespeed.ai/accesskey"
_SHORTEST = 8  # less is no key, and redacting it would spoil ordinary texts


class ApiKey:
    """A key that shows in no repr, cannot be pickled, and redacts itself from texts."""

    __slots__ = ("_echo", "_value")

    def __init__(self, value: str) -> None:
        """Checks `value`. Raises MagiError where it cannot be a key; the message does not show it."""
        value = value.strip()
        if len(value) < _SHORTEST or not value.isascii() or not value.isprintable() or " " in value:
            raise MagiError(
                "The WaveSpeed API key is damaged: it is too short, or has spaces or unusual characters in it. "
                f"Copy it again from {PAGE}."
            )
        self._value = value
        # As a server may repeat it: in other letters, wrapped over lines, or as a part of an address.
        forms = ([re.escape(c) for c in value], [re.escape(quote(c, safe="")) for c in value])
        self._echo = re.compile("|".join(r"\s?".join(form) for form in forms), re.IGNORECASE)

    def __repr__(self) -> str:
        return "ApiKey(hidden)"

    def __reduce__(self) -> str:
        raise TypeError("an API key is not stored")

    @property
    def header(self) -> str:
        """Returns the value of the Authorization header."""
        return f"Bearer {self._value}"

    def stands_in(self, text: str) -> bool:
        """Returns whether a text holds the key."""
        return self._echo.search(text) is not None

    def refuse_in(self, *texts: str) -> None:
        """Raises MagiError where one of the texts, which will be saved and shown, holds the key."""
        if any(map(self.stands_in, texts)):
            raise MagiError(
                "Your API key stands in a field that is saved with workflows and videos, and shown. Remove it there: it belongs into "
                f"{VARIABLE} or its file alone."
            )

    def redact(self, text: str) -> str:
        """Returns the text with the key replaced by ***."""
        return self._echo.sub("***", text)


def find_key(file: Path, base: BaseUrl, chosen_here: bool = False) -> ApiKey | None:
    """Finds the key in the environment, else in `file`; returns None where none is to be sent.

    A base URL comes with a workflow, and a workflow from anybody. So the key goes to another address than WaveSpeed's only where its owner has
    allowed that one: by WAVESPEED_BASE_URL, or in the file's second line. A server on this machine may be asked without it.

    Args:
        file: the key in its first line; it need not exist.
        base: where the key is to be sent.
        chosen_here: whether the user has given `base` directly, as on a command line.

    Raises:
        MagiError: there is no key, it is damaged, or not meant for `base`.
    """
    value, allowed = _found(file)
    if not value:
        if base.is_local:
            return None
        raise MagiError(
            f"There is no WaveSpeed API key. Make one at {PAGE}, then set the environment variable {VARIABLE} before the start, or put it into "
            f"the first line of the file {str(file)!r} (by hand, or with `python -m magi remote --save-key --key-file FILE`). It does not belong "
            "into a node or a workflow."
        )
    trusted = chosen_here or str(base) == DEFAULT or _is(allowed, base)
    if not trusted and base.is_local:
        return None
    if not trusted:
        remedy = f"set {ADDRESS_VARIABLE}={base}"
        if not _in_environment():
            remedy = f"write {base} into the second line of {str(file)!r}"
        raise MagiError(
            f"Your API key would be sent to {base}, which is not WaveSpeed. If it is an address you trust with it, {remedy}; "
            f"else set the base URL to {DEFAULT}."
        )
    return ApiKey(value)


def refuse_key_in(file: Path, *texts: str) -> None:
    """Raises MagiError where one of the texts, which will be saved and shown, holds the key that `find_key` finds."""
    value, _ = _found(file)
    if value:
        ApiKey(value).refuse_in(*texts)


def save_key(file: Path, text: str) -> None:
    """Writes a key into the first line of a file that only its owner can read, where the system knows that.

    Raises:
        MagiError: the text is no key, or the file cannot be written.
    """
    ApiKey(text)
    rest = _lines(file)[1:]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, ("\n".join([text.strip(), *rest]) + "\n").encode(), private=True)
    except OSError as error:
        raise MagiError(
            f"The key cannot be written to {str(file)!r} ({error.strerror}). Choose another file."
        ) from error


def how_to_allow(base: str) -> str:
    """Returns how a user has the key sent to another address than WaveSpeed's, in a sentence."""
    return (
        f"If it is to get yours, set {ADDRESS_VARIABLE}={base} (where the key is in {VARIABLE}), or write {base} into the second line of "
        "the file with the key."
    )


def _in_environment() -> bool:
    return bool(os.environ.get(VARIABLE, "").strip())


def _found(file: Path) -> tuple[str, str]:
    """Returns the key and the other address that it may be sent to, each "" where there is none."""
    if _in_environment():
        return os.environ[VARIABLE].strip(), os.environ.get(ADDRESS_VARIABLE, "")
    lines = [*_lines(file), "", ""]
    return lines[0], lines[1]


def _is(allowed: str, base: BaseUrl) -> bool:
    with suppress(MagiError):  # a line that is no address may be another key, and is not shown
        return BaseUrl(allowed) == base
    return False


def _lines(file: Path) -> list[str]:
    try:
        data = file.read_bytes()
        encoding = (
            "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
        )  # PowerShell's >
        lines = [line.strip() for line in data.decode(encoding).splitlines()]
        with suppress(OSError):  # another's file, or a drive that knows no permissions: it can be read, which is enough
            if os.name != "nt" and file.stat().st_mode & 0o077:
                file.chmod(0o600)
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text file"
        raise MagiError(
            f"The file {str(file)!r} with the WaveSpeed API key cannot be read ({reason}). It is a text file with the key in its first line."
        ) from None
    return lines

"""The one way by which texts from outside come to be shown: `shown`."""

import re

from .key import ApiKey

# Terminals' codes: strings such as titles and links, with their end; colours and moves; all others.
_ESCAPES = re.compile(
    r"\x1b[\]PX^_][^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?|\x1b[ -/]*[0-~]?"
)
MOST_TEXT = 500  # characters of an error text
_LOOKALIKES = str.maketrans("<>", "‹›")  # a front end may take its texts for HTML


def shown(text: str, key: ApiKey | None, most: int = MOST_TEXT) -> str:
    """Returns a server's text fit for terminals, web pages, logs and files, `most` characters at most.

    It is one line, without the key, terminal escape codes, HTML, and characters that cannot be seen (control and bidirectional
    characters, lone surrogates).
    """
    text = _ESCAPES.sub("", text)
    text = " ".join("".join(c if c.isprintable() else " " if c.isspace() else "" for c in text).split())
    text = (key.redact(text) if key is not None else text).translate(_LOOKALIKES)  # the whole of it, then the cut
    return text if len(text) <= most else text[: most - 1] + "…"

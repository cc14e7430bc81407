"""Text of unknown origin, made fit for a terminal, a log and a browser."""

_MOST = 100  # characters


def printable(text: object, most: int = _MOST) -> str:
    """Returns a text on one line: what does not print is escaped, and of a long one the middle is left out.

    Names in files may hold anything: control codes that a terminal obeys, lone surrogates, a megabyte of letters.
    """
    whole = str(text)
    if len(whole) > most:
        whole = f"{whole[: most // 2]} ... {whole[-(most // 2) :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in whole)

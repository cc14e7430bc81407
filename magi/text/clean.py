"""Caption cleaning: the DeepFloyd IF rules that the prompts of MAGI-1's training data went through.

The order of the rules and their oddities are part of the model's input: a rule that looks wrong is still the rule. All
of them are applied to text that is already in lower case.

No rule may look at the rest of a long word from each of its characters: a text without spaces would take minutes. Where
a rule as published does, it is written here in another way that finds the same.
"""

import html
import re
import warnings
from urllib.parse import unquote_plus

Rules = tuple[tuple[re.Pattern[str], str], ...]


def _rules(*pairs: tuple[str, str]) -> Rules:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


_HOST = r"[a-zA-Z0-9.\-]"
_DOMAIN = re.compile(rf"{_HOST}+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)")
_REST_OF_HOST = re.compile(rf"{_HOST}*")
_SCHEMES = tuple(re.compile(rf"{scheme}:(?:/{{1,3}}|[a-zA-Z0-9%])") for scheme in ("https?", "www"))
_BOUNDARY = re.compile(r"\b")

_FILE_TYPES = r"(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
_DASHES = (
    r"[\u002D\u058A\u05BE\u1400\u1806\u2010-\u2015\u2E17\u2E1A\u2E3A\u2E3B\u2E40"
    r"\u301C\u3030\u30A0\uFE31\uFE32\uFE58\uFE63\uFF0D]+"
)

_CHARACTERS = _rules(
    (r"@\w+\b", ""),  # @nickname
    (r"[\u31C0-\u9FFF]+", ""),  # CJK strokes to CJK unified ideographs
    (_DASHES, "-"),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IPv4
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),  # backslash and n, as scraped captions have it
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"(?<!\S)\S+\.{_FILE_TYPES}", ""),  # the first of these is for speed, as a match begins where a word does
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"(?<!\s)\s+\.\s+", " "),  # likewise
)

_DASH_OR_UNDERSCORE = re.compile(r"[-_]")
_MOST_DASHES = 3  # more than these, and the caption is taken for a file-name-like-this

_WORDS = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b{_FILE_TYPES}(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+(?:\.\d*)?[x\u0445×]\d+(?:\.\d*)?\b", ""),  # 10x20; U+0445 is the Cyrillic letter
    (r"\b\s+\:\s+", ": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
)

_EDGES = _rules(
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)

_ENDLESS_REFERENCE = re.compile(r"&#[0-9]{1000,}")


def clean_caption(text: str) -> str:
    """Cleans a prompt as training captions were: lower case, no addresses, file names, mark-up or stray characters.

    The rules are applied twice, as in training; a third time could still change the text. The result may be empty.
    """
    text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate (a broken command line) fits no encoder
    return _one_pass(_one_pass(text))


def _one_pass(text: str) -> str:
    import ftfy  # here: it reads its character tables on import

    text = unquote_plus(text).strip().lower()
    text = text.replace("<person>", "person")
    for scheme in _SCHEMES:
        text = _delete_addresses(scheme, text)
    text = _strip_html(text)
    text = _apply(_CHARACTERS, text)
    if len(_DASH_OR_UNDERSCORE.findall(text)) > _MOST_DASHES:
        text = _DASH_OR_UNDERSCORE.sub(" ", text)
    text = _unescape(_unescape(ftfy.fix_text(text))).strip()
    text = _apply(_WORDS, text)
    return _apply(_EDGES, text).strip()


def _apply(rules: Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _delete_addresses(scheme: re.Pattern[str], text: str) -> str:
    """Deletes every match of a scheme or else a domain that begins at a word boundary."""
    kept, end, known = [], 0, 0
    for boundary in _BOUNDARY.finditer(text):
        start = boundary.start()
        if start < end:
            continue
        found = scheme.match(text, start)
        if not found and start >= known:
            # A domain takes as much as it can. So the first boundary in a run of its characters finds whatever the later
            # ones would, and these need not look at the run again.
            found = _DOMAIN.match(text, start)
            known = _REST_OF_HOST.match(text, start).end()  # type: ignore[union-attr]  # it matches nothing, too
        if found:
            kept.append(text[end:start])
            end = found.end()
    return "".join([*kept, text[end:]])


def _unescape(text: str) -> str:
    return html.unescape(_shortened(text))


def _shortened(text: str) -> str:
    """Shortens the numbers of characters that Python cannot read; these are of no character as long or short."""
    return _ENDLESS_REFERENCE.sub("&#99999999", text)


def _strip_html(text: str) -> str:
    from bs4 import BeautifulSoup
    from bs4.builder import ParserRejectedMarkup

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a caption that looks like a file name or an address is no mistake
        try:
            return BeautifulSoup(_shortened(text), features="html.parser").text
        except ParserRejectedMarkup:  # "<![" and the like: it is not mark-up, so there is nothing to strip
            return text

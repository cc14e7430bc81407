"""Caption cleaning: the DeepFloyd IF rules that the prompts of MAGI-1's training data went through.

The order of the rules and their oddities are part of the model's input: a rule that looks wrong is still the rule. All
of them are applied to text that is already in lower case.
"""

import html
import re
import warnings
from urllib.parse import unquote_plus

Rules = tuple[tuple[re.Pattern[str], str], ...]


def _rules(*pairs: tuple[str, str]) -> Rules:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


_DOMAIN = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_FILE_TYPES = r"(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
_DASHES = (
    r"[\u002D\u058A\u05BE\u1400\u1806\u2010-\u2015\u2E17\u2E1A\u2E3A\u2E3B\u2E40"
    r"\u301C\u3030\u30A0\uFE31\uFE32\uFE58\uFE63\uFF0D]+"
)

_ADDRESSES = _rules(
    (r"<person>", "person"),
    (rf"\b((?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN}))", ""),
    (rf"\b((?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN}))", ""),
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
    (rf"\S+\.{_FILE_TYPES}", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
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
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+\.?\d*[x\u0445×]\d+\.?\d*\b", ""),  # 10x20; U+0445 is the Cyrillic letter
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


def clean_caption(text: str) -> str:
    """Cleans a prompt as training captions were: lower case, no addresses, file names, mark-up or stray characters.

    The rules are applied twice, as in training; a third time could still change the text. The result may be empty.
    """
    text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate (a broken command line) fits no encoder
    return _one_pass(_one_pass(text))


def _one_pass(text: str) -> str:
    import ftfy  # here: it reads its character tables on import

    text = unquote_plus(text).strip().lower()
    text = _apply(_ADDRESSES, text)
    text = _strip_html(text)
    text = _apply(_CHARACTERS, text)
    if len(_DASH_OR_UNDERSCORE.findall(text)) > _MOST_DASHES:
        text = _DASH_OR_UNDERSCORE.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    text = _apply(_WORDS, text)
    return _apply(_EDGES, text).strip()


def _apply(rules: Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _strip_html(text: str) -> str:
    from bs4 import BeautifulSoup
    from bs4.builder import ParserRejectedMarkup

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a caption that looks like a file name or an address is no mistake
        try:
            return BeautifulSoup(text, features="html.parser").text
        except ParserRejectedMarkup:  # "<![" and the like: it is not mark-up, so there is nothing to strip
            return text

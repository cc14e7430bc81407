"""Prompts of any content and length, from what is typed to what is encoded, noticed and kept on disk."""

import random
import re
import time

import pytest
import torch

from magi.text.embedding_cache import EmbeddingCache
from magi.text.encode import MOST_CHARACTERS, encode_prompts, prepare

ODD = {
    "a lone surrogate": "a cat \udcff \ud800 walks",
    "NUL": "a cat\0walks",
    "only NUL": "\0",
    "control characters": "a \x07\x1b[31mcat\x1b]0;title\x07 \x7f\x9b walks\r",
    "bidi": "a \u202ecat\u202c \u2066walks\u2069",
    "no characters": "\ufffe\uffff\ufdd0",
    "private": "\ue000 \U000f0000",
    "combining": "a" + "\u0301" * 3000,
    "joined": "\U0001f468\u200d\U0001f469\u200d\U0001f467" * 100,
    "line ends": "a\u2028cat\x85walks\x0b\x0c",
}


@pytest.mark.parametrize("clean", [True, False], ids=["clean", "raw"])
@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_any_character_is_encoded_kept_and_found_again(official, tmp_path, text, clean):
    notices: list[str] = []
    how = {"clean": clean, "cache": EmbeddingCache(tmp_path), "on_notice": notices.append}
    first, again = (encode_prompts([text], official, **how)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert len(list(tmp_path.glob("*.safetensors"))) == bool(len(first)), "kept once"
    assert notices[: len(notices) // 2] == notices[len(notices) // 2 :], "told both times"
    for notice in notices:
        assert notice.isprintable(), "it goes to terminals and browsers"
        assert len(notice) < 1000


def test_a_lone_surrogate_is_a_question_mark(official):
    for clean in (True, False):
        broken, mended = encode_prompts(["a\udcffb cat", "a?b cat"], official, clean=clean, on_notice=lambda _: None)
        assert torch.equal(broken, mended)


def test_a_book_is_cut_and_that_is_told(official):
    book = "the quick brown fox jumps over the lazy dog " * 25_000
    for clean in (True, False):
        notices: list[str] = []
        before = time.process_time()
        found = encode_prompts([book], official, clean=clean, on_notice=notices.append)[0]
        assert time.process_time() - before < 20
        assert len(found) == 800
        assert notices[0].startswith("The prompt has 1,100,000 characters; all after the first 8,000 is left out")
        assert re.fullmatch(r"The prompt has \d+ tokens; only the first 800 are used\.", notices[1])
        assert len(notices) == 2
        start = encode_prompts([book[:MOST_CHARACTERS]], official, clean=clean, on_notice=notices.append)[0]
        assert torch.equal(found, start)


def test_a_prompt_as_long_as_t5_takes_is_whole(official):
    notices: list[str] = []
    encode_prompts(["a cat walks " * 300], official, max_tokens=5000, on_notice=notices.append)
    assert notices == []


def test_what_is_cut_is_told_from_the_cache_too(official, tmp_path):
    notices: list[str] = []
    for _ in range(2):
        encode_prompts(
            ["a cat walks"], official, cache=EmbeddingCache(tmp_path), max_tokens=3, on_notice=notices.append
        )
    assert len(notices) == 2
    assert notices[0] == notices[1]
    assert "only the first 3 are used" in notices[0]


def test_a_notice_of_a_blank_prompt_is_short(official):
    notices: list[str] = []
    assert prepare("." * 7000, True, notices.append) == ""
    assert len(notices[0]) < 200


@pytest.mark.parametrize("seed", range(4))
def test_no_text_is_an_error(seed):
    """Pieces of what the rules look for, in any order."""
    pieces = [
        "<",
        ">",
        "</",
        "<!--",
        "<![",
        "<?",
        "&",
        "&#",
        "x41;",
        "9" * 40,
        ";",
        "%",
        "%e2%82",
        "+",
        "@",
        "#",
        "\\n",
        " ",
    ]
    pieces += [
        '"',
        "'",
        ".",
        ".com",
        ".png",
        "http://",
        "www:",
        "-",
        "_",
        "a",
        "Ã",
        "â€",
        "猫",
        "\0",
        "\x1b",
        "\ud83d",
        "=",
        "\n",
    ]
    chance = random.Random(seed)
    for _ in range(150):
        text = "".join(chance.choices(pieces, k=chance.choice((3, 30, 300))))
        cleaned = prepare(text, True, lambda _: None)
        cleaned.encode("utf-8")
        assert len(cleaned) <= 3 * MOST_CHARACTERS

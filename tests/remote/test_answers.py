"""What of a server's answer counts, and what of it is shown, whatever is in it."""

import math
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest

from magi.remote.address import DEFAULT, BaseUrl
from magi.remote.answers import Task, error_of, failure, refusal
from magi.remote.key import ApiKey
from magi.remote.polling import Limits
from magi.remote.shown import shown
from magi.remote.transport import Transport, content_length, retry_after
from tests.support.remote_service import KEY

OURS = BaseUrl(DEFAULT)


def nested(depth: int) -> list:
    """A list in a list in a list."""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def task_of(**data: object) -> Task:
    transport = Transport(OURS, ApiKey(KEY), (1, 1))
    return Task.of("x", data, transport.may_fetch, transport.redact)


def test_words_of_the_wrong_type_do_not_count():
    task = task_of(status=5, outputs=7, has_nsfw_contents="yes", code=True, error={"message": "m"})
    assert (task.status, task.outputs, task.flagged, task.code, task.error) == ("", (), False, None, "m")


@pytest.mark.parametrize(
    "value", [None, True, 5, -1.5, math.nan, math.inf, 10**400, "\ud800", [], {}, [[]], {"a": None}, nested(500)]
)
def test_any_value_at_any_place(value):
    """Nothing of it is a traceback, and nothing unseen is shown."""
    for name in ("status", "outputs", "has_nsfw_contents", "code", "error"):
        for wrapped in (value, [value], {"message": value}):
            task = task_of(**{name: wrapped})
            assert task.outputs == ()
            assert str(failure(task)).isprintable()
            text, code = error_of({"data": {name: wrapped}, "message": wrapped})
            assert refusal(400, text[:500], code=code)


def test_other_forms_of_the_same_words():
    task = task_of(status=" Completed ", outputs="https://a.b/v.mp4", code="1400")
    assert (task.status, task.outputs, task.code) == ("completed", ("https://a.b/v.mp4",), 1400)


def test_an_address_with_the_key_in_it_is_not_handed_on():
    task = task_of(status="completed", outputs=[f"https://a.b/v.mp4?key={KEY}", f"https://a.b/{KEY}"])
    assert (task.outputs, task.refused_outputs) == ((), True)


def test_how_long_to_wait():
    limits = Limits(retry_first=1.0, retry_most=30.0)
    assert [limits.before_retry(n, None) for n in (1, 2, 3, 10)] == [1, 2, 4, 30]
    assert limits.before_retry(1, 17.0) == 17
    interval, waits = limits.poll_first, []
    for _ in range(10):
        waits.append(interval)
        interval = limits.next_poll(interval)
    assert waits[0] == 2
    assert waits == sorted(waits)
    assert waits[-1] == 10


def test_retry_after():
    in_a_minute = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=60))
    assert 55 < retry_after(in_a_minute) <= 60
    assert retry_after("17") == 17
    assert retry_after("100000") == 120
    assert retry_after("Thu, 01 Jan 1970 00:00:00 GMT") == 0
    assert retry_after("9" * 5000) == 120
    for text in (
        None,
        "",
        "soon",
        "-5",
        "nan",
        "\u00b2",
        " ",
        "0 -",
        "9" * 5000 + "x",
        f"Thu, {'9' * 5000} Jan 1970 00:00:00 GMT",
    ):
        assert retry_after(text) is None


def test_the_length_that_is_announced():
    def length(value: str, **more: str) -> int:
        return content_length({"Content-Length": value} | more)

    assert [length(text) for text in ("0", "7", " 7 ", "0007", "", "-7", "7, 7", "1e3", "\u00b2", "0x7")] == [
        0,
        7,
        7,
        7,
    ] + [0] * 6
    assert length("9" * 5000) > 1 << 30, "far too much, and no error of Python's"
    assert length("0" * 5000 + "7") == 7
    assert length("7", **{"Content-Encoding": "gzip"}) == 0


# -- what is shown -----------------------------------------------------------------------------------------------------

SAID = {
    "\x1b[31mbad\n\r line": "bad line",
    "\x1b]0;a title\x07bad": "bad",
    "\x1b]8;;https://evil.example\x1b\\bad\x1b]8;;\x1b\\": "bad",
    "\x9b2Jbad\x1bc": "bad",
    "\x1b]bad": "bad",  # which never ends
    "\x00b\x07a\x08d\x7f": "bad",
    "b\u202ea\u2066d\u200b\ufeff": "bad",
    "b\ud800a\udfffd": "bad",
    "very\u2028bad\u00a0\t": "very bad",
    "<img src=x onerror=alert(1)>": "‹img src=x onerror=alert(1)›",
    "fps must be < 30": "fps must be ‹ 30",
    "图片太大，请换一张": "图片太大，请换一张",
    f"bad key {KEY}!": "bad key ***!",
    f"bad key {KEY.upper()}!": "bad key ***!",
    f"bad key {KEY[:9]}\n{KEY[9:]}!": "bad key ***!",
    f"bad key {KEY[:9]}\u200b{KEY[9:]}!": "bad key ***!",
    f"bad key {KEY[:9]}\x1b[1m{KEY[9:]}!": "bad key ***!",
    "word " * 1000: ("word " * 100)[:499] + "…",
    "x" * 490 + KEY: "x" * 490 + "***",
    " " * 9_990 + KEY: "***",
}


@pytest.mark.parametrize("text", SAID)
def test_what_a_server_says_is_fit_to_be_shown(text):
    assert shown(text, ApiKey(KEY)) == SAID[text]


def test_a_key_as_it_stands_in_an_address():
    assert shown("https://a.b/?key=wsk%2Ba%2fb%3D%3D&c", ApiKey("wsk+a/b==")) == "https://a.b/?key=***&c"


@pytest.mark.parametrize("text", ["\x1b", "\x1b]", "\x1b[", "\x1b[0", "<", "\u202e", KEY[:-1], KEY[0] + " "])
def test_a_megabyte_of_it_is_no_work(text):
    began = time.monotonic()
    assert len(shown(text * ((1 << 20) // len(text)), ApiKey(KEY))) <= 500
    assert time.monotonic() - began < 2

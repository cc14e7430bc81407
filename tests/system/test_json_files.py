import json

import pytest

from magi.system.json_files import parse_json, read_json
from magi.system.printable import printable

TEXT = json.dumps({"text": "\u00e4\u00f6 \U0001f600", "n": [1, 2.5, None]}, ensure_ascii=False, indent=1)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_encodings_that_editors_save_in(encoding, tmp_path):
    (tmp_path / "x.json").write_text(TEXT, encoding=encoding)
    assert read_json(tmp_path / "x.json") == json.loads(TEXT)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b'{"a": "b', "it is cut off"),
        (b'{"a": [1, 2', "it is cut off"),
        (b'{"a": 1,}', "it is no JSON: .* in line 1, column"),
        ('{"a": "\u00e4"}'.encode("latin-1"), "another encoding than UTF-8"),
        (b'{"a": 1, "b": 2, "a": 3}', "the name 'a' stands in it twice"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "Infinity is no number"),
        (b'{"a": 1e999}', "1e999 is no number"),
        (b"[" * 100_000, "nested too deeply"),
        (b"<html>", "it is a web page"),
        (b"PK\x03\x04" + bytes(100), "it is a zip archive"),
    ],
)
def test_what_cannot_be_read_says_why(content, said, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_json(tmp_path / "x.json")


def test_a_file_of_gigabytes_is_not_read(tmp_path):
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(ValueError, match="8,589,934,592 bytes"):
        read_json(tmp_path / "x.json")


def test_deep_values_that_are_no_mistake_are_read():
    assert parse_json(b"[" * 50 + b"]" * 50)


def test_texts_are_made_fit_to_be_shown():
    assert printable("videodit_blocks.layers.0") == "videodit_blocks.layers.0"
    assert printable("\u00e4 \u6f22 \U0001f600") == "\u00e4 \u6f22 \U0001f600"
    assert printable("a\x1b[31m\nb\u202e\ud800") == r"a\x1b[31m\nb\u202e\ud800"
    assert len(printable("x" * 10**6)) < 200
    assert printable("begin" + "x" * 1000 + "end").startswith("begin")
    assert printable("begin" + "x" * 1000 + "end").endswith("end")

"""The key in places where nobody expects it, and its file on drives and accounts that are not as usual."""

import errno
import os
from pathlib import Path

import pytest

from magi.errors import MagiError
from magi.remote.address import DEFAULT, BaseUrl
from magi.remote.fake_server import Answer
from magi.remote.key import find_key, refuse_key_in, save_key
from tests.support.remote_service import KEY

OURS = BaseUrl(DEFAULT)
OTHER = "wsk_test_the-second-of-two-keys"


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    """A key in a file alone."""
    for name in ("WAVESPEED_API_KEY", "WAVESPEED_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    found = tmp_path / "key.txt"
    found.write_text(f"{KEY}\n")
    return found


def test_a_key_in_a_text_that_is_saved(file, monkeypatch):
    refuse_key_in(file, "A cat", DEFAULT)
    with pytest.raises(MagiError, match="in a field that is saved") as found:
        refuse_key_in(file, "A cat", f"https://{KEY}")
    assert KEY not in str(found.value)
    monkeypatch.setenv("WAVESPEED_API_KEY", OTHER)
    with pytest.raises(MagiError, match="in a field that is saved"):
        refuse_key_in(file, OTHER)
    refuse_key_in(file.with_name("none"), "A cat")


def test_a_second_line_that_is_no_address_is_not_shown(file):
    file.write_text(f"{KEY}\n{OTHER}\n")
    with pytest.raises(MagiError, match="not WaveSpeed") as found:
        find_key(file, BaseUrl("https://gateway.example"))
    assert OTHER not in str(found.value)


@pytest.mark.parametrize("text", ["ftp://me:secret@a.b", "https://me:secret@a.b:port", "me:secret@a.b"])
def test_a_password_in_what_is_no_address_is_not_shown(text):
    with pytest.raises(MagiError, match="no address") as found:
        BaseUrl(text)
    assert "secret" not in str(found.value)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_a_file_whose_permissions_cannot_be_changed(file, monkeypatch):
    """Somebody else's, on a drive for reading, or on one that knows no permissions."""

    def refused(*args, **options) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    file.chmod(0o644)
    monkeypatch.setattr(Path, "chmod", refused)
    assert find_key(file, OURS).header == f"Bearer {KEY}"


def test_a_full_disk_does_not_cost_the_key_that_there_is(file, monkeypatch):
    def full(*args, **options) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MagiError, match="No space left"):
        save_key(file, OTHER)
    assert file.read_text() == f"{KEY}\n"
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("cut", range(3, len(KEY), 5))
def test_a_key_at_the_edge_of_what_is_shown(service, cut):
    """A part of a key is not the key, and yet nobody's business."""
    page = b"." * (80 - cut) + KEY.encode() + b"..."
    service.server.script["poll"].extend([Answer(200, page)] * 4)
    text = service.fails("not what was expected")
    assert KEY[:cut] not in text

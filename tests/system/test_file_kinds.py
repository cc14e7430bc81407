"""Files that are not what they were taken for are told by their first bytes, whatever their names."""

import gzip
import io
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from magi.checkpoint.reader import Checkpoint
from magi.config import MagiConfig
from magi.errors import MagiError
from magi.sampling.special_tokens import SpecialTokens
from magi.system.file_kinds import file_kind


def made(save, *args, **options) -> bytes:
    out = io.BytesIO()
    save(out, *args, **options)
    return out.getvalue()


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.safetensors"))
    return out.getvalue()


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("model.safetensors", b"x")
    return out.getvalue()


def torch_file(**options) -> bytes:
    return made(lambda out: torch.save({"a": torch.zeros(3)}, out, **options))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 8904310896\n"
KINDS = {
    "torch": (torch_file(), "a torch file"),
    "old torch": (torch_file(_use_new_zipfile_serialization=False), "a pickle"),
    "pickle": (pickle.dumps({"a": 1}), "a pickle"),
    "npz": (made(np.savez, caption_token=np.zeros((1, 8))), "a NumPy archive.*Give it as the special tokens"),
    "npy": (made(np.save, np.zeros(3)), "a NumPy array"),
    "pointer": (LFS, "git-lfs.*Run `git lfs pull`"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(50), "GGUF"),
    "page": (b"\n<!DOCTYPE html>\n<html><head><title>Log in</title>", "web page.*Download the file itself"),
    "page with a mark": (b"\xef\xbb\xbf<html>", "web page"),
    "server's error": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "error of a server"),
    "error as JSON": (b'{"error": "Repository not found"}', "JSON text"),
    "text": ("Zugriff verweigert \u00e4\n".encode(), "a text that begins 'Zugriff verweigert \u00e4'"),
    "text with escape codes": (b"\x1b[2Jgone", None),
    "gzip": (gzip.compress(b"x" * 1000), "gzip archive. Unpack it"),
    "tar": (tar(), "tar archive. Unpack it"),
    "zip": (zipped(), "zip archive. Unpack it"),
    "picture": (made(Image.new("RGB", (9, 9)).save, "png"), "picture"),
    "zeros": (bytes(4096), "broke off after room"),
    "noise": (bytes(range(128, 256)) * 4, None),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [1, 0.6])
def test_what_stands_where_weights_are_wanted(kind, part, tmp_path):
    """Also of what was cut off the beginning tells."""
    content, said = KINDS[kind]
    content = content if part == 1 else content[: max(64, int(part * len(content)))]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(MagiError, match=said or "not a whole safetensors file") as caught:
        Checkpoint(file)
    assert "model.safetensors" in str(caught.value)
    assert said is None or "truncated" not in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", ["pointer", "page", "torch", "gzip", "text"])
def test_what_stands_where_other_files_are_wanted(kind, tmp_path):
    content, said = KINDS[kind]
    said = said.split(".*")[0].split(". ")[0]
    (tmp_path / "special_tokens.npz").write_bytes(content)
    with pytest.raises(MagiError, match=rf"special_tokens\.npz.*{said}.*download special_tokens"):
        SpecialTokens.load(tmp_path / "special_tokens.npz")
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(MagiError, match=rf"config\.json.*unreadable: it is .*{said}"):
        MagiConfig.from_json(tmp_path / "config.json")


def test_a_letter_that_the_read_part_cuts_in_two_is_still_text(tmp_path):
    (tmp_path / "x").write_text("a" + "\u00e4" * 1000, encoding="utf-8")
    assert "a text that begins" in file_kind(tmp_path / "x").name

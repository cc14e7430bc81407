import os
import warnings
from pathlib import Path

import pytest
import torch

from magi.text.embedding_cache import EmbeddingCache, embedding_key

KEY = embedding_key("a cat", "t5", max_tokens=800)


def embeds(tokens=5, width=8, seed=0):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def files(folder):
    return sorted(p.name for p in folder.iterdir())


def test_key_changes_with_everything_that_changes_the_embedding():
    keys = {
        KEY,
        embedding_key("a dog", "t5", max_tokens=800),
        embedding_key("a cat", "t6", max_tokens=800),
        embedding_key("a cat", "t5", max_tokens=400),
        embedding_key("a cat", "t5"),
    }
    assert len(keys) == 5
    assert embedding_key("a cat", "t5", max_tokens=800) == KEY


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact(tmp_path, dtype):
    cache, tensor = EmbeddingCache(tmp_path / "new" / "folder"), embeds().to(dtype)
    assert cache.get(KEY) is None
    cache.put(KEY, tensor.t().contiguous().t())  # any strides
    found = EmbeddingCache(tmp_path / "new" / "folder").get(KEY)
    assert found.dtype == torch.float32
    assert torch.equal(found, tensor.float())
    assert files(tmp_path / "new" / "folder") == [f"{KEY}.safetensors"]


def _cut(data):
    return data[: len(data) // 2]


def _flip_last_byte(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def _empty(_):
    return b""


def _text(_):
    return b"<html>404</html>"


@pytest.mark.parametrize("damage", [_cut, _flip_last_byte, _empty, _text])
def test_damaged_file_is_a_miss_and_goes(tmp_path, damage):
    cache = EmbeddingCache(tmp_path)
    cache.put(KEY, embeds())
    file = tmp_path / f"{KEY}.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert cache.get(KEY) is None
    assert not file.exists()
    cache.put(KEY, embeds())
    assert torch.equal(cache.get(KEY), embeds())


def test_the_longest_unused_go_first(tmp_path):
    cache = EmbeddingCache(tmp_path)
    keys = [embedding_key(str(i), "t5") for i in range(4)]
    for age, key in enumerate(reversed(keys[:3])):
        cache.put(key, embeds())
        os.utime(tmp_path / f"{key}.safetensors", (0, 1000 - age))
    size = (tmp_path / f"{keys[0]}.safetensors").stat().st_size
    assert cache.get(keys[0]) is not None  # used now, though put long ago
    EmbeddingCache(tmp_path, limit_bytes=2 * size).put(keys[3], embeds())
    assert [cache.get(key) is not None for key in keys] == [True, False, False, True]


def test_abandoned_temporary_files_are_swept(tmp_path):
    old, new = tmp_path / "x.safetensors.1.tmp", tmp_path / "y.safetensors.2.tmp"
    old.write_bytes(b"1")
    new.write_bytes(b"2")
    os.utime(old, (0, 0))
    EmbeddingCache(tmp_path).put(KEY, embeds())
    assert files(tmp_path) == sorted([f"{KEY}.safetensors", new.name])


def test_folder_that_cannot_be_made_warns_once_and_work_continues(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = EmbeddingCache(tmp_path / "file")
    with pytest.warns(UserWarning, match=r"file.*Work continues"):
        cache.put(KEY, embeds())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.put(KEY, embeds())
        assert cache.get(KEY) is None


def test_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    cache = EmbeddingCache(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left"):
        cache.put(KEY, embeds())
    assert files(tmp_path) == []


def test_interrupt_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    cache = EmbeddingCache(tmp_path)
    cache.put(KEY, embeds(seed=0))

    def interrupt(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.put(KEY, embeds(seed=1))
    assert files(tmp_path) == [f"{KEY}.safetensors"]
    assert torch.equal(cache.get(KEY), embeds(seed=0))


def test_a_cache_that_can_only_be_read_still_hits(tmp_path, monkeypatch):
    cache = EmbeddingCache(tmp_path)
    cache.put(KEY, embeds())
    cache.remember("here", "t5")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(Path, "replace", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(cache.get(KEY), embeds())
        cache.remember("here", "t5")
    with pytest.warns(UserWarning, match="Permission denied"):
        cache.remember("here", "another")


def test_the_warning_ends_with_the_remedy_of_the_place(tmp_path):
    (tmp_path / "file").touch()
    for remedy, told in (("Choose another with --cache.", r"--cache\.$"), ("", r"Make the folder writable .*\.$")):
        with pytest.warns(UserWarning, match=told):
            EmbeddingCache(tmp_path / "file" / "text", remedy=remedy).put(KEY, embeds())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_not_handed_out(tmp_path, value):
    cache = EmbeddingCache(tmp_path)
    cache.put(KEY, embeds().index_fill(0, torch.tensor(2), value))  # as an earlier version kept them
    assert cache.get(KEY) is None
    assert files(tmp_path) == []


def test_encoder_notes(tmp_path):
    cache = EmbeddingCache(tmp_path)
    assert cache.recall("/models/t5") is None
    cache.remember("/models/t5", "one")
    cache.remember("/models/t5", "two")
    assert EmbeddingCache(tmp_path).recall("/models/t5") == "two"
    assert cache.recall("/models/other") is None

import hashlib
import io
import pickle
import zipfile
from contextlib import suppress

import numpy as np
import pytest
import torch

from magi.errors import MagiError
from magi.sampling import special_tokens
from magi.sampling.captions import Caption, caption_per_chunk, null_caption
from magi.sampling.special_tokens import STYLES, SpecialTokens, find_special_tokens

# Rows of other_tokens in the published file
TRANSITION, HQ, STATIC, DYNAMIC, BORDERNESS, MODEL_3D, ANIME_2D = 0, 1, 2, 3, 4, 15, 16


def duration(chunks_after: int) -> int:
    return 7 + chunks_after


@pytest.fixture
def numbered(tiny_config) -> SpecialTokens:
    """Tokens that tell which one they are: row i of other_tokens holds i."""
    width = tiny_config().model.caption_channels
    rows = torch.arange(100.0)[:, None].expand(100, width)
    return SpecialTokens(torch.full((1, width), -1.0), torch.full((1, width), -2.0), rows)


def arrays(width=8, rows=100, dtype=np.float64) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0).standard_normal
    return {
        "caption_token": draw((1, width)).astype(dtype),
        "logo_token": draw((1, width)).astype(dtype),
        "other_tokens": draw((rows, width)).astype(dtype),
    }


# -- their order -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("styles", "after", "rows"),
    [
        ((), None, []),
        (("hq",), None, [HQ]),
        (("hq",), 0, [duration(0), HQ]),
        (("hq",), 6, [duration(6), HQ]),
        ((), 7, [duration(7)]),
        ((), 8, [duration(7)]),
        ((), 1000, [duration(7)]),
        (("static", "hq"), 2, [duration(2), HQ, STATIC]),
        (("hq", "static"), 2, [duration(2), HQ, STATIC]),
        (("hq", "2d_anime"), None, [ANIME_2D, HQ]),
        (tuple(reversed(STYLES)), 1, [duration(1), ANIME_2D, MODEL_3D, HQ, BORDERNESS, DYNAMIC, STATIC]),
    ],
)
def test_the_last_prepended_stands_first(styles, after, rows, numbered):
    got = numbered.prefix(styles, after)
    assert got[:, 0].tolist() == rows
    assert got.shape == (len(rows), numbered.width)


def test_negatives_and_their_order(numbered):
    assert numbered.negative()[:, 0].tolist() == [BORDERNESS, TRANSITION, -2, -1]  # ... logo, caption


@pytest.mark.parametrize("name", ["HQ", "cartoon", ""])
def test_unknown_styles(name, numbered):
    with pytest.raises(
        MagiError, match=f"no style token '{name}'.*hq, static, dynamic, borderness, 3d_model, 2d_anime"
    ):
        numbered.prefix(("hq", name))


# -- captions --------------------------------------------------------------------------------------------------------


def test_each_chunk_is_told_how_many_follow(numbered, tiny_config):
    caption = Caption(torch.full((2, 12), 0.5))
    made = caption_per_chunk(caption, 10, tiny_config().model, numbered)
    assert [c[:, 0].tolist() for c in made] == [[duration(min(9 - i, 7)), HQ, 0.5, 0.5] for i in range(10)]
    assert made[0] is made[2], "chunks that look alike share one tensor"
    plain = caption_per_chunk(caption, 10, tiny_config().model, numbered, durations=False)
    assert [c[:, 0].tolist() for c in plain] == [[HQ, 0.5, 0.5]] * 10
    assert len({id(c) for c in plain}) == 1


def test_a_full_caption_loses_its_end_to_the_tokens(numbered, tiny_config):
    long = Caption(torch.arange(60.0)[:, None].expand(60, 12) + 1000)
    (made,) = caption_per_chunk(long, 1, tiny_config().model, numbered)
    assert made[:, 0].tolist() == [duration(0), HQ, *range(1000, 1058)]


def test_an_empty_caption_takes_no_tokens(numbered, tiny_config):
    first, second = Caption(torch.zeros(0, 12)), Caption(torch.ones(1, 12))
    made = caption_per_chunk([first, second], 3, tiny_config().model, numbered)
    assert [len(c) for c in made] == [0, 3, 3]


@pytest.mark.parametrize("negative", [False, True])
def test_the_null_caption_is_fifty_tokens_whatever_stands_in_front(negative, numbered, randn):
    embedding = randn(60, 12)
    got = null_caption(embedding, numbered, negative)
    assert got.shape == (50, 12)
    front = numbered.negative() if negative else embedding[:0]
    assert torch.equal(got, torch.cat([front, embedding])[:50])


# -- the file --------------------------------------------------------------------------------------------------------


def test_vectors_are_float16_values(tmp_path):
    given = arrays()
    np.savez(tmp_path / "tokens.npz", **given)
    made = SpecialTokens.load(tmp_path / "tokens.npz")
    for tensor, key in ((made.caption, "caption_token"), (made.logo, "logo_token"), (made.other, "other_tokens")):
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, torch.from_numpy(given[key]).half().float())
    assert made.width == 8
    assert SpecialTokens.load(str(tmp_path / "tokens.npz")).width == 8


def test_no_file(tmp_path):
    for path in (tmp_path / "nowhere.npz", tmp_path):
        with pytest.raises(MagiError, match=r"no special-token file .*download special_tokens"):
            SpecialTokens.load(path)


def npy_header(shape: tuple[int, ...]) -> bytes:
    """An array's file that ends after its header."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return out.getvalue()


def zip_of(**changed: bytes) -> bytes:
    """An archive with some arrays' files in the place of whole ones."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, array in arrays().items():
            whole = io.BytesIO()
            np.save(whole, array)
            archive.writestr(f"{name}.npy", changed.get(name, whole.getvalue()))
    return out.getvalue()


def wrong_files() -> dict[str, bytes]:
    def saved(save, *args, **kwargs) -> bytes:
        out = io.BytesIO()
        save(out, *args, **kwargs)
        return out.getvalue()

    whole = saved(np.savez_compressed, **arrays())
    body = 200  # within the compressed numbers
    return {
        "empty": b"",
        "text": b"hello",
        "truncated": whole[: len(whole) // 2],
        "damaged": whole[:body] + bytes(255 - b for b in whole[body : body + 50]) + whole[body + 50 :],
        "pickle": pickle.dumps({"caption_token": 1}),
        "one array": saved(np.save, np.zeros((1, 8))),
        "objects": saved(np.savez, **arrays() | {"logo_token": np.array([[{}]], dtype=object)}),
        "words": saved(np.savez, **arrays() | {"logo_token": np.array([["a"] * 8])}),
        "another key": saved(np.savez, embeddings=np.zeros(3)),
        "few rows": saved(np.savez, **arrays(rows=16)),
        "unequal widths": saved(np.savez, **arrays() | {"logo_token": np.zeros((1, 9))}),
        "infinite": saved(np.savez, **arrays() | {"logo_token": np.full((1, 8), 1e30)}),
        "NaN": saved(np.savez, **arrays() | {"logo_token": np.full((1, 8), np.nan)}),
        "integers": saved(np.savez, **arrays() | {"logo_token": np.ones((1, 8), np.int8)}),
        "complex": saved(np.savez, **arrays() | {"logo_token": np.ones((1, 8), complex)}),
        "more than it has": zip_of(other_tokens=npy_header((10**12, 8))),
        "a number of axes": zip_of(other_tokens=npy_header((1,) * 3000)),
        "no header": zip_of(other_tokens=b"\x93NUMPY\x01\x00"),
        "unknown version": zip_of(other_tokens=b"\x93NUMPY\x09\x00" + bytes(100)),
        "page": b"<!DOCTYPE html><html>",
        "no rows": saved(np.savez, **arrays() | {"logo_token": np.zeros(8)}),
    }


@pytest.mark.parametrize("kind", wrong_files())
def test_wrong_files(kind, tmp_path):
    file = tmp_path / "special_tokens.npz"
    file.write_bytes(wrong_files()[kind])
    with pytest.raises(MagiError, match=r"special_tokens\.npz' is not the special-token file.*download special_tokens"):
        SpecialTokens.load(file)


def test_an_archive_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path, monkeypatch):
    file = tmp_path / "special_tokens.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("caption_token.npy", "w") as member:
        for _ in range(80):
            member.write(bytes(1 << 20))
    assert file.stat().st_size < 200_000
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *args: pytest.fail("it is unpacked"))
    with pytest.raises(MagiError, match="its caption_token takes 83,886,080 bytes"):
        SpecialTokens.load(file)


def test_hidden_files_and_dead_links_are_not_looked_into(tmp_path):
    (tmp_path / "._special_tokens.npz").write_bytes(bytes(special_tokens.SIZE))
    with suppress(OSError):  # not every user of Windows may
        (tmp_path / "gone.npz").symlink_to(tmp_path / "nowhere")
    assert find_special_tokens([tmp_path]) is None


def test_a_full_size_file_that_is_not_the_published_one_warns(tmp_path):
    np.savez(tmp_path / "tokens.npz", **arrays(width=4096, rows=17, dtype=np.float16))
    with pytest.warns(UserWarning, match="not the published"):
        assert SpecialTokens.load(tmp_path / "tokens.npz").width == 4096


def test_the_published_file_is_known_by_its_hash(tmp_path, monkeypatch):
    folders = [tmp_path / name for name in ("a", "b", "nowhere")]
    for folder in folders[:2]:
        folder.mkdir()
    np.savez(folders[0] / "special_tokens.npz", **arrays(rows=20))
    assert find_special_tokens(folders) is None
    right = folders[1] / "renamed.npz"
    np.savez(right, **arrays(width=16), filler=np.zeros(0, np.uint8))
    np.savez(right, **arrays(width=16), filler=np.zeros(3_343_124 - right.stat().st_size, np.uint8))
    assert find_special_tokens(folders) is None
    monkeypatch.setattr(special_tokens, "SHA256", hashlib.sha256(right.read_bytes()).hexdigest())
    found = find_special_tokens(folders)
    assert found == right
    assert SpecialTokens.load(found).width == 16
    assert special_tokens.is_official(right)
    assert not special_tokens.is_official(folders[0] / "special_tokens.npz")

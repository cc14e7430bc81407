import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from magi.errors import MagiError
from magi.media.image import to_rgb
from magi.media.video_reader import probe, read_image

RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 128, 0)


def two_halves(mode: str = "RGB") -> Image.Image:
    """A picture 20 wide and 10 high: left half red, right half blue."""
    image = Image.new("RGB", (20, 10), RED)
    image.paste(BLUE, (10, 0, 20, 10))
    return image.convert(mode)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.webp", "a.gif", "a.tif", "ünï 100%d.png"])
def test_common_formats(tmp_path: Path, name: str):
    two_halves().save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    frames = read_image(str(tmp_path / name))
    assert frames.shape == (1, 10, 20, 3)
    assert frames[0, 5, 2].tolist() == list(RED)
    assert frames[0, 5, 17].tolist() == list(BLUE)


@pytest.mark.parametrize(
    ("orientation", "shape", "red_at"),
    [
        (1, (10, 20), (5, 2)),
        (2, (10, 20), (5, 17)),
        (3, (10, 20), (5, 17)),
        (6, (20, 10), (2, 5)),
        (8, (20, 10), (17, 5)),
    ],
)
def test_exif_orientation(tmp_path: Path, orientation: int, shape: tuple[int, int], red_at: tuple[int, int]):
    exif = Image.Exif()
    exif[0x0112] = orientation
    two_halves().save(tmp_path / "a.jpg", exif=exif, quality=95)
    frames = read_image(tmp_path / "a.jpg")
    assert tuple(frames.shape[1:3]) == shape
    assert frames[0][red_at][0] > 240
    info = probe(tmp_path / "a.jpg")
    assert (info.kind, info.height, info.width) == ("image", *shape)
    assert (info.fps, info.frames, info.seconds) == (None, None, None)


def test_transparency_becomes_white(tmp_path: Path):
    image = two_halves("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 5, 10))
    image.paste((0, 0, 0, 128), (15, 0, 20, 10))
    image.save(tmp_path / "a.png")
    row = read_image(tmp_path / "a.png")[0, 5]
    assert row[2].tolist() == [255, 255, 255]
    assert row[7].tolist() == list(RED)
    assert row[17].tolist() == [127, 127, 127]


def test_transparent_palette_and_colour_key(tmp_path: Path):
    two_halves("P").save(tmp_path / "palette.png", transparency=two_halves("P").getpixel((0, 0)))
    two_halves().save(tmp_path / "key.png", transparency=RED)
    for name in ("palette.png", "key.png"):
        row = read_image(tmp_path / name)[0, 5]
        assert row[2].tolist() == [255, 255, 255]
        assert row[17].tolist() == list(BLUE)


def test_grey_of_8_and_16_bits_and_float(tmp_path: Path):
    Image.new("L", (4, 4), 77).save(tmp_path / "8.png")
    Image.fromarray(np.full((4, 4), 77 * 257, np.uint16)).save(tmp_path / "16.png")
    Image.fromarray(np.full((4, 4), 77 / 255, np.float32)).save(tmp_path / "float.tif")
    Image.new("1", (4, 4), 1).save(tmp_path / "1.png")
    for name, level in (("8.png", 77), ("16.png", 77), ("float.tif", 77), ("1.png", 255)):
        assert (read_image(tmp_path / name) == level).all(), name


RAMP = np.linspace(0, 1, 64).reshape(8, 8)
LEVELS = np.rint(255 * RAMP)


def as_tiff(folder: Path, values: np.ndarray, **options: object) -> np.ndarray:
    """What is read of a TIFF of these numbers, uint8 (H, W)."""
    Image.fromarray(values).save(folder / "a.tif", **options)
    return read_image(folder / "a.tif")[0, ..., 0].numpy().astype(int)


@pytest.mark.parametrize("most", [255, 65535, 2**31 - 1])
def test_whole_numbers_of_32_bits(tmp_path: Path, most: int):
    assert abs(as_tiff(tmp_path, (RAMP * most).astype(np.int32)) - LEVELS).max() <= 1


@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}])
@pytest.mark.parametrize("kind", ["<u2", ">u2"])
def test_whole_numbers_of_16_bits(tmp_path: Path, kind: str, options: dict):
    assert abs(as_tiff(tmp_path, (RAMP * 65535).astype(kind), **options) - LEVELS).max() <= 1
    dark = as_tiff(tmp_path, np.full((8, 8), 200, kind), **options)
    assert (dark == 1).all(), "sixteen bits that are nearly black stay so"


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I;16N"])
def test_every_16_bit_mode_of_pil(mode: str):
    try:
        image = Image.frombytes(mode, (8, 8), (RAMP * 65535).astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    except ValueError:
        pytest.skip(f"this PIL has no {mode}")
    assert abs(to_rgb(image, Path("a.tif"))[..., 0].numpy() - LEVELS).max() <= 1


def test_white_is_zero_in_16_bits(tmp_path: Path):
    assert abs(as_tiff(tmp_path, (RAMP * 65535).astype(np.uint16), tiffinfo={262: 0}) - (255 - LEVELS)).max() <= 1


@pytest.mark.parametrize("most", [1, 255, 65535])
def test_the_range_of_floats_is_found(tmp_path: Path, most: int):
    assert abs(as_tiff(tmp_path, (RAMP * most).astype(np.float32)) - LEVELS).max() <= 1


@pytest.mark.parametrize("highlight", [1.0001, 1.5, 2, 255, 1e30, np.inf])
@pytest.mark.parametrize("picture", [RAMP, np.ones((8, 8)), np.zeros((8, 8))], ids=["ramp", "white", "black"])
def test_highlights_of_floats_are_clipped(tmp_path: Path, picture: np.ndarray, highlight: float):
    values = picture.astype(np.float32)
    values[:2, 0] = highlight, np.nan
    values[2, 0] = -0.5
    read = as_tiff(tmp_path, values)
    if picture.any():
        expected = np.rint(255 * picture)
        expected[:3, 0] = 255, 0, 0
        assert abs(read - expected).max() <= 1
    assert read[1:3, 0].tolist() == [0, 0]


def test_dark_floats_of_eight_bits_stay_dark(tmp_path: Path):
    values = np.zeros((8, 8), np.float32)
    values[0] = np.arange(8) * 3 + 0.5
    assert as_tiff(tmp_path, values).max() == 22


def png(depth: int, kind: int, row: bytes, transparent: bytes) -> bytes:
    """A PNG of eight equal rows of eight pixels with a transparent colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, depth, kind, 0, 0, 0)) + chunk(b"tRNS", transparent)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(8 * (b"\0" + row))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("depth", "kind", "row", "transparent", "shown"),
    [
        (1, 0, b"\x0f", (0,), 255),
        (2, 0, b"\x55\xaa", (1,), 170),
        (4, 0, b"\x55\x55\xaa\xaa", (5,), 170),
        (8, 0, bytes([5] * 4 + [9] * 4), (5,), 9),
        (16, 0, struct.pack(">8H", *[300] * 4, *[30_069] * 4), (300,), 117),
        (16, 0, struct.pack(">8H", *[0] * 4, *[1] * 4), (0,), 0),
        (8, 2, bytes([1, 2, 3] * 4 + [9] * 12), (1, 2, 3), 9),
        (16, 2, struct.pack(">24H", *[1000, 2000, 3000] * 4, *[257 * 9] * 12), (1000, 2000, 3000), 9),
    ],
)
def test_one_transparent_colour_in_every_depth(
    tmp_path: Path, depth: int, kind: int, row: bytes, transparent: tuple[int, ...], shown: int
):
    (tmp_path / "a.png").write_bytes(png(depth, kind, row, struct.pack(f">{len(transparent)}H", *transparent)))
    pixels = read_image(tmp_path / "a.png")[0, 3]
    assert (pixels[:4] == 255).all()
    assert (pixels[4:] == shown).all()


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBa"])
def test_modes_with_transparency(mode: str):
    image = two_halves("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 5, 10))
    for step in {"La": ("LA", "La"), "RGBa": ("RGBa",), "LA": ("LA",), "PA": ("PA",)}[mode]:
        image = image.convert(step)
    row = to_rgb(image, Path("a.tif"))[5]
    assert row[2].tolist() == [255, 255, 255]
    assert row[17, 0] < 60


def test_cmyk(tmp_path: Path):
    two_halves("CMYK").save(tmp_path / "a.jpg", quality=95)
    row = read_image(tmp_path / "a.jpg")[0, 5].int()
    assert row[2, 0] > 240
    assert row[2, 2] < 15
    assert row[17, 2] > 240
    assert row[17, 0] < 15


def test_colour_profile_is_applied(tmp_path: Path):
    """A profile that swaps red and blue shows whether anyone looks at it."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")
    unnamed = re.sub("sRGB".encode("utf-16-be"), "Test".encode("utf-16-be"), swapped).replace(b"sRGB", b"Test")
    two_halves().save(tmp_path / "a.png", icc_profile=unnamed)
    row = read_image(tmp_path / "a.png")[0, 5].int()
    assert row[2, 2] > 200 > 50 > row[2, 0]
    two_halves().save(tmp_path / "broken.png", icc_profile=b"not a profile")
    assert read_image(tmp_path / "broken.png")[0, 5, 2].tolist() == list(RED)
    two_halves().save(tmp_path / "srgb.png", icc_profile=profile)
    assert read_image(tmp_path / "srgb.png")[0, 5, 2].tolist() == list(RED)


def test_first_frame_of_an_animation(tmp_path: Path):
    Image.new("RGB", (8, 8), GREEN).save(
        tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (8, 8), BLUE)], duration=100
    )
    frames = read_image(tmp_path / "a.gif")
    assert frames.shape == (1, 8, 8, 3)
    assert frames[0, 4, 4].tolist() == list(GREEN)


def test_bad_files_get_one_clear_message(tmp_path: Path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello, I am not a picture")
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 50).save(buffer, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 50).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:1000])
    (tmp_path / "movie.mpg").write_bytes(b"\x00\x00\x01\xb3\x14\x00\xf0\x13" + bytes(100))
    (tmp_path / "print.eps").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    )
    for name, message in (
        ("absent.png", "There is no file"),
        ("empty.png", "is empty"),
        ("text.png", "is not a picture"),
        ("cut.jpg", "damaged.*truncated"),
        ("cut.png", "damaged"),
        ("movie.mpg", "is not a picture"),
        ("print.eps", "is not a picture"),
        (".", "is a folder"),
        ("empty.png/inside.png", "There is no file"),
    ):
        with pytest.raises(MagiError, match=message) as caught:
            read_image(tmp_path / name)
        assert Path(name).name in str(caught.value) or name == "."


def test_a_picture_too_large_to_be_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    two_halves().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(MagiError, match="too large"):
        read_image(tmp_path / "a.png")

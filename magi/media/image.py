"""Still pictures: the formats that people have of those that PIL reads, upright, in sRGB, as uint8 RGB."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from errno import EAGAIN
from io import BytesIO
from os import strerror
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import MagiError
from ..system.host_memory import free_host_memory
from ..system.paths import user_path
from .containers import reason_of
from .frames import check_pixels, over_white
from .grey import GreyRange, grey_range, is_deep_grey

# Formats whose further images are later moments; in others (TIFF, MPO, PSD ...) they are pages, views or layers.
_ANIMATED = {"GIF", "WEBP", "PNG", "AVIF"}

# PIL's names of what is read; HEIF and JXL where a plugin for them is loaded. Of the others some are videos, some are
# read by other programs (PostScript, metafiles), and some hold measurements.
_PICTURES = (
    *("AVIF", "BMP", "CUR", "DDS", "DIB", "GIF", "HEIF", "ICNS", "ICO", "JPEG", "JPEG2000", "JXL", "MPO", "PCX"),
    *("PNG", "PPM", "PSD", "QOI", "SGI", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM"),
)

_ORIENTATION = 0x0112  # of EXIF

# What a step of a PNG's own depth becomes in the eight bits that PIL makes of it, by PIL's name of that depth.
_STEPS = {"L;2": 85, "L;4": 17}

_STRIP = 1 << 20  # pixels that are converted at a time


def read_image(path: str | Path) -> torch.Tensor:
    """Reads a picture as uint8 (1, H, W, 3) RGB; of an animation the first frame.

    Turned upright by its EXIF orientation and converted to sRGB from an embedded colour profile; transparency is laid
    over white (see `over_white`); 16-bit grey is scaled to 8 bits.

    Raises:
        MagiError: there is no such file, it is not a picture, or it is damaged or far too large.
    """
    path = check_file(path)
    image = open_image(path)
    if image is None:
        raise MagiError(
            f"{str(path)!r} is not a picture that can be read. Give a PNG, JPEG or WebP file; "
            "if it is a video, use it as a video."
        )
    with image:
        return to_rgb(image, path)[None]


def check_file(path: str | Path) -> Path:
    """Returns the absolute path, ~ expanded. Raises MagiError unless it is a file that can be read and is not empty."""
    path = user_path(path).absolute()
    try:
        if path.is_dir():
            raise MagiError(f"{str(path)!r} is a folder. Give one image or video file.")
        if not path.is_file():
            raise MagiError(f"There is no file {str(path)!r}. Check the path.")
        with path.open("rb") as file:
            first = file.read(1)
            if first is None:  # a drive that says "later"
                raise BlockingIOError(EAGAIN, strerror(EAGAIN))
    except (OSError, ValueError) as error:
        raise MagiError(f"{str(path)!r} cannot be read ({error}). Check that you may open it.") from error
    if not first:
        raise MagiError(f"The file {str(path)!r} is empty. Copy or download it again.")
    return path


def open_image(path: Path) -> Image.Image | None:
    """Opens a picture lazily with PIL, for the caller to close; returns None where it is no picture that is read.

    Raises:
        MagiError: it is damaged, or too large to be decoded.
    """
    Image.init()
    formats = [name for name in Image.ID if name in _PICTURES]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `check_pixels` says what is too large
            image = Image.open(path, formats=formats)
    except UnidentifiedImageError:
        return None
    except Exception as error:  # a damaged header: PIL's readers raise whatever they stumble over
        raise _damaged(path, error) from error
    return image


def is_animation(image: Image.Image, path: Path) -> bool:
    """Returns whether the opened file holds several moments, to be read as a video. Raises MagiError for damage."""
    try:
        return image.format in _ANIMATED and bool(getattr(image, "is_animated", False))
    except Exception as error:  # as in open_image
        raise _damaged(path, error) from error


def count_frames(image: Image.Image, path: Path) -> int:
    """Returns how many moments an opened animation holds. Raises MagiError for damage."""
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception as error:  # as in open_image
        raise _damaged(path, error) from error


def to_rgb(image: Image.Image, path: Path) -> torch.Tensor:
    """Converts the current frame of an opened picture to uint8 (H, W, 3), as `read_image` does; errors name `path`."""
    _check_size(image, path)
    try:
        raw_mode = _raw_mode(image)
        image.load()
        grey = grey_range(image, raw_mode) if is_deep_grey(image.mode) else None
        convert = _converter(image, grey, _transparent_colour(image, raw_mode))
        if image.getexif().get(_ORIENTATION, 1) != 1:  # it would copy the picture in any case
            image = ImageOps.exif_transpose(image)
        out = torch.empty(image.height, image.width, 3, dtype=torch.uint8)
        rows = max(1, _STRIP // image.width)
        for top in range(0, image.height, rows):  # in strips: some steps take many times a picture's own memory
            strip = image.crop((0, top, image.width, min(top + rows, image.height)))
            out[top : top + rows] = torch.from_numpy(convert(strip))
        return out
    except Exception as error:  # as in open_image
        raise _damaged(path, error) from error


def _check_size(image: Image.Image, path: Path) -> None:
    """Raises MagiError, before it is decoded, for a picture that is larger than any or than memory."""
    check_pixels(image.height, image.width, str(path))
    needed, free = 8 * image.height * image.width, free_host_memory()  # as PIL holds it, and once more as RGB
    if free is not None and needed > free:
        raise MagiError(
            f"The picture {str(path)!r} of {image.width}x{image.height} takes {needed / 1e9:.1f} GB of memory when it is read, and "
            f"{free / 1e9:.1f} GB are free. Scale it down first, or close what takes memory."
        )


def _raw_mode(image: Image.Image) -> str:
    """Returns PIL's name of how the numbers lie in the file of a picture that is not loaded yet; "" where it has none."""
    tiles = getattr(image, "tile", None) or [()]
    arguments = tiles[0][3] if len(tiles[0]) > 3 else ""
    name = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return name if isinstance(name, str) else ""


def _transparent_colour(image: Image.Image, raw_mode: str) -> int | tuple[int, ...] | None:
    """Returns the one colour that is transparent, in a loaded picture's own numbers; None where there is none such."""
    colour = image.info.get("transparency")
    if isinstance(colour, int) and (image.mode in ("1", "L") or is_deep_grey(image.mode)):
        return colour * _STEPS.get(raw_mode, 1) if image.format == "PNG" else colour
    if isinstance(colour, tuple) and image.mode == "RGB" and len(colour) == 3:
        return tuple(part >> 8 for part in colour) if raw_mode.startswith("RGB;16") else colour
    return None


def _converter(
    image: Image.Image, grey: GreyRange | None, transparent: int | tuple[int, ...] | None
) -> Callable[[Image.Image], np.ndarray]:
    """Returns what converts a strip of a picture to uint8 (H, W, 3)."""
    profile = image.info.get("icc_profile")
    # A palette, or each pixel, says how transparent it is.
    with_alpha = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or (
        transparent is None and grey is None and "transparency" in image.info
    )

    def convert(strip: Image.Image) -> np.ndarray:
        if with_alpha:
            rgba = (strip.convert("LA") if strip.mode == "La" else strip).convert("RGBA")
            return _over_white(np.asarray(_srgb(rgba.convert("RGB"), profile)), np.asarray(rgba.getchannel("A")))
        values = np.asarray(strip)
        if grey is None:
            colours = np.array(_srgb(strip, profile))
        else:
            colours = np.repeat(grey.to_8_bits(values)[..., None], 3, axis=2)
        if transparent is None:
            return colours
        shown = (np.asarray(strip.convert("L")) if strip.mode == "1" else values) != np.asarray(transparent)
        return _over_white(colours, 255 * (shown.any(2) if shown.ndim == 3 else shown).astype(np.uint8))

    return convert


def _over_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return over_white(torch.from_numpy(np.dstack([colours, alpha]))).numpy()


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    # Phones save in Display P3, and CMYK means nothing without its profile.
    if profile and image.mode in ("RGB", "CMYK", "L"):
        with suppress(
            Exception
        ):  # a broken profile, or a PIL built without colour management: read it as if it had none
            from PIL import ImageCms

            source = ImageCms.ImageCmsProfile(BytesIO(profile))
            if "srgb" not in ImageCms.getProfileDescription(source).lower():
                converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
                if converted is not None:
                    return converted
    return image.convert("RGB")


def _damaged(path: Path, error: Exception) -> MagiError:
    reason = reason_of(error)
    if isinstance(error, MagiError):
        return error
    if isinstance(error, Image.DecompressionBombError):
        return MagiError(f"The picture {str(path)!r} is too large ({reason}) Scale it down first.")
    if isinstance(error, OSError) and error.errno is not None:  # the disk's, not PIL's
        return MagiError(f"{str(path)!r} cannot be read ({reason}). Copy it to another disk, and try again.")
    return MagiError(
        f"The picture {str(path)!r} is damaged or of an unusual kind ({reason}). Save it again as PNG or JPEG."
    )

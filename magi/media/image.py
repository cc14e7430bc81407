"""Still pictures: any file PIL reads, upright, in sRGB, as uint8 RGB."""

from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import MagiError
from .frames import over_white

# Formats whose further images are later moments; in others (TIFF, MPO, PSD ...) they are pages, views or layers.
_ANIMATED = {"GIF", "WEBP", "PNG", "AVIF"}

# PIL reads the header of MPEG videos but not their pictures, and runs other programs for PostScript and metafiles.
_NOT_PICTURES = {"MPEG", "EPS", "WMF"}


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
    path = Path(path).expanduser().absolute()
    try:
        if path.is_dir():
            raise MagiError(f"{str(path)!r} is a folder. Give one image or video file.")
        if not path.is_file():
            raise MagiError(f"There is no file {str(path)!r}. Check the path.")
        with path.open("rb") as file:
            empty = not file.read(1)
    except (OSError, ValueError) as error:
        raise MagiError(f"{str(path)!r} cannot be read ({error}). Check that you may open it.") from error
    if empty:
        raise MagiError(f"The file {str(path)!r} is empty. Copy or download it again.")
    return path


def open_image(path: Path) -> Image.Image | None:
    """Opens a picture lazily with PIL, for the caller to close; returns None where PIL knows no such picture."""
    try:
        image = Image.open(path)
    except UnidentifiedImageError:
        return None
    except Exception as error:  # a damaged header: PIL's readers raise whatever they stumble over
        raise _damaged(path, error) from error
    if image.format in _NOT_PICTURES:
        image.close()
        return None
    return image


def is_animation(image: Image.Image) -> bool:
    """Returns whether the opened file holds several moments, to be read as a video."""
    return image.format in _ANIMATED and getattr(image, "is_animated", False)


def to_rgb(image: Image.Image, path: Path) -> torch.Tensor:
    """Converts the current frame of an opened picture to uint8 (H, W, 3), as `read_image` does; errors name `path`."""
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            colour = _srgb(rgba.convert("RGB"), image.info.get("icc_profile"))
            colour.putalpha(rgba.getchannel("A"))
            return over_white(torch.from_numpy(np.array(colour)))
        if image.mode.startswith("I") or image.mode == "F":
            return _grey(np.asarray(image), image.mode)
        return torch.from_numpy(np.array(_srgb(image, image.info.get("icc_profile"))))
    except Exception as error:  # as in open_image
        raise _damaged(path, error) from error


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


def _grey(values: np.ndarray, mode: str) -> torch.Tensor:
    # Integer greys hold 16 bits (also PIL's 32-bit "I"); floats are in [0, 1], or in [0, 255] when they go above 1.
    scaled = values.astype(np.float32)
    if mode != "F":
        scaled /= 257
    elif np.max(scaled) <= 1:
        scaled *= 255
    grey = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return torch.from_numpy(np.repeat(grey[..., None], 3, axis=2))


def _damaged(path: Path, error: Exception) -> MagiError:
    reason = str(error) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return MagiError(f"The picture {str(path)!r} is too large ({reason}) Scale it down first.")
    return MagiError(
        f"The picture {str(path)!r} is damaged or of an unusual kind ({reason}). Save it again as PNG or JPEG."
    )

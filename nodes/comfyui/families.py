"""Which parts belong together: a transformer, VAE and text encoder understand each other only if they were trained together.

Their files do not always tell: latents of all models have the same shape. So the loaders' outputs carry their family along, and so
do the latents and the text that are made with them.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch

from ...magi.errors import MagiError
from ...magi.model_files.embedded import EMBEDDED_SIZE

Family = Literal["released", "embedded", "photo"]
KEY = "magi1"  # in a LATENT, and in a conditioning's options
_RELEASED_WIDTH = 4096  # of T5 v1.1 XXL, which all released models were trained with
_NAMES: Mapping[Family, str] = {
    "released": "a released model",
    "embedded": "the embedded demo model",
    "photo": "the embedded photo model",
}


def family_of_width(caption_channels: int) -> Family | None:
    """Returns the family of a transformer or text from a file of one's own; None where its width does not tell."""
    return "released" if caption_channels == _RELEASED_WIDTH else None


def family_of_latent(latent: Mapping[str, Any] | None) -> Family | None:
    """Returns the family that a LATENT was made with; None where it does not tell, as an empty or a loaded one."""
    found: Family | None = (latent or {}).get(KEY, {}).get("family")
    return found


def latent_of(samples: torch.Tensor, family: Family | None) -> dict[str, Any]:
    """Returns a LATENT that carries the family it was made with."""
    return {"samples": samples, **({KEY: {"family": family}} if family else {})}


def check_fit(first: Family | None, what: str, second: Family | None, other: str) -> None:
    """Raises MagiError if both families are known and differ; `what` and `other` name the parts that have them."""
    if first and second and first != second:
        raise MagiError(
            f"The {what} is that of {_NAMES[first]}, the {other} that of {_NAMES[second]}: they do not understand each other. "
            "Choose parts of the same model in the MAGI-1 loaders, or auto in all three."
        )


def embedded_size(family: Family | None) -> tuple[int, int] | None:
    """Returns the only (height, width) in pixels that a family can make; None where any is possible."""
    return (EMBEDDED_SIZE, EMBEDDED_SIZE) if family == "embedded" else None


def size_notice(height: int, width: int) -> str:
    """Returns a line that says that the embedded model makes its own size in place of the one that was asked for."""
    return f"The embedded demo model makes {EMBEDDED_SIZE}x{EMBEDDED_SIZE} only; {width}x{height} was asked for."


def size_error(height: int, width: int) -> MagiError:
    """Returns the error for latents to start from that have another size than the embedded model makes."""
    return MagiError(
        f"The latents to start from are {width}x{height}, and the embedded demo model makes {EMBEDDED_SIZE}x{EMBEDDED_SIZE} only. "
        "Make them with MAGI-1 Image to Video or Video to Video and the embedded VAE, which fit a picture or clip to that size; "
        "or choose another model in all three loaders."
    )

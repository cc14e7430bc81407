"""The embedded model, so that everything runs with nothing downloaded: a small MAGI-1 that was trained on moving shapes.

Its files are part of the package and have the official layout. It knows one flat shape on a plain background, 64x64 pixels, that
moves as the prompt says, and nothing else. For photos there is the one that repeats what it sees (`repeating.py`).
"""

from pathlib import Path
from typing import Literal

from ..errors import MagiError
from ..sampling.special_tokens import FILE_NAME as SPECIAL_TOKENS_FILE
from .locate import ModelFiles

_ASSETS = Path(__file__).parents[1] / "assets"
DEMO_IMAGE = _ASSETS / "cat.jpg"
DEMO_SHAPE = _ASSETS / "star.png"  # a picture that the embedded model can move: EMBEDDED_SIZE pixels wide and high
EMBEDDED_SIZE = 64  # pixels: the width and height of all that it was trained on

Kind = Literal["distill", "base"]
Model = Literal["distill", "base", "repeating"]  # with the one in `repeating.py`
_FOLDER = _ASSETS / "embedded"
_TRANSFORMERS: dict[Kind, str] = {"distill": "transformer", "base": "transformer_base"}
_SHARED = (
    "vae/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/config.json",
    "text_encoder/tokenizer.json",
    SPECIAL_TOKENS_FILE,
)


def embedded_files(kind: Kind = "distill") -> ModelFiles:
    """Returns the embedded model's files, in the package: with the distilled transformer (one pass) or the base one (three).

    Raises:
        MagiError: the kind is unknown, or a file is missing or damaged.
    """
    if kind not in _TRANSFORMERS:
        raise MagiError(f"There is no embedded model {kind!r}. Choose one of: {', '.join(_TRANSFORMERS)}.")
    transformer = _TRANSFORMERS[kind]
    for name in (f"{transformer}/model.safetensors", f"{transformer}/config.json", *_SHARED):
        if not (_FOLDER / name).is_file():
            raise MagiError(
                f"The embedded model is incomplete: {str(_FOLDER / name)!r} is missing. Install this pack again; "
                "what you downloaded and made stays."
            )
    files = ModelFiles(_FOLDER / transformer, _FOLDER / "vae", _FOLDER / "text_encoder", _FOLDER / SPECIAL_TOKENS_FILE)
    damaged = files.damaged()
    if damaged is not None:
        raise MagiError(
            f"The embedded model is damaged: {str(damaged)!r} is not whole, or cannot be read. Install this pack again; "
            "what you downloaded and made stays."
        )
    return files


def is_embedded(path: str | Path) -> bool:
    """Returns whether a file or folder is one of the embedded model's own."""
    return Path(path).resolve().is_relative_to(_FOLDER.resolve())

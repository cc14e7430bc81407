"""Finds the files that make up a model, by default in the tree that `python -m magi download` creates."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..checkpoint.reader import Checkpoint
from ..config import PRESETS
from ..errors import MagiError
from ..sampling.special_tokens import FILE_NAME as SPECIAL_TOKENS
from ..sampling.special_tokens import SpecialTokens, find_special_tokens
from ..system.folders import is_file, visible, what_is_at
from ..system.json_files import read_json
from ..system.paths import user_path

# The official tree, the same in the Hub's repository and on disk.
MODELS = Path("ckpt/magi")
VAE = Path("ckpt/vae")
TEXT_ENCODER = Path("ckpt/t5/t5-v1_1-xxl")
_INSTEAD = {"vae": ("VAE", "give and take latents"), "text_encoder": ("text encoder", "give captions")}


@dataclass(frozen=True)
class ModelFiles:
    """Paths of a model's parts.

    Attributes:
        transformer: file or folder.
        vae: file or folder; None where only latents are made.
        text_encoder: file or folder; None where captions are given.
        special_tokens: file; None where there is none.
        tokenizer: folder or file; None: beside the text encoder.
    """

    transformer: Path
    vae: Path | None = None
    text_encoder: Path | None = None
    special_tokens: Path | None = None
    tokenizer: Path | None = None

    def required(self, part: Literal["vae", "text_encoder"]) -> Path:
        """Returns the path of a part that is needed now. Raises MagiError if there is none."""
        path: Path | None = getattr(self, part)
        if path is None:
            what, instead = _INSTEAD[part]
            raise MagiError(f"This pipeline was made without a {what}. Make it with one, or {instead}.")
        return path

    def damaged(self) -> Path | None:
        """Returns the first file of these folders that is missing or cannot be read, by headers and a few samples."""
        for folder in filter(None, (self.transformer, self.vae, self.text_encoder)):
            try:
                with Checkpoint(folder) as checkpoint:
                    checkpoint.check_whole()
            except MagiError:
                return next(iter(visible(folder, "*.safetensors")), folder)
            for file in (folder / "config.json", *visible(folder, "tokenizer*.json")):
                try:
                    read_json(file)
                except (OSError, ValueError):
                    return file
        try:
            load_special_tokens(self)
        except MagiError:
            return self.special_tokens
        return None


def find_files(
    models: str | Path,
    transformer: str,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    special_tokens: str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> ModelFiles:
    """Returns the files to use: those given, the rest from the official tree below `models`.

    Args:
        models: folder that holds `ckpt/` and special_tokens.npz.
        transformer: name of a released model, or a path.
        vae: path, or None.
        text_encoder: path, or None.
        special_tokens: path, or None.
        tokenizer: path, or None.

    Raises:
        MagiError: a part other than the text encoder is missing; it tells where it belongs and how to download it.
    """
    models = user_path(models)
    weights = find_transformer(models, transformer)
    return ModelFiles(
        transformer=weights,
        vae=_part(models, vae, VAE, "VAE", "vae"),
        # Not checked: prompts in the cache do not need it, and encoding another one raises where it is missing.
        text_encoder=user_path(text_encoder) if text_encoder else models / TEXT_ENCODER,
        special_tokens=_special_tokens(models, special_tokens, weights),
        tokenizer=Path(tokenizer) if tokenizer else None,
    )


def _special_tokens(models: Path, given: str | Path | None, weights: Path) -> Path | None:
    """Returns the given file, else the one near the weights; None without one, since only some runs need it."""
    if given:
        return _existing(user_path(given), "special-token file", models, "special_tokens")
    return special_tokens_near(weights, [models])


def special_tokens_near(weights: Path, folders: Sequence[Path]) -> Path | None:
    """Finds the special tokens beside a model's weights or in the folders: by their name, else the published file by hash."""
    beside = weights if weights.is_dir() else weights.parent
    places = [beside, *folders]  # a file beside the weights belongs to them
    usual = (folder / SPECIAL_TOKENS for folder in places)
    return next(filter(is_file, usual), None) or find_special_tokens(places)


def load_special_tokens(files: ModelFiles) -> SpecialTokens | None:
    """Loads the model's special tokens; returns None where it has no file of them."""
    return SpecialTokens.load(files.special_tokens) if files.special_tokens else None


def find_transformer(models: Path, name: str) -> Path:
    """Returns the folder of a released model's weights below `models`, or `name` as a path.

    Raises:
        MagiError: the weights are not there.
    """
    if name not in PRESETS:
        path = user_path(name)
        if what_is_at(path) == "nothing":
            raise MagiError(
                f"There is no transformer at {name!r}, and no released model has that name. Give a path, or one of: {', '.join(PRESETS)}."
            )
        return path
    found = released_weights(models, name)
    return found or _existing(models / MODELS / name / "inference_weight", "transformer", models, name)


def released_weights(models: Path, name: str) -> Path | None:
    """Returns the folder of a released model's weights below `models`, None where it is not there."""
    return next((f for f in visible(models / MODELS / name, "inference_weight*") if what_is_at(f) == "folder"), None)


def _part(models: Path, given: str | Path | None, usual: Path, what: str, item: str) -> Path:
    return _existing(user_path(given) if given else models / usual, what, models, item)


def _existing(path: Path, what: str, models: Path, item: str) -> Path:
    if what_is_at(path) == "nothing":
        raise MagiError(
            f"The {what} is not at {str(path)!r}. Give its path, or fetch it with "
            f"`python -m magi download {item} --folder {models}`."
        )
    return path

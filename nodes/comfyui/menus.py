"""The loaders' menus and the files that they name, with forward slashes, so that a workflow works on every system."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Literal

from ...magi.config import PRESETS
from ...magi.errors import MagiError
from ...magi.model_files import locate
from ...magi.model_files.download import HUB, REPOSITORY, SPECIAL_TOKENS_URL
from ...magi.model_files.embedded import embedded_files
from ...magi.model_files.locate import SPECIAL_TOKENS, ModelFiles, released_weights, special_tokens_near
from ...magi.model_files.repeating import repeating_files
from ...magi.system.folders import visible, what_is_at
from ...magi.system.printable import printable
from ...magi.text.embedding_cache import EmbeddingCache
from ...magi.text.encoder import encoder_fingerprint
from ...magi.text.t5_checkpoint import t5_is_missing
from ...magi.text.t5_tokenizer import find_tokenizer
from . import host
from .families import Family

AUTO = "auto"
NOT_INSTALLED = (
    "-- not installed, to download: --"  # heads that part of a menu; entries keep their names on every machine
)
EMBEDDED = "embedded demo model"
EMBEDDED_BASE = "embedded demo model (base)"
PHOTO = "embedded photo model"
FAMILIES: Mapping[str, Family] = {EMBEDDED: "embedded", EMBEDDED_BASE: "embedded", PHOTO: "photo"}
# The order of the menu: the best to start with first. A released model that is not named here comes last.
_FIRST = ("4.5B_distill", "4.5B_distill_quant", "4.5B_base", "24B_distill_quant", "24B_distill", "24B_base")
RELEASED = tuple(sorted(PRESETS, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST)))
VAE, TEXT_ENCODER = locate.VAE.as_posix(), locate.TEXT_ENCODER.as_posix()
_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")
_LONGEST_NAME = 1000  # characters
_PACK = Path(__file__).resolve().parents[2]


def model_menu() -> list[str]:
    """Returns auto, the released models that are installed, files in the folders for models, the embedded models, the others."""
    return _menu(RELEASED, _released, _found("diffusion_models"), FAMILIES)


def vae_menu() -> list[str]:
    """Returns auto, the official VAE, files in the folders for VAEs, and the embedded ones."""
    return _menu((VAE,), lambda place: next(_places(place), None), _found("vae"), (EMBEDDED, PHOTO))


def encoder_menu() -> list[str]:
    """Returns auto, the official text encoder, files in the folders for text encoders, and the embedded ones."""
    return _menu((TEXT_ENCODER,), lambda place: next(_places(place), None), _found("text_encoders"), (EMBEDDED, PHOTO))


def _menu(
    official: Iterable[str], find: Callable[[str], Path | None], others: Iterable[str], embedded: Iterable[str]
) -> list[str]:
    found = [name for name in official if find(name) is not None]
    missing = [name for name in official if name not in found]
    return [AUTO, *found, *others, *embedded, *([NOT_INSTALLED] if missing else []), *missing]


def chosen(part: Literal["model", "vae", "encoder"], name: str) -> str:
    """Returns the entry that a name of the menu stands for: itself, with forward slashes, but for auto.

    Auto is the best released model that is installed, with the official VAE and text encoder, which may be missing; where none
    is, it is the embedded model. One decision for all three, so that they fit each other.

    Raises:
        MagiError: the name leads out of the folders.
    """
    if name != AUTO:
        return _inside(name)
    model = next((name for name in RELEASED if _released(name)), None)
    if model is None:
        return EMBEDDED
    return {"model": model, "vae": VAE, "encoder": TEXT_ENCODER}[part]


def notice(name: str, entry: str) -> str:
    """Returns a line that says what is chosen, by its entry; where auto chose the embedded model, how to get a real one."""
    if name != AUTO:
        return entry
    if entry != EMBEDDED:
        return f"auto: {entry}"
    return f"auto: {EMBEDDED} (moving shapes). Real ones: choose {_FIRST[0]}."  # no more fits under a node


def find_model(name: str) -> Path:
    """Returns the path of the transformer with a name of the menu.

    Raises:
        MagiError: it is not there; the message says which folder it belongs in and where to download it.
    """
    name = chosen("model", name)
    if name in FAMILIES:
        return _embedded(name).transformer
    if name in RELEASED:
        found = _released(name) or next(_released_folders(name), None)
        if found is not None:
            return found
        raise _missing(
            name, (locate.MODELS / name).as_posix(), "its folder inference_weight... with the .safetensors files", name
        )
    return _find(name, "diffusion_models")


def find_vae(name: str) -> Path:
    """Returns the path of the VAE with a name of the menu. Raises MagiError where it is not there."""
    name = chosen("vae", name)
    if name in FAMILIES:
        return _embedded(name).required("vae")
    if name == VAE:
        return _official(VAE, "The VAE", "diffusion_pytorch_model.safetensors and config.json", "vae")
    return _find(name, "vae")


def find_encoder(name: str) -> tuple[Path, Path | None]:
    """Returns the paths of the text encoder with a name of the menu and of its tokenizer (None: beside the encoder).

    Where the files are missing, the path is that of the last use, since prompts in the cache need none of them.

    Raises:
        MagiError: it is not there and was never used.
    """
    name = chosen("encoder", name)
    if name in FAMILIES:
        return _embedded(name).required("text_encoder"), None
    folders = (
        host.model_folders() if name == TEXT_ENCODER else [*host.model_folders(), *host.model_folders("text_encoders")]
    )
    places = [folder / name for folder in folders]
    if all(t5_is_missing(path) for path in places):
        for path in places:
            for tokenizer in (None, *_tokenizers()):
                if is_known(path, tokenizer):
                    return path, tokenizer
    if name == TEXT_ENCODER:
        return _official(
            TEXT_ENCODER, "The text encoder", "pytorch_model-*.bin, config.json and spiece.model", "t5"
        ), None
    path = _find(name, "text_encoders")
    return path, _tokenizer(path)


def is_known(encoder: Path, tokenizer: Path | None) -> bool:
    """Returns whether an encoder's files are missing, but it was used before with the tokenizer at this path."""
    try:
        return t5_is_missing(encoder) and bool(encoder_fingerprint(encoder, tokenizer, cache=text_cache()))
    except MagiError:
        return False


def text_cache() -> EmbeddingCache:
    """Returns the cache of prompts' embeddings."""
    return EmbeddingCache(host.cache_folder() / "text")


def special_tokens_of(model: Path) -> Path | None:
    """Returns the path of the special tokens for a transformer; None where they are not there."""
    return special_tokens_near(model, [model.parent, *host.model_folders()])


def find_special_tokens(model: Path) -> Path:
    """Returns the path of the special tokens for a transformer.

    Raises:
        MagiError: they are not there; the message says where they belong and where to download them.
    """
    found = special_tokens_of(model)
    if found is None:
        raise MagiError(
            f"Style, duration and negative tokens need {SPECIAL_TOKENS} (3 MB), which is not in {host.home()}. "
            f"Download {SPECIAL_TOKENS_URL} into that folder, or switch these tokens off."
        )
    return found


def _embedded(name: str) -> ModelFiles:
    if name == PHOTO:
        return repeating_files(host.cache_folder())
    return embedded_files("base" if name == EMBEDDED_BASE else "distill")


def _released_folders(name: str) -> Iterator[Path]:
    """Yields the folders of a released model's weights, in all folders for MAGI-1's models."""
    return filter(None, (released_weights(folder, name) for folder in host.model_folders()))


def _released(name: str) -> Path | None:
    """Returns the folder of a released model's weights, None where it has none: a download may only have begun.

    A folder that cannot be read is returned, for the loader to say so.
    """
    for folder in host.model_folders():
        try:
            weights = released_weights(folder, name)
            if weights is not None and visible(weights, "*.safetensors"):
                return weights
        except MagiError:
            return folder / locate.MODELS / name
    return None


def _tokenizer(encoder: Path) -> Path | None:
    """Returns None where the tokenizer is beside the encoder; else the path of the official one or of ComfyUI's."""
    for folder in (None, *_tokenizers()):
        try:
            find_tokenizer(encoder, folder)
        except MagiError:
            continue
        return folder
    return None


def _tokenizers() -> Iterator[Path | None]:
    yield from _places(TEXT_ENCODER)
    yield host.t5_tokenizer()


def _official(place: str, what: str, files: str, item: str) -> Path:
    found = next(_places(place), None)
    if found is None:
        raise _missing(what, place, files, item)
    return found


def _places(place: str) -> Iterator[Path]:
    """Yields the existing folders of this name in the official tree, in all folders for MAGI-1's models."""
    return (folder / place for folder in host.model_folders() if _may_be_folder(folder / place))


def _may_be_folder(path: Path) -> bool:
    """Returns whether a folder is there, or something that cannot be looked at: the loader says so."""
    try:
        return what_is_at(path) == "folder"
    except MagiError:
        return True


def _find(name: str, kind: str) -> Path:
    if name == NOT_INSTALLED:
        raise MagiError("That line only heads those that are not installed. Choose one of them, auto, or one above.")
    for folder in (*host.model_folders(), *host.model_folders(kind)):
        if what_is_at(folder / name) != "nothing":
            return folder / name
    # The folder that has the kind's name: ComfyUI's first for diffusion models still is "unet".
    native = next((f for f in host.model_folders(kind) if f.name == kind), host.model_folders(kind)[0])
    raise MagiError(
        f"There is no {name!r} in {host.home()} or {native}. Choose another one, or put it there and reload the page."
    )


def _inside(name: str) -> str:
    """Returns a name that stays inside the folders, with forward slashes, as a workflow from another system may not have it.

    It may come from a stranger's workflow file, so it is judged as text, by the rules of every system, before anything is
    looked at: Windows already contacts the machine that a path names when it is asked whether there is such a file.

    Raises:
        MagiError: it leads elsewhere.
    """
    path = PureWindowsPath(name)  # it knows both kinds of slashes, and drives
    if path.drive or path.root or ".." in path.parts or "\0" in name or len(name) > _LONGEST_NAME:
        raise MagiError(
            f"{printable(name)!r} is no file in ComfyUI's folders for models. Choose one from the menu; for files elsewhere, name "
            "their folder in extra_model_paths.yaml."
        )
    return name.replace("\\", "/")


def _found(kind: str) -> list[str]:
    """Returns files in a native folder and our own, without the official tree and hidden ones; shards count once."""
    own = [name for name in host.model_names(host.FOLDER) if not name.startswith("ckpt/")]
    names = [n for n in (*own, *host.model_names(kind)) if n.lower().endswith((".safetensors", ".sft"))]
    shown = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    first: dict[str, str] = {}
    for name in shown:
        # Shards in a folder of their own stand for it; without one, the first stands for all.
        folder = name.rpartition("/")[0] if _SHARD.search(name) else ""
        first.setdefault(folder or _SHARD.sub("", name), folder or name)
    return list(first.values())


def _missing(what: str, place: str, files: str, item: str) -> MagiError:
    home = host.home()
    more = " (with the VAE, text encoder and special tokens)" if item in RELEASED else ""
    return MagiError(
        f"{what} is not in {home / place}.\nDownload {files} from {HUB}/{REPOSITORY}/tree/main/{place} into that folder.\n"
        f'Or fetch it{more} with this:\n"{sys.executable}" "{_PACK}" download {item} --folder "{home}"'
    )

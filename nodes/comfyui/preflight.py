"""Missing and wrong files of all loaders in a graph, told by the first node that runs: before minutes of encoding a prompt.

They are not told by validation: front ends show what that says two clicks deep, and once for each input.
"""

from collections.abc import Callable
from typing import Any

from ...magi.errors import MagiError
from ...magi.model_files.identify import recognise
from ...magi.model_files.load import check_transformer
from ...magi.sampling.special_tokens import SpecialTokens
from ...magi.text.t5_checkpoint import read_t5
from ...magi.text.t5_tokenizer import find_tokenizer
from ...magi.vae.video_vae import load_vae
from . import menus
from .graph import Graph, class_of, needed_beside


def check_loaders(graph: Graph | None, node_id: str | None) -> None:
    """Checks the loaders that run for the same outputs as a node, itself left out.

    Raises:
        MagiError: a file is missing, damaged or something else; the message names the loader.
    """
    for id in needed_beside(graph, node_id):
        assert graph is not None  # noqa: S101 (it has a node)
        loader = _LOADERS.get(graph[id]["class_type"])
        if loader is None:
            continue
        widget, check = loader
        name = graph[id].get("inputs", {}).get(widget)
        if isinstance(name, str):  # else it comes over a link
            try:
                check(name)
            except MagiError as error:
                title = class_of(graph[id]["class_type"]).define_schema().display_name
                raise MagiError(f"{title}: {error}") from error


def _check_model(name: str) -> None:
    path = menus.find_model(name)
    # Where the file does not tell base from distilled, the input `variant` does, which the loader itself checks.
    check_transformer(path, distilled=False if recognise(path).distilled is None else None)
    found = menus.special_tokens_of(path)
    if found:
        SpecialTokens.load(found)


def _check_vae(name: str) -> None:
    load_vae(menus.find_vae(name), "meta")


def check_encoder(name: str) -> None:
    """Raises MagiError for a text encoder that is missing or wrong, unless prompts in the cache may do without it."""
    path, tokenizer = menus.find_encoder(name)
    if menus.is_known(path, tokenizer):
        return  # encoding a prompt that is not in the cache tells that the files are missing
    read_t5(path)
    find_tokenizer(path, tokenizer)


_LOADERS: dict[str, tuple[str, Callable[[str], Any]]] = {  # the widget that names a file, and what checks it
    "Magi1ModelLoader": ("model", _check_model),
    "Magi1VAELoader": ("vae", _check_vae),
    "Magi1TextEncoderLoader": ("encoder", check_encoder),
}

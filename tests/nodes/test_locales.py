"""Translations of the nodes' texts: nothing is missing, and nothing is there that is no more."""

import json
import re

import pytest

from tests.support.paths import ROOT

LOCALES = ROOT / "locales"
LANGUAGES = ["ja", "zh"]
# Where these stand in the English text they stand in the translation: numbers, names of files, and quoted choices.
KEPT = re.compile(r"\d+(?:\.\d+)?|models/[\w/]+|\b[\w-]+\.(?:safetensors|npz|txt)\b|\bt5xxl\b|\bsageattention\b")


def texts(comfy) -> dict[str, dict]:
    """What the front end may translate, in English, in the form of its files."""
    found = {}
    for name in comfy.nodes:
        info = comfy.info(name)
        inputs = info["input"]["required"] | info["input"].get("optional", {})
        tips = info.get("output_tooltips") or [None] * len(info["output"])
        found[name] = {
            "display_name": info["display_name"],
            "description": info["description"],
            "inputs": {id: {"name": id, "tooltip": options["tooltip"]} for id, (_, options) in inputs.items()},
            "outputs": {
                str(i): {"name": output} | ({"tooltip": tip} if tip else {})
                for i, (output, tip) in enumerate(zip(info["output_name"], tips, strict=True))
            },
        }
    return found


def leaves(tree: dict, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    found = {}
    for key, value in tree.items():
        found |= leaves(value, (*path, key)) if isinstance(value, dict) else {(*path, key): value}
    return found


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_is_missing_and_nothing_is_left_over(comfy, language):
    translated = leaves(json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8")))
    wanted = leaves(texts(comfy))
    assert set(wanted) - set(translated) == set(), "not translated"
    assert set(translated) - set(wanted) == set(), "of an input that is no more"
    assert all(text.strip() for text in translated.values())


@pytest.mark.parametrize("language", LANGUAGES)
def test_it_is_that_language_and_says_the_same_numbers(comfy, language):
    translated = leaves(json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8")))
    for path, text in leaves(texts(comfy)).items():
        if path[-1] in ("tooltip", "description"):
            assert re.search(r"[\u3040-\u30ff]" if language == "ja" else r"[\u4e00-\u9fff]", translated[path]), path
            assert sorted(set(KEPT.findall(text))) == sorted(set(KEPT.findall(translated[path]))), path


def test_every_language_is_tested():
    assert sorted(folder.name for folder in LOCALES.iterdir()) == LANGUAGES

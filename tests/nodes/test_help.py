"""The pages of ComfyUI's help panel say what the nodes are: every input and output, no other, values that can be chosen."""

import argparse
import re

import pytest

from magi.cli import remote as remote_command
from magi.model_files.download import HUB, REPOSITORY, SPECIAL_TOKENS_URL
from magi.remote.answers import TASKS_PAGE
from magi.remote.key import ADDRESS_VARIABLE, VARIABLE
from magi.remote.key import PAGE as KEY_PAGE
from magi.remote.request import MODEL
from tests.support.paths import ROOT

TREE = f"{HUB}/{REPOSITORY}/tree/main"

PAGES = ROOT / "web" / "docs"
IDS = sorted(page.stem for page in PAGES.glob("*.md"))


def section(page: str, title: str) -> str:
    """The text below `## title` or its plural; empty where there is no such section."""
    found = re.search(rf"^## {title}s?\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


def items(text: str) -> list[tuple[list[str], str]]:
    """The list's items, each the names it begins with and its text."""
    found = re.findall(r"^- ((?:\*\*\w+\*\*(?:, )?)+)(.*?)(?=^- |\Z)", text, re.MULTILINE | re.DOTALL)
    return [(re.findall(r"\w+", names), text) for names, text in found]


def names(text: str) -> list[str]:
    return [name for every, _ in items(text) for name in every]


@pytest.fixture
def read():
    return lambda node: (PAGES / f"{node}.md").read_text(encoding="utf-8")


def test_every_node_has_its_page_and_every_page_its_node(comfy):
    assert sorted(comfy.nodes) == IDS
    assert [entry.name for entry in PAGES.iterdir() if entry.suffix != ".md"] == []


@pytest.mark.parametrize("node", IDS)
def test_a_page_lists_exactly_the_inputs_and_outputs(comfy, read, node):
    page, schema = read(node), comfy.nodes[node].GET_SCHEMA()
    assert page.startswith(f"# {schema.display_name}\n")
    assert sorted(names(section(page, "Input"))) == sorted(given.id for given in schema.inputs)
    assert names(section(page, "Output")) == [made.display_name for made in schema.outputs]


@pytest.mark.parametrize("node", IDS)
def test_the_values_it_speaks_of_can_be_chosen(comfy, read, node):
    inputs = {given.id: given for given in comfy.nodes[node].GET_SCHEMA().inputs}
    for ids, text in items(section(read(node), "Input")):
        for value in re.findall(r"(?<!\*)\*([^*\n]+)\*(?!\*)", text):
            assert any(accepts(inputs[name], value) for name in ids), f"{', '.join(ids)}: {value}"


def accepts(given, value: str) -> bool:
    if options := getattr(given, "options", None):
        return value in options
    if isinstance(getattr(given, "min", None), int | float):
        return given.min <= float(value) <= given.max
    return False


@pytest.mark.parametrize("node", IDS)
def test_an_input_is_called_optional_or_advanced_where_it_is(comfy, read, node):
    said = {
        name: re.match(r" \((\w+)\)", text)[1] if text.startswith(" (") else None
        for every, text in items(section(read(node), "Input"))
        for name in every
    }
    for given in comfy.nodes[node].GET_SCHEMA().inputs:
        is_advanced = bool(given.as_dict().get("advanced"))
        assert said[given.id] == ("advanced" if is_advanced else "optional" if given.optional else None), given.id


SERVICE = {"key": KEY_PAGE, "tasks": TASKS_PAGE, "prices": f"https://wavespeed.ai/docs/docs-api/{MODEL}"}


def test_links_are_those_that_the_messages_name(comfy, read):
    menus = comfy.module("nodes.comfyui.menus")
    links = {node: set(re.findall(r"\]\((.*?)\)", read(node))) for node in IDS}
    assert links.pop("Magi1Remote") == set(SERVICE.values())
    official = {f"{TREE}/ckpt/magi/{name}" for name in menus.RELEASED}
    official |= {f"{TREE}/{menus.VAE}", f"{TREE}/{menus.TEXT_ENCODER}", SPECIAL_TOKENS_URL}
    assert set().union(*links.values()) == official | {"https://huggingface.co/comfyanonymous/flux_text_encoders"}


def test_the_key_goes_where_it_is_looked_for(comfy, read):
    page, remote = read("Magi1Remote"), comfy.module("nodes.remote")
    found = set(re.findall(r"WAVESPEED_\w+|\S*wavespeed_api_key\S*", page))
    assert found == {VARIABLE, ADDRESS_VARIABLE, f"ComfyUI/user/magi1/{remote.KEY_FILE}"}


def test_the_commands_of_the_remote_page_are_understood(read):
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    remote_command.add_arguments(parser)
    lines = re.findall(r"^python PACK remote (.*)$", read("Magi1Remote"), re.MULTILINE)
    given = [parser.parse_args(line.split()) for line in lines]
    assert [(args.save_key, args.fake_server) for args in given] == [(True, False), (False, True)]
    assert f"`http://127.0.0.1:{given[1].port}`" in read("Magi1Remote")

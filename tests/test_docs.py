"""The documentation names files that exist: who follows it finds what it speaks of."""

import re

import pytest

from tests.support.paths import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
CODE = {
    file.relative_to(ROOT).as_posix() for folder in ("magi", "nodes", "tests") for file in (ROOT / folder).rglob("*.py")
}


def ids(page):
    return page.name


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    anchors = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ")).lower().replace(" ", "-")
        for line in text.split("\n")
        if line.startswith("#")
    }
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        if path:
            assert (page.parent / path).exists(), link
        else:
            assert anchor in anchors, link


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_code_that_is_named_is_there(page):
    """`offload/prefetch.py` is below magi/, or named from the root."""
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:\w+/)+\w+\.py)`", text):
        assert name in CODE or f"magi/{name}" in CODE, name


def test_code_that_is_named_beside_its_file_is_in_it():
    """In the walks and tables: `file.py` `Name.method`."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    pairs = re.findall(r"`((?:\w+/)+\w+\.py)`\s`(\w+(?:\.\w+)?)`", text)
    assert len(pairs) > 30
    for file, name in pairs:
        source = (ROOT / (file if file in CODE else f"magi/{file}")).read_text(encoding="utf-8")
        for part in name.split("."):
            assert re.search(rf"\b{part}\b", source), (file, name)

"""The documentation names files and code that exist: who follows it finds what it speaks of."""

import ast
import re
from collections import defaultdict
from functools import cache

import pytest

from tests.support.paths import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
CODE = {
    file.relative_to(ROOT).as_posix()
    for folder in ("magi", "nodes", "tests", "tools")
    for file in (ROOT / folder).rglob("*.py")
} - {"tests/test_docs.py"}  # whose examples are of names that are gone


def ids(page):
    return page.name


def anchors(page):
    """The names under which GitHub links to a page's headings."""
    lines = page.read_text(encoding="utf-8").split("\n")
    return {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ")).lower().replace(" ", "-") for line in lines if line.startswith("#")
    }


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_lines_are_no_longer_than_in_the_code(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert [line for line in text.split("\n") if len(line) > 120 and not line.startswith("|")] == []  # a table's may


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_code_that_is_named_is_there(page):
    """`offload/prefetch.py` is below magi/, or named from the root."""
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:\w+/)+\w+\.py)`", text):
        assert name in CODE or f"magi/{name}" in CODE, name


ARCHITECTURE = ROOT / "docs" / "architecture.md"
FILE = r"`((?:\w+/)+\w+\.py)`"
NAME = r"`\w+(?:\.\w+)?`"
NAMES = rf"{NAME}(?:(?:,| and)\s{NAME})*"


def prose() -> str:
    """The page without its script and drawings, which stand between fences."""
    return re.sub(r"^```.*?^```$", "", ARCHITECTURE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@cache
def defined(file: str) -> tuple[frozenset[str], dict[str, frozenset[str]], dict[str, tuple[str, ...]]]:
    """(names that a file defines or uses as identifiers, {class: its members}, {class: its bases})."""
    names: set[str] = set()
    members: dict[str, set[str]] = defaultdict(set)
    bases: dict[str, tuple[str, ...]] = {}
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names.update(identifiers(node))
        if isinstance(node, ast.ClassDef):
            members[node.name].update(name for inner in node.body for name in bound(inner))
            for inner in ast.walk(node):  # self.x = ...
                if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                    members[node.name].add(inner.attr)
            bases[node.name] = tuple(base.id for base in node.bases if isinstance(base, ast.Name))
    return frozenset(names), {name: frozenset(found) for name, found in members.items()}, bases


def identifiers(node: ast.AST) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.arg | ast.keyword):
        return [node.arg] if node.arg else []
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
        return [node.value]  # names of inputs, options and the like
    return []


def bound(statement: ast.stmt) -> list[str]:
    """What a statement in a class's body defines."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def exists(name: str, files: set[str]) -> bool:
    """Whether a name, or a class's member as Class.member, is in one of these files; a member may be inherited."""
    owner, _, member = name.partition(".")
    if not member:
        return any(owner in defined(file)[0] for file in files)
    if not owner[:1].isupper():
        return exists(owner, files) and exists(member, files)
    return any(
        member in defined(file)[1][owner] or any(exists(f"{base}.{member}", CODE) for base in defined(file)[2][owner])
        for file in files
        if owner in defined(file)[1]
    )


def looks_like_code(name: str) -> bool:
    return (
        "_" in name.strip("_") or name.startswith("_") or bool(re.match(r"_*[A-Z]\w*\.\w|_*[A-Z][a-z0-9]+[A-Z]", name))
    )


def test_code_that_is_named_beside_its_file_is_in_it():
    """In the walks and tables: `file.py` `Name.method`, `file.py`: `name`, `file.py` (`name`, `other`), `name` in `file.py`."""
    text = prose()
    found = re.findall(rf"{FILE}(?:\s|:\s|\s\()({NAMES})", text)
    found += [(file, names) for names, file in re.findall(rf"({NAMES})\sin\s{FILE}", text)]
    pairs = [(file, name.strip("`")) for file, names in found for name in re.findall(NAME, names)]
    assert len(pairs) > 80
    for file, name in pairs:
        assert exists(name, {file if file in CODE else f"magi/{file}"}), (file, name)


def test_code_that_is_named_anywhere_is_there():
    """Every name with an underscore, in CamelCase or of the form Class.member; those of libraries are named in our code, too."""
    spans = [span for span in re.findall(r"`([^`]+)`", prose()) if not re.search(r"\S/|/\S", span)]  # no paths
    words = {word for span in spans for word in re.findall(r"(?<![\w.])\w+(?:\.\w+)*", span)}
    names = {word for word in words if looks_like_code(word)}
    assert len(names) > 80
    assert sorted(name for name in names if not exists(name, CODE)) == []


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("Sampler._lower_memory", True),
        ("Sampler._take_less", False),
        ("Sampler.place", False),  # a method, but of others
        ("MagiTransformer.loaded", True),  # inherited
        ("has_float8_matmul", True),
        ("multiplies_float8", False),
    ],
)
def test_a_name_that_is_gone_is_seen(name, there):
    assert looks_like_code(name)
    assert exists(name, CODE) is there


EXAMPLES = r"\.\.\.|4\.5B_distill|0\.3\.64|special_tokens\.npz|a MAGI-1 VAE"


def messages() -> list[str]:
    """The strings of the pack, with a blank for each value in them."""
    found = []
    for file in sorted(ROOT / name for name in CODE | {"__init__.py"} if not name.startswith("tests/")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else " " for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_messages_in_the_readme_are_those_of_the_code():
    """In the table of troubles, in italics; `...` stands for a value, as does what is named as an example."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("### Troubleshooting")[2].partition("\n#")[0]
    quoted = re.findall(r"^\| \*(.+?)\*", table, re.MULTILINE)
    assert len(quoted) > 12
    known = messages()
    for message in quoted:
        parts = [part.strip(" ,") for part in re.split(EXAMPLES, message)]
        assert all(any(part in text for text in known) for part in parts), message

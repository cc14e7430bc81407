"""The rooms of `magi/` and `nodes/`: every import, also one inside a function, leads to the same room or one above it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

# From the ground up; each may import what stands before it. `main` stands for the files of magi/ that are in no room.
ROOMS = (
    *("errors", "system", "config", "media", "checkpoint", "text", "vae", "transformer", "offload", "sampling"),
    *("planning", "model_files", "runs", "pipeline", "remote", "cli", "__main__", "__init__"),
)
NODE_ROOMS = ("comfyui", "")  # what adapts ComfyUI, then the nodes
REMOTE_MAY = {"errors", "system", "media", "remote"}


def imports(file: Path, root: Path) -> Iterator[tuple[str, ...]]:
    """What a file imports of the pack, as paths below `root`: ("magi", "vae", "model")."""
    package = file.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            for alias in node.names:
                yield (*base, *(node.module or "").split("."), alias.name) if node.module else (*base, alias.name)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (tuple(name.split(".")) for name in names)


def room_of(path: tuple[str, ...]) -> str:
    return Path(path[1]).stem


def arrows(root: Path) -> Iterator[tuple[str, str, str]]:
    """(file, its room, the room it imports) for everything in magi/."""
    for file in sorted((root / "magi").rglob("*.py")):
        here = file.relative_to(root)
        for target in imports(file, root):
            if len(target) > 1 and target[0] == "magi":
                yield here.as_posix(), room_of(here.parts), room_of(target)


def wrong(root: Path) -> list[str]:
    return [
        f"{file} imports {target}"
        for file, room, target in arrows(root)
        if target not in ROOMS
        or ROOMS.index(target) > ROOMS.index(room)
        or (room == "remote" and target not in REMOTE_MAY)
    ]


def test_no_import_leads_to_a_higher_room():
    assert len(list(arrows(ROOT))) > 300
    assert wrong(ROOT) == []


def test_every_file_is_in_a_room():
    for file in (ROOT / "magi").rglob("*.py"):
        assert room_of(file.relative_to(ROOT).parts) in ROOMS


def test_magi_knows_neither_comfyui_nor_the_nodes():
    for file in (ROOT / "magi").rglob("*.py"):
        for target in imports(file, ROOT):
            assert target[0] not in ("comfy", "comfy_api", "folder_paths", "server", "nodes"), file


def test_what_adapts_comfyui_knows_no_node():
    for file in (ROOT / "nodes" / "comfyui").glob("*.py"):
        for target in imports(file, ROOT):
            assert target[0] != "nodes" or target[1] == "comfyui", file


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        (
            "magi/system/a.py",
            "def f():\n    from ..sampling.sampler import Sampler\n",
            "magi/system/a.py imports sampling",
        ),
        ("magi/vae/a.py", "from .. import cli\n", "magi/vae/a.py imports cli"),
        ("magi/vae/a.py", "from magi.cli.main import main\n", "magi/vae/a.py imports cli"),
        ("magi/remote/a.py", "from ..sampling import sampler\n", "magi/remote/a.py imports sampling"),
        ("magi/vae/a.py", "from ..nowhere.x import y\n", "magi/vae/a.py imports nowhere"),
    ],
)
def test_an_arrow_up_is_seen(file, text, expected, tmp_path):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert wrong(tmp_path) == [expected]

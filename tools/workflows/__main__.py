"""Writes the workflows, their copies for the server's tests, and the blueprints: `python -m tools.workflows`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.paths import API_WORKFLOWS, ROOT

from .build import api_file, blueprint_file, ui_file
from .examples import BLUEPRINTS, WORKFLOWS
from .kinds import load_ours


def files() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yields every file's path and content."""
    kinds, titles = load_ours()
    for workflow in WORKFLOWS:
        yield ROOT / "workflows" / f"{workflow.name}.json", ui_file(workflow, kinds)
        yield API_WORKFLOWS / f"{workflow.name}.json", api_file(workflow, kinds, titles)
    for blueprint in BLUEPRINTS:
        yield ROOT / "subgraphs" / f"{blueprint.title}.json", blueprint_file(blueprint, kinds)


def text_of(content: dict[str, Any]) -> str:
    """Returns a file's text."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for path, content in files():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text_of(content), encoding="utf-8")
        print(path.relative_to(ROOT))

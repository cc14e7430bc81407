"""The committed workflows and blueprints are what their descriptions say: whoever changes a node writes them anew."""

import json
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from tools.workflows.build import layout
from tools.workflows.examples import BLUEPRINTS, WORKFLOWS
from tools.workflows.graph import Group, Node, Workflow


def test_the_files_are_those_that_the_tool_writes():
    """In a process of its own: it loads the pack into the stand-in."""
    code = "from tools.workflows.__main__ import files, text_of; import sys; "
    code += "sys.exit(', '.join(p.name for p, c in files() if not p.exists() or p.read_text(encoding='utf-8') != text_of(c)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.stderr == "\n", f"run `python -m tools.workflows` and commit what it writes: {found.stderr}"


def test_a_layout_is_rows_of_stacks_of_groups():
    nodes = {name: Node("Magi1VAELoader", size=(100, 50)) for name in "abcd"}
    rows = [[[Group("one", [["a", "b"]]), Group("two", [["c"]])], [Group(None, [["d"]])]]]
    boxes, frames = layout(Workflow("test", nodes, rows))
    assert [box[2:] for box in boxes.values()] == [(100, 50)] * 4
    assert boxes["a"][0] == boxes["b"][0] == boxes["c"][0] < boxes["d"][0]
    assert boxes["a"][1] < boxes["b"][1] < boxes["c"][1]
    assert [group.title for group, _ in frames] == ["one", "two"]
    (_, first), (_, second) = frames
    assert first[1] + first[3] < second[1]


@pytest.mark.parametrize("blueprint", BLUEPRINTS, ids=lambda b: b.title)
def test_a_blueprint_is_a_whole_subgraph(blueprint):
    file = json.loads((ROOT / "subgraphs" / f"{blueprint.title}.json").read_text(encoding="utf-8"))
    (instance,), (definition,) = file["nodes"], file["definitions"]["subgraphs"]
    assert instance["type"] == definition["id"]
    assert [port["name"] for port in instance["inputs"]] == [port["name"] for port in definition["inputs"]]
    assert [port["name"] for port in instance["outputs"]] == [port["name"] for port in definition["outputs"]]
    names = [port["name"] for port in definition["inputs"]]
    assert len(set(names)) == len(names), "a widget is found by its name"
    nodes = {node["id"]: node for node in definition["nodes"]}
    for link in definition["links"]:
        if link["origin_id"] > 0:
            assert link["id"] in nodes[link["origin_id"]]["outputs"][link["origin_slot"]]["links"]
        else:
            assert link["id"] in definition["inputs"][link["origin_slot"]]["linkIds"]
        if link["target_id"] > 0:
            assert nodes[link["target_id"]]["inputs"][link["target_slot"]]["link"] == link["id"]
        else:
            assert link["id"] in definition["outputs"][link["target_slot"]]["linkIds"]
    taken = {i["link"] for node in nodes.values() for i in node["inputs"] if i["link"] is not None}
    assert taken <= {link["id"] for link in definition["links"]}
    for node in nodes.values():
        needed = {"Magi1Sampler": {"model", "text"}, "Magi1VAEDecode": {"samples", "vae"}}.get(node["type"], set())
        assert needed <= {i["name"] for i in node["inputs"] if i["link"] is not None}
    for id, widget in instance["properties"]["proxyWidgets"]:
        assert widget in [i["name"] for i in nodes[int(id)]["inputs"] if "widget" in i]


def test_every_workflow_has_a_name_of_its_own():
    assert len({workflow.name for workflow in WORKFLOWS}) == len(WORKFLOWS)

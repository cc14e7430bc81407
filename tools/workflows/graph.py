"""What a workflow is made of: nodes by name, and the groups in which they lie on the canvas."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PROMPT = ("#232", "#353")  # colours of a node and its background
NOTE = ("#432", "#653")
GROUP = "#3f789e"
HINT = "#b58b2a"  # of a group that is off until it is wanted


@dataclass(frozen=True)
class Node:
    """A node of a graph.

    Attributes:
        kind: its id in ComfyUI.
        values: of its widgets that are not at their default.
        links: where inputs come from: "node", its first output, or "node.output".
        title: in place of its own.
        size: (width, height) in place of that of its kind.
        off: bypassed.
        models: files that the front end offers to download.
    """

    kind: str
    values: Mapping[str, Any] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    title: str | None = None
    size: tuple[int, int] | None = None
    off: bool = False
    models: Sequence[Mapping[str, str]] = ()


@dataclass(frozen=True)
class Group:
    """A frame around columns of nodes, by their names; without a title there is no frame."""

    title: str | None
    columns: Sequence[Sequence[str]]
    color: str = GROUP


@dataclass(frozen=True)
class Workflow:
    """An example: what is in it, and where.

    Attributes:
        name: of its files.
        nodes: by names of their own.
        rows: they lie below each other. A row has stacks side by side, a stack has groups below each other.
    """

    name: str
    nodes: Mapping[str, Node]
    rows: Sequence[Sequence[Sequence[Group]]]


@dataclass(frozen=True)
class Blueprint:
    """A subgraph that a user takes from the list of nodes.

    Attributes:
        title: its name in that list, and of its file.
        description: a sentence.
        workflow: whose nodes are taken.
        without: names of those that are left out.
        inputs: what it shows of itself: "node.input", sockets and widgets; "a.x+b.y" feeds two at once.
        outputs: "node.output".
    """

    title: str
    description: str
    workflow: Workflow
    without: Sequence[str]
    inputs: Sequence[str]
    outputs: Sequence[str]

"""What a node can know of the graph that it runs in: {id: {class_type, inputs}}."""

from collections.abc import Collection, Iterator, Mapping
from importlib import import_module
from typing import Any

Graph = Mapping[str, Any]


def graph_of(dynprompt: Any) -> Graph | None:
    """Returns the graph that runs, given ComfyUI's hidden input `dynprompt`; None where it gives none.

    Its hidden input `prompt` would do, but one of our nodes has a widget of that name.
    """
    return None if dynprompt is None else {id: dynprompt.get_node(id) for id in sorted(dynprompt.all_node_ids())}


def feeds(graph: Graph | None, node_id: str | None, kinds: Collection[str]) -> bool:
    """Returns whether an output of a node goes straight into a node of one of these kinds."""
    return any(part["class_type"] in kinds and node_id in _sources(part) for part in (graph or {}).values())


def needed_beside(graph: Graph | None, node_id: str | None) -> Iterator[str]:
    """Yields the ids of all nodes that must run for the outputs that a node is run for, itself left out."""
    if not graph or node_id not in graph:
        return
    needed: set[str] = set()
    for id, part in graph.items():
        if _is_output(part["class_type"]):
            behind = _with_sources(graph, id)
            needed |= behind if node_id in behind else set()
    yield from (id for id in graph if id in needed - {node_id})


def _with_sources(graph: Graph, id: str) -> set[str]:
    """Returns a node's id and those of all nodes that it takes something from, at any distance."""
    found, open_ids = set[str](), [id]
    while open_ids:
        id = open_ids.pop()
        if id in graph and id not in found:
            found.add(id)
            open_ids += _sources(graph[id], eager=True)
    return found


def _sources(part: Mapping[str, Any], eager: bool = False) -> list[str]:
    """Returns the ids of the nodes that a node takes something from; `eager`: but for what it may do without."""
    links = {name: value[0] for name, value in part.get("inputs", {}).items() if _is_link(value)}
    lazy = _lazy_inputs(part["class_type"]) if eager and links else set()
    return [id for name, id in links.items() if name not in lazy]


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and list(map(type, value)) == [str, int]


def _lazy_inputs(class_type: str) -> set[str]:
    """Returns the inputs that a node may do without, as a switch does without the side that is not chosen."""
    node = class_of(class_type)
    groups = node.INPUT_TYPES() if hasattr(node, "INPUT_TYPES") else {}
    inputs = {**groups.get("required", {}), **groups.get("optional", {})}
    # An input is (type, options), and some leave out the options.
    return {name for name, (_, *options) in inputs.items() if options and options[0].get("lazy")}


def _is_output(class_type: str) -> bool:
    return bool(getattr(class_of(class_type), "OUTPUT_NODE", False))


def class_of(class_type: str) -> Any:
    """Returns the class of a kind of node; None where it is not known."""
    classes = import_module("nodes").NODE_CLASS_MAPPINGS  # ComfyUI's module, which has the name of our package
    return classes.get(class_type)

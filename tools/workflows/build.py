"""From the description of a workflow to the files that the front end and the server read."""

import uuid
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from magi import __version__

from .graph import NOTE, PROMPT, Blueprint, Group, Node, Workflow
from .kinds import NATIVE, SIZES, Kind

_PAD, _GAP, _TITLE, _HEAD = 16, 24, 30, 44  # around nodes in a group; between them; a node's and a group's own bar
_OFF = 4  # the mode of a bypassed node
_INPUT, _OUTPUT = -10, -20  # what stands for a subgraph's own sockets among its nodes
_VERSIONS = {"comfy-core": "0.3.64", "magi1-local": __version__}
Kinds = Mapping[str, Kind]
Box = tuple[int, int, int, int]  # x, y, width, height


def identity(name: str) -> str:
    """Returns a UUID that is always the same for a name."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"https://github.com/sand-ai/magi1/{name}"))


def layout(workflow: Workflow) -> tuple[dict[str, Box], list[tuple[Group, Box]]]:
    """Returns where nodes lie, without their title bars, and the groups with a frame."""
    nodes: dict[str, Box] = {}
    frames: list[tuple[Group, Box]] = []
    top = 0
    for row in workflow.rows:
        left = bottom = 0
        for stack in row:
            right, upper = left, top
            for group in stack:
                boxes = _group_layout(workflow, group, left, upper)
                pad = _PAD if group.title else 0
                far = max(x + w for x, _, w, _ in boxes.values()) + pad
                end = max(y + h for _, y, _, h in boxes.values()) + pad
                if group.title:
                    frames.append((group, (left, upper, far - left, end - upper)))
                nodes |= boxes
                right, bottom, upper = max(right, far), max(bottom, end), end + _PAD
            left = right + _PAD
        top = bottom + _PAD
    return nodes, frames


def _group_layout(workflow: Workflow, group: Group, left: int, top: int) -> dict[str, Box]:
    """Returns where the nodes of a group lie whose frame begins at `left` and `top`."""
    boxes, x = {}, left + (_PAD if group.title else 0)
    for column in group.columns:
        y, width = top + (_HEAD if group.title else 0), 0
        for name in column:
            w, h = size_of(workflow.nodes[name])
            boxes[name] = (x, y + _TITLE, w, h)
            y, width = y + _TITLE + h + _GAP, max(width, w)
        x += width + _PAD
    return boxes


def size_of(node: Node) -> tuple[int, int]:
    """Returns a node's width and height."""
    return node.size or SIZES[node.kind]


class _Links:
    """The links of a graph, numbered in the order of the nodes that take them."""

    def __init__(self, nodes: Mapping[str, Node], kinds: Kinds) -> None:
        self.ids = {name: number for number, name in enumerate(nodes, 1)}
        self.taken: dict[tuple[str, str], int] = {}  # (node, input) -> link
        self.made: dict[tuple[str, int], list[int]] = {}  # (node, output) -> links
        self.all: list[tuple[int, str, int, str, int, str]] = []  # link, from, output, to, input, type
        for name, node in nodes.items():
            slots = [*kinds[node.kind].sockets, *kinds[node.kind].widgets]
            for slot, source in node.links.items():
                origin, output = source_of(nodes, kinds, source)
                number = len(self.all) + 1
                self.taken[name, slot] = number
                self.made.setdefault((origin, output), []).append(number)
                kind = kinds[nodes[origin].kind].outputs[output][1]
                self.all.append((number, origin, output, name, slots.index(slot), kind))


def source_of(nodes: Mapping[str, Node], kinds: Kinds, source: str) -> tuple[str, int]:
    """Returns the node and the number of the output that "node" or "node.output" names."""
    name, _, output = source.partition(".")
    names = [found for found, _ in kinds[nodes[name].kind].outputs]
    return name, names.index(output) if output else 0


def ui_nodes(workflow: Workflow, kinds: Kinds, links: _Links, boxes: Mapping[str, Box]) -> list[dict[str, Any]]:
    """Returns the nodes as the front end keeps them."""
    return [_ui_node(name, node, kinds[node.kind], links, boxes[name]) for name, node in workflow.nodes.items()]


def _ui_node(name: str, node: Node, kind: Kind, links: _Links, box: Box) -> dict[str, Any]:
    inputs: list[dict[str, Any]] = []
    for slot, (io_type, optional) in kind.sockets.items():
        shape = {"shape": 7} if optional else {}
        inputs.append({"name": slot, "type": io_type, **shape, "link": links.taken.get((name, slot))})
    for slot, (io_type, optional, *_) in kind.widgets.items():
        shape = {"shape": 7} if optional else {}
        link = links.taken.get((name, slot))
        if slot:
            inputs.append({"name": slot, "type": io_type, **shape, "widget": {"name": slot}, "link": link})
    outputs = [
        {"name": label, "type": io_type, "links": links.made.get((name, i))}
        for i, (label, io_type) in enumerate(kind.outputs)
    ]
    found = {
        "id": links.ids[name],
        "type": node.kind,
        "pos": list(box[:2]),
        "size": list(box[2:]),
        "flags": {},
        "order": links.ids[name] - 1,
        "mode": _OFF if node.off else 0,
        "inputs": inputs,
        "outputs": outputs,
        **({"title": node.title} if node.title else {}),
        "properties": _properties(node, kind),
        "widgets_values": widget_values(node, kind),
    }
    if colors := _colors(node):
        found |= {"color": colors[0], "bgcolor": colors[1]}
    return found


def _properties(node: Node, kind: Kind) -> dict[str, Any]:
    if node.kind == "MarkdownNote":
        return {}
    pack = "magi1-local" if kind.ours else "comfy-core"
    models = {"models": [dict(model) for model in node.models]} if node.models else {}
    return {"Node name for S&R": node.kind, "cnr_id": pack, "ver": _VERSIONS[pack], **models}


def _colors(node: Node) -> tuple[str, str] | None:
    if node.kind == "MarkdownNote":
        return NOTE
    own_prompt = node.kind == "Magi1TextEncode" and "prompt" not in node.links
    return PROMPT if own_prompt or node.kind == "PrimitiveStringMultiline" else None


def widget_values(node: Node, kind: Kind) -> list[Any]:
    """Returns a node's widget values by position; a seed is followed by what becomes of it for the next run."""
    if unknown := set(node.values) - {*kind.widgets, "control"}:
        raise KeyError(f"{node.kind} has no {sorted(unknown)}")
    values: list[Any] = []
    for slot, (_, _, default, controlled) in kind.widgets.items():
        values.append(node.values.get(slot, default))
        if controlled:
            values.append(node.values.get("control", "fixed"))
    return [*values, *kind.extra]


def ui_file(workflow: Workflow, ours: Kinds) -> dict[str, Any]:
    """Returns the workflow as the front end saves it."""
    kinds = {**NATIVE, **ours}
    links = _Links(workflow.nodes, kinds)
    boxes, frames = layout(workflow)
    return {
        **_envelope(workflow.name, len(workflow.nodes), len(links.all)),
        "nodes": ui_nodes(workflow, kinds, links, boxes),
        "links": [[n, links.ids[a], output, links.ids[b], slot, kind] for n, a, output, b, slot, kind in links.all],
        "groups": _groups(frames),
        "config": {},
        "extra": {"ds": {"scale": 0.8, "offset": [80, 80]}, "frontendVersion": "1.27.10"},
        "version": 0.4,
    }


def _envelope(name: str, nodes: int, links: int) -> dict[str, Any]:
    return {"id": identity(name), "revision": 0, "last_node_id": nodes, "last_link_id": links}


def _groups(frames: list[tuple[Group, Box]]) -> list[dict[str, Any]]:
    return [
        {"id": n, "title": group.title, "bounding": list(box), "color": group.color, "font_size": 24, "flags": {}}
        for n, (group, box) in enumerate(frames, 1)
    ]


def api_file(workflow: Workflow, ours: Kinds, titles: Mapping[str, str]) -> dict[str, Any]:
    """Returns the workflow as the server takes it, without what is off; `titles` are those of our nodes."""
    kinds, nodes = {**NATIVE, **ours}, workflow.nodes
    ids = _Links(nodes, kinds).ids
    found = {}
    for name, node in nodes.items():
        if node.off or node.kind == "MarkdownNote":
            continue
        kind = kinds[node.kind]
        values = {slot: node.values.get(slot, default) for slot, (_, _, default, _) in kind.widgets.items()}
        for slot, source in node.links.items():
            origin, output = _through_bypassed(nodes, kinds, *source_of(nodes, kinds, source))
            values[slot] = [str(ids[origin]), output]
        title = node.title or titles.get(node.kind, node.kind)
        found[str(ids[name])] = {"inputs": values, "class_type": node.kind, "_meta": {"title": title}}
    return found


def _through_bypassed(nodes: Mapping[str, Node], kinds: Kinds, name: str, output: int) -> tuple[str, int]:
    """Returns what really comes from an output: a bypassed node passes on its first input of the same type."""
    while nodes[name].off:
        kind, io_type = kinds[nodes[name].kind], kinds[nodes[name].kind].outputs[output][1]
        slot = next(slot for slot, (given, _) in kind.sockets.items() if given == io_type)
        name, output = source_of(nodes, kinds, nodes[name].links[slot])
    return name, output


def blueprint_file(blueprint: Blueprint, ours: Kinds) -> dict[str, Any]:
    """Returns a subgraph in a workflow of its own, as the front end publishes one."""
    kinds = {**NATIVE, **ours}
    inner = _inside(blueprint)
    links, (boxes, frames) = _Links(inner.nodes, kinds), layout(inner)
    own = identity(f"blueprint/{blueprint.title}")
    ports = _Ports(blueprint, inner.nodes, kinds, links)
    width = max(x + w for x, _, w, _ in boxes.values())
    count, wires = len(inner.nodes), len(links.all) + len(ports.links)
    within = [(n, links.ids[a], out, links.ids[b], slot, kind) for n, a, out, b, slot, kind in links.all]
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    definition = {
        "id": own,
        "version": 1,
        "state": {"lastGroupId": len(frames), "lastNodeId": count, "lastLinkId": wires, "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": blueprint.title,
        "inputNode": {"id": _INPUT, "bounding": [-240, 0, 140, 40 + 20 * len(ports.inputs)]},
        "outputNode": {"id": _OUTPUT, "bounding": [width + 140, 0, 120, 40 + 20 * len(ports.outputs)]},
        "inputs": [
            {"id": identity(f"{own}/in/{key}"), **port, "linkIds": numbers, "pos": [-120, 20 + 20 * i]}
            for i, (key, port, numbers) in enumerate(ports.inputs)
        ],
        "outputs": [
            {"id": identity(f"{own}/out/{key}"), **port, "linkIds": numbers, "pos": [width + 160, 20 + 20 * i]}
            for i, (key, port, numbers) in enumerate(ports.outputs)
        ],
        "widgets": [],
        "nodes": ui_nodes(inner, kinds, links, boxes),
        "groups": _groups(frames),
        "links": [dict(zip(names, row, strict=True)) for row in (*within, *ports.links)],
        "extra": {},
        "category": "MAGI-1",
        "description": blueprint.description,
    }
    instance = {
        "id": count + 1,
        "type": own,
        "pos": [0, 0],
        "size": [400, 60 + 30 * len(ports.inputs)],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": ports.shown,
        "outputs": [{**port, "links": None} for _, port, _ in ports.outputs],
        "title": blueprint.title,
        "properties": {"proxyWidgets": ports.promoted, "cnr_id": "magi1-local", "ver": _VERSIONS["magi1-local"]},
        "widgets_values": [],
    }
    return {
        **_envelope(f"blueprint file/{blueprint.title}", count + 1, wires),
        "nodes": [instance],
        "links": [],
        "groups": [],
        "definitions": {"subgraphs": [definition]},
        "config": {},
        "extra": {},
        "version": 0.4,
    }


class _Ports:
    """What a subgraph shows of itself, and the links from and to that, which continue those inside.

    Attributes:
        inputs: (what is fed, {name, type}, links).
        outputs: (what is given, {name, type}, links).
        shown: the inputs as its node on the canvas has them.
        promoted: [node, widget] of those that are widgets.
        links: (link, from, output, to, input, type).
    """

    def __init__(self, blueprint: Blueprint, nodes: Mapping[str, Node], kinds: Kinds, links: _Links) -> None:
        """Notes the new links in `links.taken` and `links.made`, too."""
        self.inputs: list[tuple[str, dict[str, str], list[int]]] = []
        self.outputs: list[tuple[str, dict[str, str], list[int]]] = []
        self.shown: list[dict[str, Any]] = []
        self.promoted: list[list[str]] = []
        self.links: list[tuple[int, int, int, int, int, str]] = []
        number = len(links.all)
        for i, targets in enumerate(blueprint.inputs):
            numbers = []
            for target in reversed(targets.split("+")):  # the first one, which comes last, gives the port its name
                name, _, slot = target.partition(".")
                kind = kinds[nodes[name].kind]
                is_widget = slot in kind.widgets
                io_type = kind.widgets[slot][0] if is_widget else kind.sockets[slot][0]
                number += 1
                numbers.append(number)
                links.taken[name, slot] = number
                at = [*kind.sockets, *kind.widgets].index(slot)
                self.links.append((number, _INPUT, i, links.ids[name], at, io_type))
            port = {"name": slot, "type": io_type.partition(",")[0]}
            self.inputs.append((targets, port, numbers))
            self.shown.append({**port, **({"widget": {"name": slot}} if is_widget else {}), "link": None})
            self.promoted += [[str(links.ids[name]), slot]] if is_widget else []
        for i, source in enumerate(blueprint.outputs):
            name, output = source_of(nodes, kinds, source)
            label, io_type = kinds[nodes[name].kind].outputs[output]
            number += 1
            links.made.setdefault((name, output), []).append(number)
            self.links.append((number, links.ids[name], output, _OUTPUT, i, io_type))
            self.outputs.append((source, {"name": label, "type": io_type}, [number]))


def _inside(blueprint: Blueprint) -> Workflow:
    """Returns the workflow of the nodes that a blueprint takes, without links from others and without empty groups."""
    whole = blueprint.workflow
    kept = set(whole.nodes) - set(blueprint.without)
    nodes = {name: _linked_to(kept, node) for name, node in whole.nodes.items() if name in kept}
    rows = []
    for row in whole.rows:
        stacks = [[group for group in map(partial(_of, kept), stack) if group.columns] for stack in row]
        rows += [[stack for stack in stacks if stack]] if any(stacks) else []
    return Workflow(whole.name, nodes, rows)


def _of(kept: set[str], group: Group) -> Group:
    columns = [[name for name in column if name in kept] for column in group.columns]
    return replace(group, columns=[column for column in columns if column])


def _linked_to(kept: set[str], node: Node) -> Node:
    """Returns a node without the links that come from others than `kept`."""
    links = {slot: source for slot, source in node.links.items() if source.partition(".")[0] in kept}
    return replace(node, links=links)

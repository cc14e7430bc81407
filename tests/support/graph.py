"""Runs API-format graphs of V3 nodes as ComfyUI does: validation, order, cached outputs, hidden values, cancel."""

import asyncio
import inspect
from dataclasses import dataclass
from typing import Any

import torch

Graph = dict[str, dict[str, Any]]  # {id: {"class_type": ..., "inputs": {name: value or [id, output]}}}
CONVERT = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}


class InvalidGraph(Exception):
    """Refused before anything ran; `errors` is {id: ["type: details"]}."""

    def __init__(self, errors: dict[str, list[str]]) -> None:
        super().__init__("\n".join(f"{node}: {e}" for node, all_of_it in errors.items() for e in all_of_it))
        self.errors = errors


@dataclass
class NodeError(Exception):
    """A node raised an error, as the user gets to see it."""

    node: str
    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.node}: {self.kind}: {self.message}"


@dataclass
class Interrupted(Exception):
    """The user's cancel arrived while this node ran."""

    node: str


def is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def links(node: dict[str, Any]) -> list[str]:
    """The ids of the nodes that a node takes something from."""
    return [value[0] for value in node["inputs"].values() if is_link(value)]


def _overridden(cls: type, name: str) -> bool:
    return any(name in base.__dict__ for base in cls.__mro__[: -len(_base(cls).__mro__)])


def _base(cls: type) -> type:
    return next(base for base in cls.__mro__ if base.__name__ == "ComfyNode")


class GraphRunner:
    """Keeps the outputs of the last graph: what has not changed is not run again."""

    def __init__(self, classes: dict[str, type], management: Any) -> None:
        self.classes, self.management = classes, management
        self.running: str | None = None
        self.executed: list[str] = []
        self._outputs: dict[Any, tuple] = {}
        self._ui: dict[Any, dict[str, list]] = {}
        self.shown: dict[str, dict[str, list]] = {}

    # -- validation ---------------------------------------------------------------------------------------------------

    def errors(self, graph: Graph) -> dict[str, list[str]]:
        """{id: ["type: details"]} of nodes that would be refused."""
        if unknown := {i: n["class_type"] for i, n in graph.items() if n["class_type"] not in self.classes}:
            return {node: [f"invalid_prompt: node {name} does not exist"] for node, name in unknown.items()}
        found = {id: self._errors_of(graph, id) for id in graph}
        return {id: errors for id, errors in found.items() if errors}

    def _errors_of(self, graph: Graph, id: str) -> list[str]:
        node, errors, received = graph[id], [], {}
        cls = self.classes[node["class_type"]]
        info = cls.GET_NODE_INFO_V1()["input"]
        own_check = inspect.getfullargspec(cls.validate_inputs) if _overridden(cls, "validate_inputs") else None
        taken = set(own_check.args[1:]) if own_check else set()
        for name, (kind, options) in (info["required"] | info.get("optional", {})).items():
            if name not in node["inputs"]:
                errors += [f"required_input_missing: {name}"] if name in info["required"] else []
                continue
            value = node["inputs"][name]
            if isinstance(value, list):
                received[name] = self._linked_type(graph, value)
                if "input_types" not in taken and not _fits(received[name], kind):
                    errors.append(f"return_type_mismatch: {name}, received_type({received[name]}) input_type({kind})")
                continue
            try:
                value = node["inputs"][name] = CONVERT.get(kind, lambda v: v)(value)
            except (TypeError, ValueError) as error:
                errors.append(f"invalid_input_type: {name}, {value}, {error}")
                continue
            if name not in taken and not (own_check and own_check.varkw):
                errors += _out_of_range(name, value, options)
        if own_check:
            values = {k: None if is_link(v) else v for k, v in node["inputs"].items() if k in taken or own_check.varkw}
            values |= {"input_types": received} if "input_types" in taken else {}
            verdict = cls.validate_inputs(**values)
            errors += [] if verdict is True else [f"custom_validation_failed: {verdict}"]
        return errors

    def _linked_type(self, graph: Graph, link: list) -> str:
        return self.classes[graph[link[0]]["class_type"]].GET_NODE_INFO_V1()["output"][link[1]]

    # -- execution ----------------------------------------------------------------------------------------------------

    def run(self, graph: Graph) -> dict[str, tuple]:
        """{id: outputs} of all nodes.

        Raises:
            InvalidGraph, NodeError, Interrupted
        """
        if errors := self.errors(graph):
            raise InvalidGraph(errors)
        self.management.interrupt_current_processing(False)
        keys = {id: self._key(graph, id) for id in graph}
        self._outputs = {key: value for key, value in self._outputs.items() if key in keys.values()}
        self.executed = []
        self._ui = {key: value for key, value in self._ui.items() if key in keys.values()}
        with torch.inference_mode():
            for id in _in_order(graph):
                if keys[id] not in self._outputs:
                    self._outputs[keys[id]] = self._execute(graph, id, keys)
        self.shown = {id: self._ui[key] for id, key in keys.items() if key in self._ui}
        return {id: self._outputs[key] for id, key in keys.items()}

    def _key(self, graph: Graph, id: str) -> Any:
        """What a node's outputs depend on: itself and all before it."""
        node = graph[id]
        cls = self.classes[node["class_type"]]
        inputs = tuple(
            (name, (self._key(graph, value[0]), value[1]) if is_link(value) else repr(value))
            for name, value in sorted(node["inputs"].items())
        )
        changed = None
        if _overridden(cls, "fingerprint_inputs"):
            changed = repr(cls.fingerprint_inputs(**{k: None if is_link(v) else v for k, v in node["inputs"].items()}))
        own_id = id if "unique_id" in cls.GET_NODE_INFO_V1()["input"].get("hidden", {}) else None
        return node["class_type"], own_id, changed, inputs

    def _execute(self, graph: Graph, id: str, keys: dict[str, Any]) -> tuple:
        node, cls = graph[id], self.classes[graph[id]["class_type"]]
        inputs = {k: self._outputs[keys[v[0]]][v[1]] if is_link(v) else v for k, v in node["inputs"].items()}
        known = {"unique_id": id, "dynprompt": _DynamicPrompt(_with_sinks(graph))}
        hidden = {h: known[h.name] for h in cls.GET_SCHEMA().hidden or [] if h.name in known}
        self.running = id
        self.executed.append(id)
        try:
            self.management.throw_exception_if_processing_interrupted()
            made = cls.PREPARE_CLASS_CLONE(hidden).execute(**inputs)
            made = asyncio.run(_awaited(made)) if inspect.isawaitable(made) else made
            if made.ui:
                self._ui[keys[id]] = made.ui
            return made.args
        except self.management.InterruptProcessingException as error:
            raise Interrupted(id) from error
        except Exception as error:
            raise NodeError(id, type(error).__name__, str(error)) from error
        finally:
            self.running = None


@dataclass
class _DynamicPrompt:
    """The graph as nodes see it."""

    graph: Graph

    def all_node_ids(self) -> set[str]:
        return set(self.graph)

    def get_node(self, id: str) -> dict:
        return self.graph[id]


def _with_sinks(graph: Graph) -> Graph:
    """The graph with an output node at every end, as all of it runs."""
    used = {source for node in graph.values() for source in links(node)}
    return graph | {f"sink {id}": {"class_type": "Sink", "inputs": {"any": [id, 0]}} for id in graph if id not in used}


async def _awaited(made: Any) -> Any:
    return await made


def _fits(received: str, wanted: str) -> bool:
    a, b = set(received.split(",")), set(wanted.split(","))
    return "*" in a | b or bool(a & b)


def _out_of_range(name: str, value: Any, options: dict[str, Any]) -> list[str]:
    if "min" in options and value < options["min"]:
        return [f"value_smaller_than_min: {name}: {value} < {options['min']}"]
    if "max" in options and value > options["max"]:
        return [f"value_bigger_than_max: {name}: {value} > {options['max']}"]
    if "options" in options and value not in options["options"]:
        return [f"value_not_in_list: {name}: {value!r} not in {options['options']}"]
    return []


def _in_order(graph: Graph) -> list[str]:
    """Ids, each after those it takes something from."""
    order: list[str] = []

    def visit(id: str, below: tuple[str, ...]) -> None:
        if id in below:
            raise InvalidGraph({id: ["dependency cycle"]})
        if id not in order:
            for source in links(graph[id]):
                visit(source, (*below, id))
            order.append(id)

    for id in graph:
        visit(id, ())
    return order

"""The pack inside a ComfyUI: the stand-in of `comfy_stand_in`, or with COMFYUI_PATH a real one, both used the same way."""

import asyncio
import copy
import importlib
import importlib.util
import inspect
import io
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from tests.support.paths import ROOT, TESTS

from .graph import Graph, GraphRunner, Interrupted, InvalidGraph, NodeError, links

STAND_IN = TESTS / "support" / "comfy_stand_in"
COMFYUI = os.environ.get("COMFYUI_PATH")
PACK = str(ROOT).replace(".", "_x_")  # as ComfyUI names the module of a custom node folder
FOLDERS = ("models", "input", "output", "temp", "user", "custom_nodes")


@dataclass
class Events:
    """What the front end was told, in order.

    Attributes:
        progress: (node, value, total).
        previews: (node, format, picture, largest side).
        texts: (node, text).
        seen: called with ("progress" or "text", node) at each; a test may cancel here.
    """

    progress: list[tuple[str, float, float]] = field(default_factory=list)
    previews: list[tuple[str, str, Image.Image, int | None]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    seen: Callable[[str, str], None] | None = None

    def clear(self) -> None:
        for kept in (self.progress, self.previews, self.texts):
            kept.clear()

    def on_progress(self, node: str, value: float, total: float, preview: Any) -> None:
        self.progress.append((node, value, total))
        if preview is not None:
            self.previews.append((node, *preview))
        if self.seen:
            self.seen("progress", node)

    def on_text(self, node: str, text: str) -> None:
        self.texts.append((node, text))
        if self.seen:
            self.seen("text", node)


class Comfy:
    """One ComfyUI with the pack in it.

    Attributes:
        base: its --base-directory.
        nodes: the pack's classes by id.
        management: comfy.model_management.
        executed: ids of the nodes that the last run executed; the others came from the cache.
    """

    real = False

    def __init__(self, base: Path) -> None:
        self.base = base
        self.events = Events()
        self.nodes: dict[str, type] = {}
        self.management: Any = importlib.import_module("comfy.model_management")
        utils = importlib.import_module("comfy.utils")
        utils.set_progress_bar_global_hook(self._on_progress)

    def module(self, name: str) -> Any:
        """One of the pack's modules, for example "nodes.comfyui.host"."""
        return importlib.import_module(f"{PACK}.{name}")

    def info(self, node: str) -> dict[str, Any]:
        """What the front end is told about a node."""
        return self.nodes[node].GET_NODE_INFO_V1()

    def constant(self, io_type: str, value: Any) -> str:
        """The class name of a new node without inputs whose output is `value`."""
        api = importlib.import_module("comfy_api.latest").io
        name = f"Constant{io_type.title()}{id(value)}"
        schema = api.Schema(name, inputs=[], outputs=[api.Custom(io_type).Output()])
        body = {
            "define_schema": classmethod(lambda cls: schema),
            "execute": classmethod(lambda cls: api.NodeOutput(value)),
        }
        self.add(name, type(name, (api.ComfyNode,), body))
        return name

    def add(self, name: str, cls: type) -> None:
        """Makes another node known."""
        raise NotImplementedError

    def errors(self, graph: Graph) -> dict[str, list[str]]:
        """Validation's findings: {id: ["type: details"]}."""
        raise NotImplementedError

    def run(self, graph: Graph) -> dict[str, tuple]:
        """Queues a graph and waits: {id: outputs}. Raises InvalidGraph, NodeError or Interrupted."""
        raise NotImplementedError

    @property
    def executed(self) -> list[str]:
        raise NotImplementedError

    @property
    def shown(self) -> dict[str, dict[str, list]]:
        """The UI outputs of the last run, of nodes from the cache, too: {id: {kind: values}}."""
        raise NotImplementedError

    def current_node(self) -> str | None:
        raise NotImplementedError

    def _on_progress(self, value: float, total: float, preview: Any = None, node_id: str | None = None) -> None:
        self.management.throw_exception_if_processing_interrupted()
        node = self.current_node() if node_id is None else node_id
        self.events.on_progress(str(node), value, total, preview)


class StandIn(Comfy):
    """The stand-in: needs nothing installed."""

    def __init__(self, base: Path) -> None:
        folders = importlib.import_module("folder_paths")
        folders.use_base(base)
        server = importlib.import_module("server").PromptServer()
        server.send_sync = lambda event, data, sid=None: event == "progress_text" and self.events.on_text(*data)
        super().__init__(base)
        self.nodes = load_pack()
        native = importlib.import_module("native_nodes").all_nodes()
        classes = importlib.import_module("nodes").NODE_CLASS_MAPPINGS
        classes |= native | self.nodes | {"Sink": type("Sink", (), {"OUTPUT_NODE": True})}
        self._runner = GraphRunner(classes, self.management)
        self.errors, self.run = self._runner.errors, self._runner.run

    def add(self, name: str, cls: type) -> None:
        self._runner.classes[name] = cls

    @property
    def executed(self) -> list[str]:
        return self._runner.executed

    @property
    def shown(self) -> dict[str, dict[str, list]]:
        return self._runner.shown

    def current_node(self) -> str | None:
        return self._runner.running


def load_pack() -> dict[str, type]:
    """Imports the repository as ComfyUI imports a custom node folder: {id: class}."""
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec
    assert spec.loader
    pack = sys.modules[PACK] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    extension = asyncio.run(pack.comfy_entrypoint())
    return {cls.GET_SCHEMA().node_id: cls for cls in asyncio.run(extension.get_node_list())}


class RealComfy(Comfy):
    """A real ComfyUI in this process: its own loader, validation and executor, on the CPU."""

    real = True

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self._nodes, self._execution = importlib.import_module("nodes"), importlib.import_module("execution")
        point_folders_at(base)
        server = importlib.import_module("server")
        self._server = getattr(server.PromptServer, "instance", None) or server.PromptServer(asyncio.new_event_loop())
        self._server.send_sync = self._on_message
        before = dict(self._nodes.NODE_CLASS_MAPPINGS)
        assert asyncio.run(self._nodes.load_custom_node(str(ROOT))), "ComfyUI's loader refused the pack"
        self.nodes = {k: v for k, v in self._nodes.NODE_CLASS_MAPPINGS.items() if before.get(k) is not v}
        self._add_sink()
        options = inspect.signature(self._execution.PromptExecutor).parameters
        extra = {"cache_args": {"lru": 0, "ram": 16.0, "ram_inactive": 0}} if "cache_args" in options else {}
        self._executor = self._execution.PromptExecutor(self._server, **extra)
        self._executed: list[str] = []

    def _add_sink(self) -> None:
        """An output node that takes anything: without one, ComfyUI runs nothing."""
        api = importlib.import_module("comfy_api.latest").io
        schema = api.Schema("Sink", inputs=[api.AnyType.Input("value")], outputs=[], is_output_node=True)
        body = {
            "define_schema": classmethod(lambda cls: schema),
            "execute": classmethod(lambda cls, value: api.NodeOutput(ui={"done": [True]})),
        }
        self.add("Sink", type("Sink", (api.ComfyNode,), body))

    def add(self, name: str, cls: type) -> None:
        cls.GET_SCHEMA()
        self._nodes.NODE_CLASS_MAPPINGS[name] = cls

    def _with_sinks(self, graph: Graph) -> Graph:
        used = {source for node in graph.values() for source in links(node)}
        classes = self._nodes.NODE_CLASS_MAPPINGS
        ends = [id for id, n in graph.items() if id not in used and not _is_output(classes.get(n["class_type"]))]
        sinks = {f"sink {id}": {"class_type": "Sink", "inputs": {"value": [id, 0]}} for id in ends}
        return copy.deepcopy(graph) | sinks  # ComfyUI writes into it

    def errors(self, graph: Graph) -> dict[str, list[str]]:
        return self._validate(self._with_sinks(graph))[1]

    def _validate(self, graph: Graph) -> tuple[list[str], dict[str, list[str]]]:
        valid, error, outputs, per_node = asyncio.run(self._execution.validate_prompt("test", graph, None))
        errors = {
            id: [f"{e['type']}: {e['details']}" for e in found["errors"]]
            for id, found in per_node.items()
            if found["errors"]
        }
        if not valid and not errors:
            errors = {"": [f"{error['type']}: {error['message']}"]}
        return outputs, errors

    def run(self, graph: Graph) -> dict[str, tuple]:
        whole = self._with_sinks(graph)
        outputs, errors = self._validate(whole)
        if errors:
            raise InvalidGraph(errors)
        self._executed.clear()
        self._executor.execute(whole, "test", {"client_id": "test"}, outputs)
        for event, data in self._executor.status_messages:
            if event == "execution_interrupted":
                raise Interrupted(data["node_id"])
            if event == "execution_error":
                kind = data["exception_type"].rpartition(".")[2]
                raise NodeError(data["node_id"], kind, data["exception_message"].strip())
        return {id: self._outputs_of(id) for id in graph}

    def _outputs_of(self, id: str) -> tuple:
        cached = self._executor.caches.outputs.get(id)
        if inspect.isawaitable(cached):  # newer versions answer with a coroutine
            cached = asyncio.run(cached)
        lists = getattr(cached, "outputs", cached)  # newer versions keep more than the outputs
        return tuple(values[0] for values in lists)

    @property
    def executed(self) -> list[str]:
        return [id for id in self._executed if not id.startswith("sink ")]

    @property
    def shown(self) -> dict[str, dict[str, list]]:
        outputs = self._executor.history_result["outputs"]
        return {id: output for id, output in outputs.items() if not id.startswith("sink ")}

    def current_node(self) -> str | None:
        return self._server.last_node_id

    def _on_message(self, event: Any, data: Any, sid: str | None = None) -> None:
        if event == "executing" and data["node"] is not None:
            self._executed.append(data["node"])
        elif event == importlib.import_module("protocol").BinaryEventTypes.TEXT:
            (size,) = struct.unpack(">I", data[:4])
            self.events.on_text(data[4 : 4 + size].decode(), data[4 + size :].decode())


def _is_output(cls: type | None) -> bool:
    return bool(getattr(cls, "OUTPUT_NODE", False))


def point_folders_at(base: Path) -> None:
    """What --base-directory does, for a ComfyUI that is already running."""
    folders = importlib.import_module("folder_paths")
    old = Path(folders.models_dir)
    for name, (paths, extensions) in list(folders.folder_names_and_paths.items()):
        moved = [str(base / "models" / Path(p).relative_to(old)) for p in paths if Path(p).is_relative_to(old)]
        folders.folder_names_and_paths[name] = (moved, extensions)
    folders.models_dir = str(base / "models")
    folders.filename_list_cache.clear()
    for kind in ("input", "output", "temp", "user"):
        getattr(folders, f"set_{kind}_directory")(str(base / kind))


def import_real() -> None:
    """Imports ComfyUI once per process: on the CPU, with the native nodes that the workflows use."""
    if "comfy.options" in sys.modules:
        return
    arguments, sys.argv = sys.argv, ["main.py", "--cpu"]
    try:
        importlib.import_module("comfy.options").enable_args_parsing()
        importlib.import_module("comfy.cli_args").args.front_end_root = str(STAND_IN)  # no browser comes
    finally:
        sys.argv = arguments
    importlib.import_module("utils.install_util")  # first, as main.py does: `nodes` puts another `utils` on the path
    nodes = importlib.import_module("nodes")
    for name in ("video", "hunyuan", "images", "primitive", "preview_any"):
        extra = Path(COMFYUI or "") / "comfy_extras" / f"nodes_{name}.py"
        assert asyncio.run(nodes.load_custom_node(str(extra), module_parent="comfy_extras")), extra


def _forget(prefix: str) -> None:
    for name in [n for n in sys.modules if n == prefix or n.startswith(prefix + ".")]:
        del sys.modules[name]


def _forget_stand_in() -> None:
    for name in ("comfy", "comfy_api", "folder_paths", "server", "native_nodes", "nodes"):
        _forget(name)


def open_comfy(base: Path, embedded: Path) -> Iterator[Comfy]:
    """For a fixture: a ComfyUI whose base directory holds the files of `embedded`, gone again afterwards."""
    for name in FOLDERS:
        (base / name).mkdir(parents=True)
    shutil.copytree(embedded, base / "user" / "magi1")  # so that not every test has to make them
    path = COMFYUI or str(STAND_IN)
    sys.path.insert(0, path)
    try:
        if COMFYUI:
            import_real()
        comfy = RealComfy(base) if COMFYUI else StandIn(base)
        yield comfy
        comfy.management.unload_all_models()
    finally:
        sys.path.remove(path)
        _forget(PACK)
        if not COMFYUI:
            _forget_stand_in()
        shutil.rmtree(base / "user", ignore_errors=True)


def jpeg(picture: Image.Image) -> bytes:
    """The preview as it goes over the wire."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG")
    return buffer.getvalue()

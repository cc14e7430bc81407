"""Inputs, outputs and sizes of the nodes: ours as they describe themselves, ComfyUI's own from a table."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.support.comfy_host import STAND_IN, load_pack
from tests.support.magi_graphs import WIDGETS

# Width and height, with room for what is shown under a node, for all widgets, and in the larger nodes of the newer front end.
SIZES = {
    "Magi1ModelLoader": (300, 214),
    "Magi1TextEncoderLoader": (300, 166),
    "Magi1VAELoader": (300, 142),
    "Magi1MemoryOptions": (300, 172),
    "Magi1TextEncode": (340, 392),
    "Magi1TextToVideo": (340, 172),
    "Magi1ImageToVideo": (340, 230),
    "Magi1VideoToVideo": (340, 282),
    "Magi1DemoImage": (340, 88),
    "Magi1Sampler": (320, 592),
    "Magi1VAEDecode": (340, 394),
    "Magi1Remote": (400, 540),
    "SaveVideo": (340, 440),
    "LoadVideo": (340, 140),
    "CLIPLoader": (300, 142),
    "PrimitiveStringMultiline": (340, 180),
    "PreviewAny": (320, 140),
    "UpscaleModelLoader": (340, 62),
    "ImageUpscaleWithModel": (340, 60),
    "FrameInterpolationModelLoader": (340, 62),
    "FrameInterpolate": (340, 82),
    "CreateVideo": (340, 110),
}


@dataclass(frozen=True)
class Kind:
    """A kind of node.

    Attributes:
        sockets: {input: (type, optional)}.
        widgets: {input: (type, optional, default, whether the front end adds a control for the next run)}.
        outputs: [(name, type)].
        extra: values that the front end adds behind those of the widgets.
    """

    sockets: Mapping[str, tuple[str, bool]]
    widgets: Mapping[str, tuple[str, bool, Any, bool]]
    outputs: list[tuple[str, str]]
    extra: tuple[Any, ...] = ()
    ours: bool = False


def _native(sockets: dict[str, str], widgets: dict[str, tuple[str, Any]], outputs: list[str], *extra: Any) -> Kind:
    return Kind(
        {name: (kind, name == "audio") for name, kind in sockets.items()},
        {name: (kind, False, default, False) for name, (kind, default) in widgets.items()},
        [(kind, kind) for kind in outputs],
        extra,
    )


NATIVE = {
    "LoadVideo": _native({}, {"file": ("COMBO", "")}, ["VIDEO"], "image"),
    "SaveVideo": _native(
        {"video": "VIDEO"},
        {"filename_prefix": ("STRING", "video/ComfyUI"), "format": ("COMBO", "auto"), "codec": ("COMBO", "auto")},
        [],
    ),
    "CreateVideo": _native({"images": "IMAGE", "audio": "AUDIO"}, {"fps": ("FLOAT", 30)}, ["VIDEO"]),
    "CLIPLoader": _native(
        {}, {"clip_name": ("COMBO", ""), "type": ("COMBO", "mochi"), "device": ("COMBO", "default")}, ["CLIP"]
    ),
    "PrimitiveStringMultiline": _native({}, {"value": ("STRING", "")}, ["STRING"]),
    "PreviewAny": _native({"source": "*"}, {}, []),
    "UpscaleModelLoader": _native({}, {"model_name": ("COMBO", "")}, ["UPSCALE_MODEL"]),
    "ImageUpscaleWithModel": _native({"upscale_model": "UPSCALE_MODEL", "image": "IMAGE"}, {}, ["IMAGE"]),
    "FrameInterpolationModelLoader": _native({}, {"model_name": ("COMBO", "")}, ["INTERP_MODEL"]),
    "FrameInterpolate": _native(
        {"interp_model": "INTERP_MODEL", "images": "IMAGE"}, {"multiplier": ("INT", 2)}, ["IMAGE"]
    ),
    "MarkdownNote": _native({}, {"": ("STRING", "")}, []),
}


def load_ours() -> tuple[dict[str, Kind], dict[str, str]]:
    """Returns the pack's nodes and their titles, loaded into the stand-in for ComfyUI with nothing installed."""
    if str(STAND_IN) not in sys.path:
        sys.path.insert(0, str(STAND_IN))
    with TemporaryDirectory() as folder:
        import_module("folder_paths").use_base(Path(folder))
        nodes = load_pack()
        titles = {name: cls.GET_NODE_INFO_V1()["display_name"] for name, cls in nodes.items()}
        return kinds_of(nodes), titles


def kinds_of(nodes: Mapping[str, Any]) -> dict[str, Kind]:
    """Returns the kinds of V3 nodes {id: class}."""
    return {name: _kind_of(cls.GET_NODE_INFO_V1()) for name, cls in nodes.items()}


def _kind_of(info: Mapping[str, Any]) -> Kind:
    sockets, widgets = {}, {}
    for optional in (False, True):
        for name, (kind, options) in info["input"].get("optional" if optional else "required", {}).items():
            if kind not in WIDGETS:
                sockets[name] = (kind, optional)
                continue
            default = options.get("default", options["options"][0] if "options" in options else None)
            widgets[name] = (kind, optional, default, bool(options.get("control_after_generate")))
    outputs = list(zip(info["output_name"], info["output"], strict=True))
    return Kind(sockets, widgets, outputs, ours=True)

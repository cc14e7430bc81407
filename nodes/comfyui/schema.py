"""What the nodes' schemas share."""

import dataclasses
from typing import Any

from comfy_api.latest import io

CATEGORY = "MAGI-1"
Model = io.Custom("MAGI1_MODEL")
Memory = io.Custom("MAGI1_MEMORY")
TextEncoder = io.Custom("MAGI1_TEXT_ENCODER")


def schema(node_id: str, display_name: str, aliases: list[str], **rest: Any) -> io.Schema:
    """Returns a schema in our category; with search aliases only where this ComfyUI knows them."""
    if "search_aliases" in {field.name for field in dataclasses.fields(io.Schema)}:
        rest["search_aliases"] = aliases
    return io.Schema(node_id=node_id, display_name=display_name, category=CATEGORY, **rest)


def advanced(widget: Any) -> Any:
    """Returns an input marked as one for experts, shown on demand; older ComfyUIs have no argument for that."""
    widget.extra_dict = {**(widget.extra_dict or {}), "advanced": True}
    return widget

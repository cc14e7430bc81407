"""What the nodes' schemas share."""

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, TypeVar, cast

from comfy_api.latest import io

from ...magi.errors import MagiError

F = TypeVar("F", bound=Callable[..., Any])

CATEGORY = "MAGI-1"
Model = io.Custom("MAGI1_MODEL")
Memory = io.Custom("MAGI1_MEMORY")
TextEncoder = io.Custom("MAGI1_TEXT_ENCODER")


def schema(
    node_id: str,
    display_name: str,
    aliases: list[str],
    essentials: str | None = None,
    price: str | None = None,
    **rest: Any,
) -> io.Schema:
    """Returns a schema in our category, with what newer ComfyUIs know where this one does.

    Args:
        node_id: of the node; as for the others see `io.Schema`.
        display_name: its title.
        aliases: words to find it by.
        essentials: the group of the essential nodes to list it in.
        price: a few words on what a run costs, for a node that has a service do the work.
        rest: as `io.Schema` takes it.
    """
    newer: dict[str, Any] = {"search_aliases": aliases, "essentials_category": essentials}
    if rest.get("hidden"):  # it shows text, which is sent again when its results come from the cache
        newer["has_intermediate_output"] = True
    if price is not None and hasattr(io, "PriceBadge"):
        newer["price_badge"] = io.PriceBadge(expr=json.dumps({"type": "text", "text": price}))
    known = {field.name for field in dataclasses.fields(io.Schema)}
    rest |= {name: value for name, value in newer.items() if name in known and value is not None}
    return io.Schema(node_id=node_id, display_name=display_name, category=CATEGORY, **rest)


def advanced(widget: Any) -> Any:
    """Returns an input marked as one for experts, shown on demand; older ComfyUIs have no argument for that."""
    widget.extra_dict = {**(widget.extra_dict or {}), "advanced": True}
    return widget


def checked(execute: F) -> F:
    """Wraps a node's `execute`: what comes over a link is held to the limits that ComfyUI holds widgets to.

    It checks only what is typed in, and a length of -3 seconds from another node is as wrong.
    """

    @functools.wraps(execute)
    def checking(cls: Any, **values: Any) -> Any:
        check_values(cls.define_schema(), values)
        return execute(cls, **values)

    @functools.wraps(execute)
    async def checking_async(cls: Any, **values: Any) -> Any:
        check_values(cls.define_schema(), values)
        return await execute(cls, **values)

    return cast(F, checking_async if inspect.iscoroutinefunction(execute) else checking)


def check_values(schema: io.Schema, values: Mapping[str, Any]) -> None:
    """Raises MagiError for the first number outside its input's limits."""
    for part in schema.inputs:
        value, least, most = values.get(part.id), getattr(part, "min", None), getattr(part, "max", None)
        if isinstance(value, Real) and not (least is None or most is None or least <= value <= most):
            raise MagiError(f"{part.id} is {value}; it must be from {least} to {most}. Mend the node it comes from.")

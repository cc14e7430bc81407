"""Why a transformer gave NaN or infinity: looked into once that has happened, as it takes a look at every weight."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from ..system.finite import is_finite
from .model import Transformer


def explain(model: Transformer, on_progress: Callable[[float], None] | None = None) -> str:
    """Returns sentences on the likely cause and its remedy, for the message of an error.

    Args:
        model: that gave such numbers.
        on_progress: called after each layer with the fraction that was looked at; what it raises ends the search.
    """
    found = next(_faulty(model, on_progress), None)
    if found is not None:
        return f"The model's weights hold such numbers ({found}): its file is damaged. Download it again."
    if model.dtype == torch.float16:
        return "The weights are sound: float16 was exceeded, which ends at 65504. Choose bf16 or fp32."
    return (
        "The weights hold no such numbers, but may not be what they are taken for: base weights run as distilled ones or the "
        "reverse, or with another model's config. Choose another variant or file, or download it again."
    )


def _faulty(model: Transformer, on_progress: Callable[[float], None] | None) -> Iterator[str]:
    """Yields where weights are not finite."""
    yield from _faulty_names("", model.outer)
    with closing(iter(model.blocks)) as blocks:
        for layer, weights in enumerate(blocks):
            yield from _faulty_names(f"layer {layer}, ", weights)
            if on_progress:
                on_progress((layer + 1) / len(model.blocks))


def _faulty_names(prefix: str, weights: Any) -> Iterator[str]:
    for field in fields(weights):
        value, name = getattr(weights, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            yield from _faulty_names(f"{name}.", value)
        elif isinstance(value, torch.Tensor) and not is_finite(value):
            yield name

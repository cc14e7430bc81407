"""CUDA graphs: the many small kernels of a step, forwards and backwards, asked for at once.

For a model as small as this one the host takes longer to ask for the kernels than the card to run them.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from .windows import Tensors

T = TypeVar("T", bound=Tensors)


class Graphs:
    """A module that takes a tensor, which needs a gradient, and `Tensors`; for each of their shapes there is a graph."""

    def __init__(self, module: Callable[[], nn.Module]) -> None:
        """Takes what makes the module; its weights must be the same each time."""
        self._module = module
        self._graphs: dict[tuple[torch.Size, ...], Callable[..., torch.Tensor]] = {}

    def __call__(self, x: torch.Tensor, others: T) -> torch.Tensor:
        """Returns what the module returns."""
        tensors: list[torch.Tensor] = []
        others.each(lambda tensor: tensors.append(tensor) or tensor)
        shapes = tuple(tensor.shape for tensor in (x, *tensors))
        if shapes not in self._graphs:
            flat = _Flat(self._module(), others)
            inputs = (x.detach().clone().requires_grad_(x.requires_grad), *(t.clone() for t in tensors))
            self._graphs[shapes] = torch.cuda.make_graphed_callables(flat, inputs, allow_unused_input=True)
        return self._graphs[shapes](x, *tensors)


class _Flat(nn.Module):
    """The module as a function of tensors alone."""

    def __init__(self, module: nn.Module, structure: Tensors) -> None:
        super().__init__()
        self.module, self._structure = module, structure

    def forward(self, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Returns what the module returns."""
        each = iter(tensors)
        return self.module(x, self._structure.each(lambda _: next(each)))

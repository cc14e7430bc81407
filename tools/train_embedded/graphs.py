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
    """A method of a module that takes a tensor, which needs a gradient, and `Tensors`: a graph for each of their shapes."""

    def __init__(self, module: nn.Module, method: Callable[[torch.Tensor, T], torch.Tensor]) -> None:
        """Takes the module, whose weights get gradients, and its method."""
        self._module, self._method = module, method
        self._graphs: dict[tuple[torch.Size, ...], Callable[..., torch.Tensor]] = {}

    def __call__(self, x: torch.Tensor, others: T) -> torch.Tensor:
        """Returns what the method returns."""
        tensors: list[torch.Tensor] = []
        others.each(lambda tensor: tensors.append(tensor) or tensor)
        shapes = tuple(tensor.shape for tensor in (x, *tensors))
        if shapes not in self._graphs:
            flat = _Flat(self._module, self._method, others)
            inputs = (x.detach().clone().requires_grad_(x.requires_grad), *(t.clone() for t in tensors))
            self._graphs[shapes] = torch.cuda.make_graphed_callables(flat, inputs, allow_unused_input=True)
        return self._graphs[shapes](x, *tensors)


class _Flat(nn.Module):
    """The method as a module, which has the weights, and takes tensors alone."""

    def __init__(self, module: nn.Module, method: Callable[[torch.Tensor, T], torch.Tensor], structure: T) -> None:
        super().__init__()
        self.module, self._method, self._structure = module, method, structure

    def forward(self, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Returns what the method returns."""
        each = iter(tensors)
        return self._method(x, self._structure.each(lambda _: next(each)))

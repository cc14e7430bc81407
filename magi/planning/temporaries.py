"""Counts the bytes of a layer's temporaries, by a call of the layer on the meta device."""

import weakref
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..config import ModelConfig
from ..offload.packing import HeaderShapes
from ..transformer.block import LayerSettings, layer_forward
from ..transformer.float8 import Kernels, kernels_on_meta
from ..transformer.random_weights import RandomTensors
from ..transformer.weights import WeightReader


@dataclass(frozen=True)
class Numerics:
    """Dtype and kernels that the layers are computed with.

    Attributes:
        dtype: the compute dtype.
        fp8: the layers are official float8 ones.
        stored_fp8: the layers are those of another file, stored in float8.
        kernels: of the device.
    """

    dtype: torch.dtype = torch.bfloat16
    fp8: bool = False
    stored_fp8: bool = False
    kernels: Kernels = field(default_factory=Kernels)


@lru_cache(256)
def layer_bytes(shape: ModelConfig, numerics: Numerics, tokens: int, passes: int) -> int:
    """Counts the bytes that a layer allocates at its peak, beside the K/V and the hidden states.

    Args:
        shape: of the transformer.
        numerics: of its layers.
        tokens: of the token block.
        passes: that share their self-attention.
    """
    meta, dtype = torch.device("meta"), numerics.dtype
    three = replace(shape, num_layers=3)  # the first and the last are never float8
    source = HeaderShapes(RandomTensors(three, numerics.fp8).tensors)
    weights = WeightReader(source, three, meta, dtype, numerics.stored_fp8).block(1)
    hidden = torch.empty(tokens, shape.hidden_size, dtype=dtype, device=meta)
    angles = torch.empty(tokens, 3 * (shape.kv_channels // 8), device=meta)
    kv = torch.empty(2, shape.num_query_groups, 1, shape.kv_channels, dtype=dtype, device=meta)
    settings = LayerSettings(shape, dtype, "auto", tokens, layer_forward)
    # In inference mode functions like layer_norm are seen as one operation, whatever they would be taken apart into.
    with kernels_on_meta(numerics.kernels), torch.inference_mode(), PeakBytes() as counted:
        gates = [hidden[:1], hidden[:1]]
        layer_forward(settings, weights, [hidden] * passes, angles, angles, kv, [kv] * passes, [gates] * passes)
    return counted.peak


class PeakBytes(TorchDispatchMode):
    """Counts the most bytes that tensors made under it take at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function and counts the results that are no views."""
        self._note((args, kwargs), counted=False)  # made before, like weights: their views are nothing new
        result = function(*args, **(kwargs or {}))
        self._note(result, counted=True)
        return result

    def _note(self, tensors: Any, counted: bool) -> None:
        for storage in {t.untyped_storage() for t in tree_leaves(tensors) if isinstance(t, torch.Tensor)}:
            if storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes() * counted
                self._now += storage.nbytes() * counted
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, key: int) -> None:
        self._now -= self._sizes.pop(key)

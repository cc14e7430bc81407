"""Random weights of the official layout, generated tensor by tensor on demand: for benchmarks, demos and tests."""

import hashlib
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch

from ..checkpoint.mapped_file import TensorInfo
from ..config import ModelConfig
from .float8 import E4M3_MAX, require_float8
from .weights import tensor_shapes

_POOL = 1 << 22  # normal numbers that large tensors repeat: fast, and as good as new ones for timing
_SPREAD = 4.0  # standard deviations that float8 codes span


class RandomTensors:
    """A `TensorSource` of seeded random weights. The same (name, shape, seed) gives the same numbers in any order."""

    def __init__(
        self, config: ModelConfig, fp8: bool = False, dtype: torch.dtype = torch.bfloat16, seed: int = 0
    ) -> None:
        """Describes the tensors; `fp8` selects the official float8 layers, `dtype` is that of all other tensors."""
        self._dtype = dtype
        self._seed = seed
        spelling = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
        self._tensors = {
            name: TensorInfo(shape, _stored_type(name, shape, spelling, fp8), Path("random"))
            for name, shape in tensor_shapes(config, fp8).items()
        }

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Returns the header of every tensor by name."""
        return self._tensors

    def tensor(self, name: str) -> torch.Tensor:
        """Generates one tensor on the CPU."""
        info = self._tensors[name]
        shape = info.shape
        if name == "rope.bands":
            return 10000.0 ** (-torch.arange(shape[0]) / shape[0])
        if name.endswith(".bias"):
            return torch.zeros(shape, dtype=self._dtype)
        if "norm" in name:
            # The two ordinary norms scale by their weight, the "1p" ones by weight + 1.
            return torch.full(shape, 1.0 if name.endswith("layer_norm.weight") else 0.0, dtype=self._dtype)
        if name.endswith(".smooth_scale"):
            return torch.full(shape, _SPREAD / E4M3_MAX)
        if name.endswith("_scale"):
            fan_in = self._tensors[name.rsplit(".", 1)[0] + ".weight"].shape[-1]
            of_weight = name.endswith(".weight_scale")
            return torch.full(shape, _SPREAD / E4M3_MAX / (math.sqrt(fan_in) if of_weight else 1))
        if info.dtype == "F8_E4M3":
            return self._filled(name, shape, self._codes)
        return self._filled(name, shape, (self._pool / math.sqrt(math.prod(shape[1:]))).to(self._dtype))

    @cached_property
    def _pool(self) -> torch.Tensor:
        return torch.randn(_POOL, generator=torch.Generator().manual_seed(self._seed))

    @cached_property
    def _codes(self) -> torch.Tensor:
        return (self._pool * (E4M3_MAX / _SPREAD)).clamp(-E4M3_MAX, E4M3_MAX).to(require_float8())

    def _filled(self, name: str, shape: tuple[int, ...], pool: torch.Tensor) -> torch.Tensor:
        """Fills a tensor with the pool, repeated, from an offset that depends on the name."""
        out = torch.empty(math.prod(shape), dtype=pool.dtype)
        offset = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") % _POOL
        raw, source = out.view(_bits(pool)), pool.view(_bits(pool)).roll(-offset)
        for start in range(0, len(raw), _POOL):
            part = raw[start : start + _POOL]
            part.copy_(source[: len(part)])
        return out.reshape(shape)


def _bits(x: torch.Tensor) -> torch.dtype:
    """Returns an integer dtype of the same width, which every torch build can roll and copy."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]


def _stored_type(name: str, shape: tuple[int, ...], spelling: str, fp8: bool) -> str:
    if name == "rope.bands" or name.endswith("_scale"):
        return "F32"
    return "F8_E4M3" if fp8 and len(shape) == 3 and name.endswith(".weight") else spelling

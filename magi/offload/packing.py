"""A layer as one run of bytes: one copy brings it to a device, whatever it consists of."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from ..checkpoint.mapped_file import DTYPES, TensorInfo
from ..transformer.float8 import FLOAT8, require_float8, supports_float8
from ..transformer.weights import BlockWeights, WeightReader, map_tensors, tensors_in

_ALIGNMENT = 256  # bytes: what matrix kernels like best, and a multiple of every element
_PIECE = 1 << 24  # numbers copied between two looks at whether to go on


def aligned(nbytes: int) -> int:
    """Bytes up to where the next tensor, or run of them, may begin."""
    return math.ceil(nbytes / _ALIGNMENT) * _ALIGNMENT


def packed_bytes(block: BlockWeights) -> int:
    """Bytes of a block as one run."""
    return sum(aligned(t.nbytes) for t in tensors_in(block))


@dataclass(frozen=True)
class Layout:
    """Where the tensors of a block lie in its run of bytes. `like` is the block on the meta device, as it is used."""

    like: BlockWeights

    @property
    def nbytes(self) -> int:
        """Bytes of the run."""
        return packed_bytes(self.like)

    def block(self, data: torch.Tensor) -> BlockWeights:
        """The block whose run is `data`, (nbytes,) uint8 on any device: views of it."""
        start = 0

        def take(like: torch.Tensor) -> torch.Tensor:
            nonlocal start
            part = data[start : start + like.nbytes]
            start += aligned(like.nbytes)
            return part.view(like.dtype).view(like.shape)

        return map_tensors(self.like, take)

    def fill(self, data: torch.Tensor, block: BlockWeights, check: Callable[[], None] | None = None) -> None:
        """Copies a block's tensors, from any device, into its run on any device. What `check` raises ends that at once."""
        for target, tensor in zip(tensors_in(self.block(data)), tensors_in(block), strict=True):
            source = tensor.view(torch.uint8) if target.dtype == torch.uint8 else tensor
            for part, piece in zip(target.view(-1).split(_PIECE), source.reshape(-1).split(_PIECE), strict=True):
                if check:
                    check()
                part.copy_(piece)


def block_layouts(reader: WeightReader) -> list[Layout]:
    """How the layers that `reader` reads lie on its device, known from the headers alone."""
    meta = replace(reader, source=HeaderShapes(reader.source.tensors), device=torch.device("meta"))
    raw = not supports_float8(reader.device.type)

    def stored(like: torch.Tensor) -> torch.Tensor:
        return like.view(torch.uint8) if raw and like.dtype is FLOAT8 else like

    return [Layout(map_tensors(meta.block(i), stored)) for i in range(reader.config.num_layers)]


class HeaderShapes:
    """A `TensorSource` without numbers: what is read from it has sizes only."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = tensors

    def tensor(self, name: str) -> torch.Tensor:
        """On the meta device."""
        info = self.tensors[name]
        return torch.empty(info.shape, dtype=DTYPES[info.dtype] or require_float8(), device="meta")

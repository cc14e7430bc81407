"""Packs a layer's tensors into one buffer of bytes, so that a single copy uploads a layer of any form."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from ..checkpoint.mapped_file import DTYPES, TensorInfo
from ..transformer.float8 import FLOAT8, require_float8, supports_float8
from ..transformer.weights import BlockWeights, WeightReader, map_tensors, tensors_in

_ALIGNMENT = 256  # bytes: what matrix kernels prefer, and a multiple of every element size
_PIECE_ELEMENTS = 1 << 24  # copied between two calls of `check`, so that a large tensor can be interrupted


def aligned(nbytes: int) -> int:
    """Rounds a number of bytes up to the alignment of tensors and slots."""
    return math.ceil(nbytes / _ALIGNMENT) * _ALIGNMENT


def packed_bytes(block: BlockWeights) -> int:
    """Returns the bytes of a packed block, padding included."""
    return sum(aligned(t.nbytes) for t in tensors_in(block))


@dataclass(frozen=True)
class Layout:
    """The layout of a packed block.

    Attributes:
        like: the block on the meta device, with the shapes and dtypes that the transformer uses.
    """

    like: BlockWeights

    @property
    def nbytes(self) -> int:
        """Returns the bytes of the packed block."""
        return packed_bytes(self.like)

    def unpack(self, data: torch.Tensor) -> BlockWeights:
        """Returns the block that is packed in `data`, (nbytes,) uint8 on any device, as views of it."""
        start = 0

        def view(like: torch.Tensor) -> torch.Tensor:
            nonlocal start
            part = data[start : start + like.nbytes]
            start += aligned(like.nbytes)
            return part.view(like.dtype).view(like.shape)

        return map_tensors(self.like, view)

    def pack_into(self, data: torch.Tensor, block: BlockWeights, check: Callable[[], None] | None = None) -> None:
        """Copies a block's tensors into a packed buffer.

        Args:
            data: (nbytes,) uint8 on any device.
            block: its tensors may be on any device.
            check: called before each piece is copied; an error that it raises ends the copying.
        """
        for target, tensor in zip(tensors_in(self.unpack(data)), tensors_in(block), strict=True):
            source = tensor.view(torch.uint8) if target.dtype == torch.uint8 else tensor
            targets, sources = target.view(-1).split(_PIECE_ELEMENTS), source.reshape(-1).split(_PIECE_ELEMENTS)
            for target_piece, source_piece in zip(targets, sources, strict=True):
                if check:
                    check()
                target_piece.copy_(source_piece)


def block_layouts(reader: WeightReader) -> list[Layout]:
    """Returns the layout of each layer on the reader's device. Reads only the headers of the checkpoint."""
    meta = replace(reader, source=HeaderShapes(reader.source.tensors), device=torch.device("meta"))
    raw = not supports_float8(reader.device)

    def stored(like: torch.Tensor) -> torch.Tensor:
        return like.view(torch.uint8) if raw and like.dtype is FLOAT8 else like

    return [Layout(map_tensors(meta.block(i), stored)) for i in range(reader.config.num_layers)]


class HeaderShapes:
    """A `TensorSource` whose tensors are on the meta device, made from a checkpoint's headers."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = tensors

    def tensor(self, name: str) -> torch.Tensor:
        """Returns a tensor of the header's shape and dtype on the meta device.

        Raises:
            KeyError: the checkpoint has no such tensor.
        """
        info = self.tensors[name]
        return torch.empty(info.shape, dtype=DTYPES[info.dtype] or require_float8(), device="meta")

"""transformers' T5 encoder over weights as they are stored: on the device, or on the host and uploaded when needed."""

from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import MagiError
from ..system.progress import OnProgress
from .t5_checkpoint import T5Checkpoint

WORKING_BYTES = 1 << 30  # what running takes besides weights: scores of 800 tokens, and a layer's weight in float32
_EMBEDDING = "shared.weight"


def resident_bytes(checkpoint: T5Checkpoint, device: torch.device, dtype: torch.dtype) -> int:
    """Returns the bytes that all weights take on the device."""
    return sum(t.numel() * _kept(t, device, dtype).itemsize for t in checkpoint.tensors.values())


def build_t5(
    checkpoint: T5Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    stream: bool = False,
    progress: OnProgress | None = None,
) -> nn.Module:
    """Builds the encoder of a checkpoint, for use on `device`; its results are the same to the bit, streamed or not.

    Args:
        checkpoint: the weights, mapped.
        device: where it runs.
        dtype: the type to compute in; see `TextEncoder.load`.
        stream: leave the weights of linear layers and the embedding mapped on the host. Each is brought to the device,
            and to no wider than `dtype`, when it runs, and dropped again; of the embedding only the rows that are
            looked up.
        progress: counts the tensors placed.

    Raises:
        MagiError: this transformers cannot be used.
    """
    model = _empty(checkpoint)
    plain: dict[str, torch.Tensor] = {}
    for done, (name, tensor) in enumerate(checkpoint.tensors.items(), 1):
        module_name = name.removesuffix(".weight")
        scale = checkpoint.scales.get(name)
        linear = isinstance(model.get_submodule(module_name), nn.Linear)
        waits = stream and (linear or name == _EMBEDDING)
        stored = tensor if waits else place(tensor, device, dtype)
        if name == _EMBEDDING:
            if waits or stored.dtype != dtype:
                model.shared = _StoredEmbedding(stored, dtype)
            else:
                model.shared.weight = nn.Parameter(stored, requires_grad=False)
        elif linear and (waits or stored.dtype != dtype or scale is not None):
            parent, _, child = module_name.rpartition(".")
            layer = _StoredLinear(stored, None if scale is None else scale.to(device), dtype)
            setattr(model.get_submodule(parent), child, layer)
        else:
            plain[name] = stored.to(dtype)
        if progress:
            progress(done, len(checkpoint.tensors))
    model.encoder.embed_tokens = model.shared
    for block in model.encoder.block:  # weights may be used from where they are mapped
        block.register_forward_pre_hook(lambda *_: checkpoint.guard.check())
    model.load_state_dict(plain, strict=False, assign=True)
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        import transformers

        raise MagiError(
            f"transformers {transformers.__version__} names the layers of T5 differently ({empty[0]}). Install 4.44 to 5."
        )
    return model.eval().requires_grad_(False)


def place(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Returns the tensor on the device, narrowed to `dtype` if it is wider; otherwise on the CPU the mapped one."""
    return tensor.to(_kept(tensor, device, dtype)).to(device)


class _StoredLinear(nn.Module):
    """A linear layer without bias whose weight (out, in) comes to the input's device and dtype when it runs.

    `scale` multiplies the output: one number, or one per output.
    """

    # T5's MLP converts its input to `wo.weight`'s dtype where that is a tensor, which would be float8 here.
    weight = None
    stored: torch.Tensor
    scale: torch.Tensor | None

    def __init__(self, stored: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("stored", stored)
        self.register_buffer("scale", None if scale is None else scale.flatten())
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, place(self.stored, x.device, self.dtype).to(x.dtype))
        return y if self.scale is None else (y * self.scale).to(x.dtype)


class _StoredEmbedding(nn.Module):
    """A lookup table (entries, width), of which only the rows looked up are converted to `dtype` and uploaded."""

    stored: torch.Tensor

    def __init__(self, stored: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("stored", stored)
        self.dtype = dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = ids.to(self.stored.device)
        if self.stored.dtype.itemsize == 1:  # not every torch can index float8
            found = self.stored.view(torch.uint8)[rows].view(self.stored.dtype)
        else:
            found = self.stored[rows]
        return found.to(self.dtype).to(ids.device)


def _empty(checkpoint: T5Checkpoint) -> Any:
    import transformers  # here: it takes seconds

    config = transformers.T5Config(**asdict(checkpoint.shape), feed_forward_proj="gated-gelu")
    try:
        with torch.device("meta"):
            return transformers.T5EncoderModel(config)
    except ImportError as error:  # it hides its models from a torch that is too old for it
        raise MagiError(
            f"transformers {transformers.__version__} does not work with torch {torch.__version__}. "
            'Update torch, or install an older one: pip install "transformers<5".'
        ) from error


def _kept(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype to keep a stored tensor in: no wider than `dtype`, and one that the device has."""
    kept = tensor.dtype if tensor.dtype.itemsize <= dtype.itemsize else dtype
    if kept.itemsize == 1 and not _holds(device, kept):
        return torch.bfloat16  # holds every float8 value exactly
    return kept


@lru_cache
def _holds(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        torch.zeros(1).to(dtype).to(device).to(torch.float32)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True

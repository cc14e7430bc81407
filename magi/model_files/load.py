"""From weight files to a transformer: what the file is, whether it fits its config, and where its layers are to lie."""

import warnings
from dataclasses import replace
from pathlib import Path

import torch

from ..checkpoint.mapped_file import TensorSource
from ..checkpoint.reader import Checkpoint
from ..config import MagiConfig
from ..errors import MagiError
from ..offload.pinned_memory import Pin
from ..offload.streamed_blocks import StreamedBlocks
from ..planning.footprint import WeightSizes, weight_sizes
from ..planning.placement import MemoryOptions, Placement, place, smallest
from ..system.device import empty_cache, free_memory, pick_device, retry_with_less
from ..system.host_memory import memory_beside
from ..system.progress import OnProgress
from ..transformer.attention import check_attention
from ..transformer.float8 import require_float8
from ..transformer.model import Transformer
from ..transformer.weights import Precision, WeightReader, check_tensors, compute_dtype, has_fp8
from .identify import resolve_config


def load_transformer(
    path: str | Path | TensorSource,
    config: MagiConfig | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    offload: bool | None = None,
    progress: OnProgress | None = None,
    *,
    precision: Precision = "auto",
    attention: str = "auto",
    memory: MemoryOptions | None = None,
    placement: Placement | None = None,
    compiled: bool = False,
    pin: Pin | None = None,
) -> Transformer:
    """Loads a transformer from an official folder or a single file.

    Args:
        path: safetensors file, or a folder with one, or with shards and their index; or named tensors that are known to fit `config`.
        config: official config; None tells it from the file.
        device: where it computes; None takes the best there is.
        dtype: compute dtype of what is not float32 or float8 by policy; None: bfloat16, but float32 for a float32 file.
        offload: True fetches each layer when its turn comes, False keeps all on the device; None decides by the memory
            that is free and the size and window of `config`.
        progress: called with (layers placed, layers) while they are; what it raises ends the loading.
        precision: "bf16" or "fp32" in place of `dtype`; "fp8" keeps the large matrices of bf16 and float32 files in float8,
            half the memory, and multiplies in the compute dtype. Official float8 layers stay what they are.
        attention: one of `attention.attention_choices`.
        memory: what of the placement is fixed by hand.
        placement: what lies where, if that is decided already; `offload` and `memory` then mean nothing.
        compiled: have torch.compile make the layers' kernels, in the first iteration; it needs what torch.compile needs.
        pin: page-locks host memory for layers and K/V; see `PinnedMemory`.

    Raises:
        MagiError: the file is unreadable or something else, its tensors do not fit the config, base and distilled are
            mixed up, or what is asked for cannot be had.
    """
    source: TensorSource
    if isinstance(path, str | Path):
        source = checkpoint = Checkpoint(path)
        config = resolve_config(checkpoint, config)
        check_tensors(checkpoint, config.model, repr(str(checkpoint.path)))
        checkpoint.check_whole()
    elif config is not None:
        source = path
    else:
        raise TypeError("Named tensors need a config: nothing else tells what they are.")
    where = pick_device(device)
    low = compute_dtype(source.tensors, precision, dtype)
    store_fp8 = precision == "fp8" and not has_fp8(source.tensors)
    if store_fp8 or has_fp8(source.tensors):
        require_float8()
    check_attention(attention, where, low, *config.model.heads)
    if placement is None:
        options = memory or MemoryOptions()
        options = options if offload is None else replace(options, streaming=offload)
        placement = _placement(
            config, weight_sizes(source.tensors, config.model, where, precision, dtype), where, options
        )
    reader = WeightReader(source, config.model, where, low, store_fp8)
    outer, staying = reader.outer(), placement.on_device

    def build() -> Transformer:
        blocks = StreamedBlocks(reader, staying, placement.on_host, placement.slots, progress, pin=pin)
        return Transformer(
            config, outer, blocks, where, low, attention, placement.cache, placement.token_block, compiled, pin
        )

    def keep_fewer(error: BaseException) -> None:
        nonlocal staying
        if not staying:
            raise MagiError(
                f"{where} ran out of memory while the model was loaded, though none of its layers were to stay there. "
                "Close what else uses it, or try a smaller model."
            ) from error
        empty_cache(where)
        staying = staying[1::2]
        warnings.warn(
            f"{where} ran out of memory while the model was loaded. Now {len(staying)} of its layers stay there, the others are "
            "fetched when their turn comes.",
            stacklevel=4,
        )

    return retry_with_less(build, keep_fewer)


def check_transformer(
    path: str | Path,
    config: MagiConfig | None = None,
    distilled: bool | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    precision: str = "auto",
    attention: str = "auto",
) -> MagiConfig:
    """Checks, by headers and a few samples, all that loading a transformer would refuse; returns the config to load it with.

    Arguments are those of `load_transformer`; `distilled` is the variant, where nothing in the file tells it.

    Raises:
        MagiError: the file is damaged or something else, base and distilled are mixed up, or it cannot be computed so.
    """
    with Checkpoint(path) as checkpoint:
        config = resolve_config(checkpoint, config, distilled)
        check_tensors(checkpoint, config.model, repr(str(path)))
        checkpoint.check_whole()
        if has_fp8(checkpoint.tensors) or precision == "fp8":
            require_float8()
        low = compute_dtype(checkpoint.tensors, precision, dtype)
    check_attention(attention, pick_device(device), low, *config.model.heads)
    return config


def _placement(config: MagiConfig, sizes: WeightSizes, device: torch.device, options: MemoryOptions) -> Placement:
    """Returns the placement by the memory that is free now; what takes least of it where the config's own size does not fit: another one may be meant."""
    try:
        return place(config, sizes, free_memory(device), options, free_host=memory_beside(device))
    except MagiError:
        return smallest(config, sizes, options)

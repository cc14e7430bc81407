"""How much memory a model and a run need: pure functions on headers and settings."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..checkpoint.mapped_file import TensorInfo
from ..config import LATENT_CHANNELS, SPATIAL_DOWNSAMPLE, MagiConfig, ModelConfig
from ..offload.packing import HeaderShapes, packed_bytes
from ..sampling.guidance import chunk_count
from ..sampling.schedule import Iteration, Schedule, time_grid
from ..system.device import pick_device
from ..transformer.float8 import Kernels
from ..transformer.inputs import TOKEN_BLOCK
from ..transformer.weights import WeightReader, compute_dtype, has_fp8, tensors_in
from .temporaries import Numerics, layer_bytes


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of a transformer's weights in the form they are used in.

    Attributes:
        outer: of what lies outside the layers.
        blocks: of each layer.
        packed: of each layer as one run of bytes, as it is fetched.
        numerics: what the layers are computed in and with.
    """

    outer: int
    blocks: tuple[int, ...]
    packed: tuple[int, ...]
    numerics: Numerics

    @property
    def itemsize(self) -> int:
        """Of the compute dtype."""
        return self.numerics.dtype.itemsize

    @property
    def total(self) -> int:
        """Of everything."""
        return self.outer + sum(self.blocks)


def weight_sizes(
    tensors: Mapping[str, TensorInfo],
    config: ModelConfig,
    device: torch.device | str | None = None,
    precision: str = "auto",
    dtype: torch.dtype | None = None,
    kernels: Kernels | None = None,
) -> WeightSizes:
    """What a transformer takes, from its headers alone.

    Args:
        tensors: of a checkpoint that fits `config`.
        config: the transformer's shape.
        device: tells only in which form products need their matrices; None: the best there is.
        precision: as for `load_transformer`.
        dtype: likewise.
        kernels: of a device that is not here, instead of `device`.

    Raises:
        MagiError: precision or device cannot be had.
    """
    kernels = kernels or Kernels.of(pick_device(device))
    low, fp8 = compute_dtype(tensors, precision, dtype), has_fp8(tensors)
    store = precision == "fp8" and not fp8
    reader = WeightReader(HeaderShapes(tensors), config, torch.device("meta"), low, store)
    blocks = [reader.block(i) for i in range(config.num_layers)]
    return WeightSizes(
        outer=_nbytes(reader.outer()),
        blocks=tuple(_nbytes(block) for block in blocks),
        packed=tuple(packed_bytes(block) for block in blocks),
        numerics=Numerics(low, fp8, store, kernels),
    )


def _nbytes(weights: object) -> int:
    return sum(t.nbytes for t in tensors_in(weights))


def chunk_tokens(config: MagiConfig) -> int:
    """Tokens of a chunk of a run of this size."""
    runtime, side = config.runtime, SPATIAL_DOWNSAMPLE * config.model.patch_size
    return runtime.chunk_width * (runtime.video_size_h // side) * (runtime.video_size_w // side)


def key_bytes(config: MagiConfig, given: int = 0, itemsize: int = 2) -> int:
    """Bytes of the keys and values of finished chunks that are kept, of one layer."""
    cached = Schedule.of_run(config.runtime, given).cached_chunks
    return cached * chunk_tokens(config) * _keys_a_token(config.model, itemsize)


def _keys_a_token(c: ModelConfig, itemsize: int) -> int:
    return 2 * c.num_query_groups * c.kv_channels * itemsize


def fullest_stage(schedule: Schedule) -> list[Iteration]:
    """The iterations of a stage in which the window is as full as it ever is, if possible after a chunk was finished."""
    made = schedule.chunks - schedule.prefix_chunks
    stage = (
        min(schedule.window, made + schedule.window - 2) if made > schedule.window else min(schedule.window, made) - 1
    )
    return [schedule[stage * schedule.steps_per_stage + step] for step in range(schedule.steps_per_stage)]


def working_bytes(
    config: MagiConfig,
    *,
    given: int = 0,
    cache_on_device: bool = True,
    token_block: int = TOKEN_BLOCK,
    numerics: Numerics | None = None,
) -> int:
    """Bytes on the device at the peak of a run, beside weights: keys and values, every chunk on its way, one token block's layer.

    Args:
        config: the model, and the size, steps, window and frames of the run.
        given: latent frames of an image or clip that come before what is made.
        cache_on_device: the cache of keys and values is there; else only what of it is on its way.
        token_block: tokens that are taken through a layer at a time.
        numerics: what the layers are computed in and with; None: those of the released file on the best device.
    """
    numerics = numerics or Numerics(fp8=config.engine.fp8_quant)
    c, runtime, e = config.model, config.runtime, numerics.dtype.itemsize
    schedule = Schedule.of_run(runtime, given)
    generated = schedule.chunks - schedule.prefix_chunks
    active = min(runtime.window_size, generated)
    refresh = int(generated > 1)  # the chunk that has just become clean
    times = [float(t) for t in time_grid(runtime.num_steps, config.engine.shortcut_mode)]
    streams = max(chunk_count(it, schedule, times, config) for it in fullest_stage(schedule))
    places = active + refresh + (0 if config.engine.distill else 1)
    tokens = chunk_tokens(config)
    latents = tokens * c.patch_size**2
    keys = _keys_a_token(c, e)
    rope = places * tokens * 2 * 3 * (c.kv_channels // 8) * 4
    captions = (active + 1) * c.caption_max_length * (c.hidden_size * e + keys)
    # On the host two layers' keys are on the device at a time: the one in use and the next.
    cached = key_bytes(config, given, e) * (c.num_layers if cache_on_device else min(2, c.num_layers))
    scratch = (active + max(schedule.cached_chunks, refresh)) * tokens * keys
    on_their_way = streams * (tokens * c.hidden_size * e + 2 * LATENT_CHANNELS * latents * 4)
    # In the first layer the text and the previous-chunk pass share their self-attention.
    layer = layer_bytes(c, numerics, min(token_block, tokens), passes=1 if config.engine.distill else 2)
    return cached + scratch + captions + rope + on_their_way + layer

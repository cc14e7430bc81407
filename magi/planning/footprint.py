"""Device memory that a model and a run need, from headers and settings alone."""

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
        outer: of the weights outside the layers.
        blocks: of each layer.
        packed: of each layer in one buffer, as it is uploaded.
        numerics: dtype and kernels that the layers are computed with.
    """

    outer: int
    blocks: tuple[int, ...]
    packed: tuple[int, ...]
    numerics: Numerics

    @property
    def itemsize(self) -> int:
        """Returns the bytes per element of the compute dtype."""
        return self.numerics.dtype.itemsize

    @property
    def total(self) -> int:
        """Returns the bytes of all weights."""
        return self.outer + sum(self.blocks)


def weight_sizes(
    tensors: Mapping[str, TensorInfo],
    config: ModelConfig,
    device: torch.device | str | None = None,
    precision: str = "auto",
    dtype: torch.dtype | None = None,
    kernels: Kernels | None = None,
) -> WeightSizes:
    """Returns the sizes of a transformer's weights, from its headers alone.

    Args:
        tensors: headers of a checkpoint that fits `config`.
        config: the transformer's shape.
        device: device to plan for, asked only for its kernels; None: the best there is.
        precision: as for `load_transformer`.
        dtype: likewise.
        kernels: those of a device of another machine, instead of `device`.

    Raises:
        MagiError: the precision or the device is not available.
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
    """Returns the tokens of a chunk at the run's size."""
    runtime, side = config.runtime, SPATIAL_DOWNSAMPLE * config.model.patch_size
    return runtime.chunk_width * (runtime.video_size_h // side) * (runtime.video_size_w // side)


def kv_bytes(config: MagiConfig, prefix_frames: int = 0, itemsize: int = 2) -> int:
    """Returns the bytes of one layer's K/V cache."""
    cached = Schedule.of_run(config.runtime, prefix_frames).cached_chunks
    return cached * chunk_tokens(config) * _kv_bytes_per_token(config.model, itemsize)


def _kv_bytes_per_token(c: ModelConfig, itemsize: int) -> int:
    return 2 * c.num_query_groups * c.kv_channels * itemsize


def fullest_stage(schedule: Schedule) -> list[Iteration]:
    """Returns the iterations of a stage with the fullest window, if possible one that follows a finished chunk."""
    generated = schedule.chunks - schedule.prefix_chunks
    stage = (
        min(schedule.window, generated + schedule.window - 2)
        if generated > schedule.window
        else min(schedule.window, generated) - 1
    )
    return [schedule[stage * schedule.steps_per_stage + step] for step in range(schedule.steps_per_stage)]


def working_bytes(
    config: MagiConfig,
    *,
    prefix_frames: int = 0,
    cache_on_device: bool = True,
    token_block: int = TOKEN_BLOCK,
    numerics: Numerics | None = None,
) -> int:
    """Returns the bytes of device memory at the peak of a run, without weights.

    They are the K/V cache, all chunks of all passes, and what a layer allocates for a token block.

    Args:
        config: the model, and the size, steps, window and frames of the run.
        prefix_frames: latent frames of the image or clip that the video starts from.
        cache_on_device: whether the K/V cache is on the device; else only the ring buffer for its uploads is.
        token_block: tokens per layer forward.
        numerics: dtype and kernels of the layers; None: bfloat16, or float8 if the config says so, on the best device.
    """
    numerics = numerics or Numerics(fp8=config.engine.fp8_quant)
    c, runtime, e = config.model, config.runtime, numerics.dtype.itemsize
    schedule = Schedule.of_run(runtime, prefix_frames)
    generated = schedule.chunks - schedule.prefix_chunks
    active = min(runtime.window_size, generated)
    refresh = int(generated > 1)  # the chunk that has just become clean
    times = [float(t) for t in time_grid(runtime.num_steps, config.engine.shortcut_mode)]
    in_passes = max(chunk_count(it, schedule, times, config) for it in fullest_stage(schedule))
    tokens = chunk_tokens(config)
    latents = tokens * c.patch_size**2
    kv = _kv_bytes_per_token(c, e)
    rope = (active + refresh + (0 if config.engine.distill else 1)) * tokens * 2 * 3 * (c.kv_channels // 8) * 4
    captions = (active + 1) * c.caption_max_length * (c.hidden_size * e + kv)
    # Of a cache on the host, the K/V of two layers are on the device: of the one in use and the next.
    cached = kv_bytes(config, prefix_frames, e) * (c.num_layers if cache_on_device else min(2, c.num_layers))
    scratch = (active + max(schedule.cached_chunks, refresh)) * tokens * kv
    chunks = in_passes * (tokens * c.hidden_size * e + 2 * LATENT_CHANNELS * latents * 4)
    # In the first layer the text and the previous-chunk pass share their self-attention.
    layer = layer_bytes(c, numerics, min(token_block, tokens), passes=1 if config.engine.distill else 2)
    return cached + scratch + captions + rope + chunks + layer

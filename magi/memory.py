"""How much memory a model and a run need, and where to put what: pure functions on headers, settings and numbers of bytes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from .config import LATENT_CHANNELS, SPATIAL_DOWNSAMPLE, MagiConfig, ModelConfig
from .device import pick_device
from .errors import MagiError
from .mapped_file import DTYPES, TensorInfo
from .quant import ROWS, Fp8Weight, StoredFp8, keeps_sums, multiplies_float8, require_float8
from .schedule import Schedule
from .weights import BlockWeights, WeightReader, compute_dtype, has_fp8, tensors_in

CacheDevice = Literal["device", "host"]
_RESERVE = 0.1  # of a device's memory: what the allocator rounds up and cannot use, and kernels' workspaces
_BLOCKS_AT_A_TIME = 2  # of a streaming model: the one in use and the next


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of a transformer's weights in the form they are used in.

    Attributes:
        outer: of what lies outside the layers.
        blocks: of each layer.
        itemsize: of the compute dtype.
        fp8: the layers are official float8 ones.
        converted: of the largest matrix that a product needs in another form than it is kept in.
    """

    outer: int
    blocks: tuple[int, ...]
    itemsize: int
    fp8: bool
    converted: int

    @property
    def total(self) -> int:
        """Of everything."""
        return self.outer + sum(self.blocks)

    @property
    def streaming(self) -> int:
        """On the device at a time if layers are fetched one by one."""
        return self.outer + min(_BLOCKS_AT_A_TIME * max(self.blocks), sum(self.blocks))


class _Shapes:
    """A `TensorSource` without numbers: what is read from it has sizes only."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = tensors

    def tensor(self, name: str) -> torch.Tensor:
        info = self.tensors[name]
        return torch.empty(info.shape, dtype=DTYPES[info.dtype] or require_float8(), device="meta")


def weight_sizes(
    tensors: Mapping[str, TensorInfo],
    config: ModelConfig,
    device: torch.device | str | None = None,
    precision: str = "auto",
    dtype: torch.dtype | None = None,
) -> WeightSizes:
    """What a transformer takes, from its headers alone.

    Args:
        tensors: of a checkpoint that fits `config`.
        config: the transformer's shape.
        device: tells only in which form products need their matrices; None: the best there is.
        precision: as for `load_transformer`.
        dtype: likewise.

    Raises:
        MagiError: precision or device cannot be had.
    """
    device = pick_device(device)
    low, fp8 = compute_dtype(tensors, precision, dtype), has_fp8(tensors)
    store = precision == "fp8" and not fp8
    reader = WeightReader(_Shapes(tensors), config, torch.device("meta"), low, store)
    blocks = [reader.block(i) for i in range(config.num_layers)]
    return WeightSizes(
        outer=_nbytes(reader.outer()),
        blocks=tuple(_nbytes(block) for block in blocks),
        itemsize=low.itemsize,
        fp8=fp8,
        converted=max(_converted(block, low.itemsize, device) for block in blocks),
    )


def _nbytes(weights: object) -> int:
    return sum(t.nbytes for t in tensors_in(weights))


def _converted(block: BlockWeights, itemsize: int, device: torch.device) -> int:
    """Bytes of the largest matrix in another form than it is kept in: dense, or float32 where a product needs that."""
    widened = 0 if itemsize == 4 or keeps_sums(device) else 4
    sizes = [widened * block.proj.weight.numel()]
    for part in (block.q, block.q_x, block.k, block.v, block.proj, block.fc1, block.fc2):
        if isinstance(part, StoredFp8):
            sizes.append((itemsize + (widened if part is block.proj else 0)) * part.weight.numel())
        elif isinstance(part, Fp8Weight) and not multiplies_float8(device):
            sizes.append((2 + widened) * part.weight.numel())
    return max(sizes)


@dataclass(frozen=True)
class MemoryOptions:
    """What may be fixed by hand; None and "auto" leave it to `place`.

    Attributes:
        budget: bytes of device memory for everything; None: what is free. It is taken at its word, even if less is free.
        streaming: whether layers are fetched one by one instead of staying on the device.
        pinned: whether streaming layers wait in page-locked host memory.
        cache: where finished chunks' keys and values are kept.
    """

    budget: int | None = None
    streaming: bool | None = None
    pinned: bool | None = None
    cache: Literal["auto", "device", "host"] = "auto"


@dataclass(frozen=True)
class Placement:
    """Where a run's parts lie. `streaming`, `pinned` and `cache` are `offload`, `pinned` and `cache_device` of `load_transformer`.

    Attributes:
        streaming: layers are fetched one by one.
        pinned: as in `MemoryOptions`; None is decided by free host memory at loading.
        cache: where keys and values are kept.
        total_weight_bytes: of all weights.
        weight_bytes: of those on the device at a time.
        working_bytes: of everything else on the device at the peak.
    """

    streaming: bool
    pinned: bool | None
    cache: CacheDevice
    total_weight_bytes: int
    weight_bytes: int
    working_bytes: int

    @property
    def device_bytes(self) -> int:
        """On the device at the peak."""
        return self.weight_bytes + self.working_bytes

    @property
    def spare_bytes(self) -> int:
        """What must be free on the device besides the weights: the working memory, and the reserve."""
        return math.ceil(self.device_bytes / (1 - _RESERVE)) - self.weight_bytes

    def describe(self) -> str:
        """One line for a log."""
        weights = f"all weights on the device ({_gb(self.weight_bytes)})"
        if self.streaming:
            share = f"{_gb(self.weight_bytes).removesuffix(' GB')} of {_gb(self.total_weight_bytes)}"
            weights = f"weights stream ({share} on the device)"
        keys = "the device" if self.cache == "device" else "the host"
        return f"{weights}, keys on {keys}, about {_gb(self.device_bytes)} in all"


def place(
    config: MagiConfig,
    weights: WeightSizes,
    free: int | None,
    options: MemoryOptions | None = None,
    given_chunks: int = 0,
) -> Placement:
    """Where to put a model's weights and keys so that a run has room; the fastest way that fits.

    A tenth of the memory is left for what the allocator rounds up and kernels work in.

    Args:
        config: the model, and the size, steps, window and frames of the run.
        weights: of the model, see `weight_sizes`.
        free: bytes free on the device before anything is loaded; None where memory is the host's own: a budget means
            nothing there, and nothing is moved that `options` does not ask for.
        options: what is fixed by hand.
        given_chunks: whole chunks of a given video.

    Raises:
        MagiError: it does not fit, whatever of what is not fixed is chosen.
    """
    options = options or MemoryOptions()
    candidates = _candidates(config, weights, options, given_chunks)
    if free is None:
        return candidates[0]
    room = free if options.budget is None else options.budget
    for candidate in candidates:
        if candidate.weight_bytes + candidate.spare_bytes <= room:
            return candidate
    least = min(c.weight_bytes + c.spare_bytes for c in candidates)
    narrow = _candidates(config.with_runtime(window_size=1), weights, options, given_chunks)
    remedies = {
        "a smaller size": True,
        "streaming weights": options.streaming is False,
        "keys on the host": options.cache == "device",
        "a window of 1": min(c.weight_bytes + c.spare_bytes for c in narrow) < least,
        "a larger budget": options.budget is not None,
    }
    runtime = config.runtime
    raise MagiError(
        f"{runtime.video_size_w}x{runtime.video_size_h} with a window of {runtime.window_size} needs about "
        f"{_gb(least)} of device memory; {'free are' if options.budget is None else 'the budget is'} "
        f"{_gb(room)}. Try {' or '.join(name for name, helps in remedies.items() if helps)}."
    )


def _candidates(config: MagiConfig, weights: WeightSizes, options: MemoryOptions, given_chunks: int) -> list[Placement]:
    """What may be chosen, the fastest first: the weights are moved to the host before the keys are."""
    found = []
    for cache in get_args(CacheDevice):
        working = working_bytes(
            config,
            given_chunks=given_chunks,
            cache_on_device=cache == "device",
            itemsize=weights.itemsize,
            fp8=weights.fp8,
        )
        for streaming, on_device in ((False, weights.total), (True, weights.streaming)):
            if options.cache in ("auto", cache) and options.streaming in (None, streaming):
                pinned = options.pinned if streaming else False
                found.append(Placement(streaming, pinned, cache, weights.total, on_device, working + weights.converted))
    return found


def working_bytes(
    config: MagiConfig,
    *,
    given_chunks: int = 0,
    cache_on_device: bool = True,
    itemsize: int = 2,
    fp8: bool | None = None,
) -> int:
    """Bytes on the device at the peak of a run, beside weights: keys and values, every chunk on its way, one chunk's layer.

    Args:
        config: the model, and the size, steps, window and frames of the run.
        given_chunks: whole chunks of a given video.
        cache_on_device: count the cache of keys and values.
        itemsize: bytes of the compute dtype.
        fp8: the layers are official float8 ones; None: what the config says.
    """
    c, runtime, e = config.model, config.runtime, itemsize
    generated = -(-(runtime.num_frames // runtime.temporal_downsample_factor) // runtime.chunk_width)
    schedule = Schedule.of(runtime, given_chunks + generated, given_chunks)
    active = min(runtime.window_size, generated)
    refresh = int(generated > 1)  # the chunk that has just become clean
    # Three passes, two of which also hold the refresh; or one, and the oldest chunk on its own.
    streams = active + refresh + 1 if config.engine.distill else 3 * active + 2 * refresh
    latents = runtime.chunk_width * runtime.video_size_h * runtime.video_size_w // SPATIAL_DOWNSAMPLE**2
    tokens = latents // c.patch_size**2
    keys = 2 * c.num_query_groups * c.kv_channels * e  # of a token
    rope = 2 * 3 * (c.kv_channels // 8) * 4
    captions = (active + 1) * c.caption_max_length * (c.hidden_size * e + keys)
    cached = c.num_layers * schedule.cached_chunks * tokens * keys if cache_on_device else 0
    scratch = (active + max(schedule.cached_chunks, refresh)) * tokens * keys
    on_their_way = streams * (tokens * (c.hidden_size * e + rope) + 2 * LATENT_CHANNELS * latents * 4)
    fp8 = config.engine.fp8_quant if fp8 is None else fp8
    return cached + scratch + captions + on_their_way + _layer_bytes(c, tokens, e, fp8)


def _layer_bytes(c: ModelConfig, tokens: int, e: int, fp8: bool) -> int:
    """What one chunk takes within a layer where it takes most. Each sum is what is alive at once."""
    d, ffn, hidden = c.hidden_size, c.ffn_hidden_size, c.fc1_size
    copied = hidden if c.gated_linear_unit and e < 4 else 0
    rows = min(ROWS, tokens) * 4 * (copied + ffn)
    normed = e * d  # the input of attention or MLP
    rotation = normed + e * d + 11 * d  # queries; float32 before, during and after: more than anything until the MLP
    activation = normed + e * hidden + (e * ffn if c.gated_linear_unit else 0)
    widest = max(tokens * rotation, tokens * activation + rows)
    if fp8:
        sums = normed + 2 * d + (4 if e == 4 else 4 + e) * hidden  # rounded to 16 bits; products in float32, then cast
        quotient = normed + (e + 4 + 2) * ffn  # of the second matrix: float32, then 16 bits
        widest = max(widest, tokens * sums, tokens * quotient)
    return widest


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"

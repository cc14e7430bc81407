"""Places a run's weights and K/V cache before anything is loaded, from headers, settings and free memory."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from ..config import MagiConfig
from ..errors import MagiError
from ..offload.streamed_blocks import ring_bytes
from ..sampling.schedule import smaller_windows
from ..transformer.inputs import CPU_TOKEN_BLOCK, TOKEN_BLOCK, CacheDevice
from .cost import Machine, iteration_flops, iteration_seconds
from .footprint import WeightSizes, kv_bytes, working_bytes

TOKEN_BLOCKS = (TOKEN_BLOCK, 2048, 1024, 512, 256)
_SLOTS = (3, 2)
_RESERVE = 0.1  # of the device memory: for the allocator's fragmentation and kernels' workspaces
_HOST_RESERVE = 0.25  # of the free host memory, which page-locked layers leave to everything else


@dataclass(frozen=True)
class MemoryOptions:
    """Settings that may be fixed by hand; None and "auto" leave them to `place`.

    Attributes:
        budget: bytes of device memory for everything, used even if less is free; None: what is free.
        streaming: True uploads every layer when its turn comes, False keeps all on the device.
        pinned: True keeps all streamed layers in page-locked host memory, False reads them from the file each time.
        cache: where the K/V cache is kept.
        token_block: tokens per layer forward.
    """

    budget: int | None = None
    streaming: bool | None = None
    pinned: bool | None = None
    cache: Literal["auto", "device", "host"] = "auto"
    token_block: int | None = None

    def __post_init__(self) -> None:
        if self.cache not in ("auto", *get_args(CacheDevice)):
            raise MagiError(f"The cache cannot be kept on {self.cache!r}. Choose one of auto, device, host.")
        if self.token_block is not None and self.token_block < 1:
            raise MagiError(f"A token block of {self.token_block} holds nothing. Use at least 1.")


@dataclass(frozen=True)
class Limit:
    """The largest layout that may be chosen, where a larger one ran out of memory.

    Attributes:
        layers: that stay on the device.
        token_block: tokens per layer forward.
        cache: where the K/V cache is kept: "device" leaves it open, "host" does not.
        window: chunks denoised at a time, where a smaller window may be taken.
    """

    layers: int
    token_block: int
    cache: CacheDevice
    window: int


@dataclass(frozen=True)
class PlannedRun:
    """The run that a placement was made for.

    Attributes:
        config: its settings, with its size, length and window.
        prefix_frames: latent frames of the image or clip that the video starts from.
        free: bytes that were free for it, on the device or, where that has no memory of its own, the host; None: unknown.
    """

    config: MagiConfig
    prefix_frames: int
    free: int | None


@dataclass(frozen=True)
class Placement:
    """Where a run's weights and K/V cache are, and what that takes.

    Attributes:
        layers: of the transformer.
        on_device: layers whose weights stay on the device; the others are streamed.
        on_host: of the others, those kept in page-locked host memory; the rest come from the file.
        slots: streamed layers that may be on the device at a time.
        token_block: tokens per layer forward.
        cache: where the K/V cache is kept.
        window: chunks denoised at a time.
        total_weight_bytes: of all weights.
        weight_bytes: of weights on the device.
        working_bytes: of everything else on the device at the peak.
        host_bytes: of weights and K/V in host memory, without the pages of files, which the system may drop.
        slowdown: predicted time of an iteration, as a multiple of that with everything on the device.
        run: what it was made for.
    """

    layers: int
    on_device: tuple[int, ...]
    on_host: tuple[int, ...]
    slots: int
    token_block: int
    cache: CacheDevice
    window: int
    total_weight_bytes: int
    weight_bytes: int
    working_bytes: int
    host_bytes: int
    slowdown: float
    run: PlannedRun = field(compare=False, repr=False)

    @property
    def streaming(self) -> bool:
        """Tells whether layers are streamed."""
        return len(self.on_device) < self.layers

    @property
    def device_bytes(self) -> int:
        """Returns the bytes on the device at the peak."""
        return self.weight_bytes + self.working_bytes

    @property
    def spare_bytes(self) -> int:
        """Returns the bytes that must be free on the device besides the weights: the working memory and the reserve."""
        return math.ceil(self.device_bytes / (1 - _RESERVE)) - self.weight_bytes

    @property
    def needed_bytes(self) -> int:
        """Returns the free device memory that this takes, the reserve included."""
        return self.weight_bytes + self.spare_bytes

    def describe(self) -> str:
        """Returns one line for a log."""
        weights = f"all weights on the device ({_gb(self.weight_bytes)})"
        if self.streaming:
            streamed = self.layers - len(self.on_device)
            source = "memory" if len(self.on_host) == streamed else "memory and file" if self.on_host else "the file"
            weights = f"{streamed} of {self.layers} layers stream from {source}"
        return (
            f"{weights}, K/V cache on the {self.cache}, {self.token_block} tokens at a time, about {_gb(self.device_bytes)} in all"
            + (f", {self.slowdown - 1:.0%} slower than with everything on the device" if self.slowdown > 1.005 else "")
        )


def place(
    config: MagiConfig,
    weights: WeightSizes,
    free: int | None,
    options: MemoryOptions | None = None,
    prefix_frames: int = 0,
    *,
    free_host: int | None = None,
    allow_smaller_window: bool = False,
    other_model_bytes: int = 0,
    reserved: int = 0,
    machine: Machine | None = None,
    limit: Limit | None = None,
) -> Placement:
    """Returns the placement that fits and is the fastest by the forecast.

    A tenth of the device memory is left to the allocator's fragmentation and to kernels' workspaces.

    Args:
        config: the model, and the size, steps, window and frames of the run.
        weights: sizes of the model's weights, see `weight_sizes`.
        free: bytes free on the device before anything is loaded; None where the device works in host memory: a budget
            means nothing there, and only what `options` asks for is streamed.
        options: settings fixed by hand.
        prefix_frames: latent frames of the image or clip that the video starts from.
        free_host: bytes free in host memory; None: unknown, then streamed layers come from the file.
        allow_smaller_window: whether a smaller window may be taken if nothing else helps.
        other_model_bytes: bytes that another model, such as the VAE, takes on the device between two iterations.
        reserved: bytes of `free` that another model takes all the time.
        machine: speeds for the forecast.
        limit: largest layout that may be chosen, whatever `options` says.

    Raises:
        MagiError: nothing that `options` allows fits; it names what would help.
    """
    options, machine = options or MemoryOptions(), machine or Machine()
    if free is None:
        run = PlannedRun(config, prefix_frames, free_host)
        options = replace(options, token_block=options.token_block or CPU_TOKEN_BLOCK)
        choice = _choices(run, weights, options, None, other_model_bytes, machine, limit)[0]
        return choice.place(choice.counts[0])
    room = free - reserved if options.budget is None else options.budget
    runtime = config.runtime
    windows = smaller_windows(runtime.num_steps, runtime.window_size) if allow_smaller_window else []
    allowed = [w for w in (runtime.window_size, *windows) if not (allow_smaller_window and limit and w > limit.window)]
    for window in allowed or (runtime.window_size,):
        run = PlannedRun(config.with_runtime(window_size=window), prefix_frames, free)
        choices = _choices(run, weights, options, free_host, other_model_bytes, machine, limit)
        found = [placement for choice in choices for placement in _fitting(choice, room)]
        if found:
            return min(found, key=lambda p: (p.slowdown, p.device_bytes))
    raise MagiError(_too_little(config, weights, options, prefix_frames, other_model_bytes, room, windows))


def smallest(
    config: MagiConfig,
    weights: WeightSizes,
    options: MemoryOptions | None = None,
    prefix_frames: int = 0,
    other_model_bytes: int = 0,
) -> Placement:
    """Returns the placement that `options` allows with the least device memory; arguments as for `place`."""
    run = PlannedRun(config, prefix_frames, None)
    choices = _choices(run, weights, options or MemoryOptions(), None, other_model_bytes, Machine())
    return min((c.place(c.counts[-1]) for c in choices), key=lambda p: p.device_bytes)


def spread(layers: int, count: int) -> tuple[int, ...]:
    """Returns `count` of the layers, evenly spaced: while one that stays computes, the next ones can be uploaded."""
    return tuple(i * layers // count for i in range(count))


@dataclass(frozen=True)
class _Choice:
    """A placement but for how many layers stay on the device."""

    run: PlannedRun
    weights: WeightSizes
    options: MemoryOptions
    cache: CacheDevice
    token_block: int
    slots: int
    working_bytes: int
    kv_bytes: int  # of a layer's cache
    room_on_host: int | None
    machine: Machine
    seconds: float  # of a layer forward
    most_layers: int

    @property
    def counts(self) -> range:
        """Returns how many layers may stay, the most first."""
        layers = len(self.weights.blocks)
        most = min(self.most_layers, layers)
        least = most if self.options.streaming is False else 0
        return range(0 if self.options.streaming else most, least - 1, -1)

    def weight_bytes(self, count: int) -> int:
        """Returns the bytes of weights on the device if `count` layers stay."""
        kept = set(spread(len(self.weights.blocks), count))
        streamed = [size for i, size in enumerate(self.weights.packed) if i not in kept]
        return self.weights.outer + sum(self.weights.packed[i] for i in kept) + ring_bytes(streamed, self.slots)

    def place(self, count: int) -> Placement:
        """Returns the placement in which `count` layers stay."""
        weights, layers = self.weights, len(self.weights.blocks)
        on_device = spread(layers, count)
        on_host = self._on_host([i for i in range(layers) if i not in on_device])
        rates = [
            0.0 if i in on_device else self.machine.host_bandwidth if i in on_host else self.machine.file_bandwidth
            for i in range(layers)
        ]
        copies = [size / rate if rate else 0.0 for size, rate in zip(weights.packed, rates, strict=True)]
        kv_copy = self.kv_bytes / self.machine.host_bandwidth if self.cache == "host" else 0.0
        took = iteration_seconds(self.seconds, copies, self.slots, kv_copy, self.token_block)
        fastest = iteration_seconds(self.seconds, [0.0] * layers, 1, token_block=TOKEN_BLOCK)
        return Placement(
            layers=layers,
            on_device=on_device,
            on_host=on_host,
            slots=self.slots,
            token_block=self.token_block,
            cache=self.cache,
            window=self.run.config.runtime.window_size,
            total_weight_bytes=weights.total,
            weight_bytes=self.weight_bytes(count),
            working_bytes=self.working_bytes,
            host_bytes=sum(weights.packed[i] for i in on_host) + layers * self.kv_bytes * (self.cache == "host"),
            slowdown=took / fastest,
            run=self.run,
        )

    def _on_host(self, streamed: Sequence[int]) -> tuple[int, ...]:
        """Returns the layers that host memory keeps: all, or as many as there is room for, evenly among the others."""
        if self.weights.numerics.stored_fp8 or self.options.pinned:
            return tuple(streamed)
        if self.options.pinned is False or self.room_on_host is None:
            return ()
        room = self.room_on_host - len(self.weights.blocks) * self.kv_bytes * (self.cache == "host")
        for count in range(len(streamed), 0, -1):
            found = tuple(streamed[i] for i in spread(len(streamed), count))
            if sum(self.weights.packed[i] for i in found) <= room:
                return found
        return ()


def _choices(
    run: PlannedRun,
    weights: WeightSizes,
    options: MemoryOptions,
    free_host: int | None,
    other_model_bytes: int,
    machine: Machine,
    limit: Limit | None = None,
) -> list[_Choice]:
    """Returns every combination of what is not fixed; without streaming, the fastest first."""
    config, prefix_frames = run.config, run.prefix_frames
    seconds = iteration_flops(config, prefix_frames) / len(weights.blocks) / (machine.tflops * 1e12)
    caches: tuple[CacheDevice, ...] = get_args(CacheDevice) if options.cache == "auto" else (options.cache,)
    blocks: tuple[int, ...] = TOKEN_BLOCKS if options.token_block is None else (options.token_block,)
    most_layers = len(weights.blocks)
    if limit:
        caches = ("host",) if limit.cache == "host" else caches
        blocks = tuple(b for b in blocks if b <= limit.token_block) or (limit.token_block,)
        most_layers = limit.layers
    kv = kv_bytes(config, prefix_frames, weights.itemsize)
    found = []
    for cache in caches:
        for block in blocks:
            working = working_bytes(
                config,
                prefix_frames=prefix_frames,
                cache_on_device=cache == "device",
                token_block=block,
                numerics=weights.numerics,
            )
            # Between two iterations only the cache stays.
            working = max(working, other_model_bytes + len(weights.blocks) * kv * (cache == "device"))
            room_on_host = None if free_host is None else round(free_host * (1 - _HOST_RESERVE))
            found += [
                _Choice(
                    *(run, weights, options, cache, block, slots, working),
                    *(kv, room_on_host, machine, seconds, most_layers),
                )
                for slots in _SLOTS
            ]
    return found


def _fitting(choice: _Choice, room: int) -> Iterator[Placement]:
    """Yields the placement with as many layers on the device as there is room for, if any."""
    for count in choice.counts:
        if math.ceil((choice.weight_bytes(count) + choice.working_bytes) / (1 - _RESERVE)) <= room:
            yield choice.place(count)
            return


def _too_little(
    config: MagiConfig,
    weights: WeightSizes,
    options: MemoryOptions,
    prefix_frames: int,
    other_model_bytes: int,
    room: int,
    windows: Sequence[int],
) -> str:
    """Returns the message for a run that does not fit, with the remedies that would help."""

    def least(config: MagiConfig, **changes: Any) -> int:
        return smallest(config, weights, replace(options, **changes), prefix_frames, other_model_bytes).needed_bytes

    needed = least(config)
    remedies = {
        "a smaller size": True,
        "streaming weights": options.streaming is False,
        "the K/V cache on the host": options.cache == "device",
        "a smaller token block": options.token_block is not None and least(config, token_block=None) < needed,
        **{
            f"a window of {n}": least(config.with_runtime(window_size=n)) < needed
            for n in smaller_windows(config.runtime.num_steps, config.runtime.window_size)[-1:]
            if n not in windows
        },
        "a larger budget": options.budget is not None,
    }
    runtime = config.runtime
    tried = f" or {' or '.join(map(str, windows))}" if windows else ""
    return (
        f"{runtime.video_size_w}x{runtime.video_size_h} with a window of {runtime.window_size}{tried} needs about "
        f"{_gb(min(needed, *(least(config.with_runtime(window_size=n)) for n in windows), needed))} of device memory; "
        f"{'free are' if options.budget is None else 'the budget is'} {_gb(room)}. "
        f"Try {' or '.join(name for name, helps in remedies.items() if helps)}."
    )


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"

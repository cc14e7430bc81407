"""What of a run lies where: the plan that is made before anything is loaded, from headers, settings and free memory."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from ..config import MagiConfig
from ..errors import MagiError
from ..offload.streamed_blocks import ring_bytes
from ..sampling.schedule import smaller_windows
from ..transformer.inputs import TOKEN_BLOCK, CacheDevice
from .cost import Machine, iteration_flops, iteration_seconds
from .footprint import WeightSizes, key_bytes, working_bytes

TOKEN_BLOCKS = (TOKEN_BLOCK, 2048, 1024, 512, 256)
_SLOTS = (3, 2)
_RESERVE = 0.1  # of a device's memory: what the allocator rounds up and cannot use, and kernels' workspaces
_HOST_RESERVE = 0.25  # of free host memory, which page-locked layers leave to everything else


@dataclass(frozen=True)
class MemoryOptions:
    """What may be fixed by hand; None and "auto" leave it to `place`.

    Attributes:
        budget: bytes of device memory for everything; None: what is free. It is taken at its word, even if less is free.
        streaming: True fetches every layer when its turn comes, False keeps all on the device.
        pinned: True has all fetched layers wait in page-locked host memory, False reads them from the file each time.
        cache: where finished chunks' keys and values are kept.
        token_block: tokens that are taken through a layer at a time.
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
        token_block: tokens that are taken through a layer at a time.
        cache: where keys and values are kept: "device" leaves it open, "host" does not.
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
        given: latent frames of an image or clip that come before what is made.
        free: bytes that were free for it, on the device or, where that has no memory of its own, the host; None: unknown.
    """

    config: MagiConfig
    given: int
    free: int | None


@dataclass(frozen=True)
class Placement:
    """Where a run's parts lie.

    Attributes:
        layers: of the transformer.
        on_device: layers whose weights stay on the device; the others are fetched.
        on_host: of the others, those that wait in page-locked host memory; the rest come from the file.
        slots: fetched layers that may be on the device at a time.
        token_block: tokens that are taken through a layer at a time.
        cache: where keys and values are kept.
        window: chunks denoised at a time.
        total_weight_bytes: of all weights.
        weight_bytes: of weights on the device.
        working_bytes: of everything else on the device at the peak.
        host_bytes: of weights and keys in host memory; files' pages, which the system may drop, are not counted.
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
        """Whether layers are fetched."""
        return len(self.on_device) < self.layers

    @property
    def device_bytes(self) -> int:
        """On the device at the peak."""
        return self.weight_bytes + self.working_bytes

    @property
    def spare_bytes(self) -> int:
        """What must be free on the device besides the weights: the working memory, and the reserve."""
        return math.ceil(self.device_bytes / (1 - _RESERVE)) - self.weight_bytes

    @property
    def needed_bytes(self) -> int:
        """Free device memory that this takes, the reserve included."""
        return self.weight_bytes + self.spare_bytes

    def describe(self) -> str:
        """One line for a log."""
        weights = f"all weights on the device ({_gb(self.weight_bytes)})"
        if self.streaming:
            fetched = self.layers - len(self.on_device)
            source = "memory" if len(self.on_host) == fetched else "memory and file" if self.on_host else "the file"
            weights = f"{fetched} of {self.layers} layers stream from {source}"
        keys = "the device" if self.cache == "device" else "the host"
        return (
            f"{weights}, keys on {keys}, {self.token_block} tokens at a time, about {_gb(self.device_bytes)} in all"
            + (f", {self.slowdown - 1:.0%} slower than with everything on the device" if self.slowdown > 1.005 else "")
        )


def place(
    config: MagiConfig,
    weights: WeightSizes,
    free: int | None,
    options: MemoryOptions | None = None,
    given: int = 0,
    *,
    free_host: int | None = None,
    may_narrow: bool = False,
    companion: int = 0,
    beside: int = 0,
    machine: Machine | None = None,
    limit: Limit | None = None,
) -> Placement:
    """Where to put a model's weights and keys so that a run has room: the fastest way that fits, by a forecast.

    A tenth of the memory is left for what the allocator rounds up and kernels work in.

    Args:
        config: the model, and the size, steps, window and frames of the run.
        weights: of the model, see `weight_sizes`.
        free: bytes free on the device before anything is loaded; None where memory is the host's own: a budget means
            nothing there, nothing is moved that `options` does not ask for, and only the token block depends on what is free.
        options: what is fixed by hand.
        given: latent frames of an image or clip that come before what is made.
        free_host: bytes free in host memory; None: unknown, then fetched layers come from the file.
        may_narrow: a smaller window may be taken, if nothing else helps.
        companion: bytes that another model, such as the VAE, takes on the device between two iterations.
        beside: bytes of those that are free which another model takes all the time.
        machine: what the forecast assumes.
        limit: nothing larger is chosen, whatever `options` say.

    Raises:
        MagiError: it does not fit, whatever of what is not fixed is chosen.
    """
    options, machine = options or MemoryOptions(), machine or Machine()
    if free is None:
        choices = _choices(PlannedRun(config, given, free_host), weights, options, None, companion, machine, limit)
        first = [c for c in choices if c.cache == choices[0].cache and c.slots == choices[0].slots]
        room = math.inf if free_host is None else (1 - _HOST_RESERVE) * free_host
        choice = next((c for c in first if c.working_bytes <= room), first[-1])
        return choice.place(choice.counts[0])
    room = free - beside if options.budget is None else options.budget
    runtime = config.runtime
    windows = smaller_windows(runtime.num_steps, runtime.window_size) if may_narrow else []
    allowed = [w for w in (runtime.window_size, *windows) if not (may_narrow and limit and w > limit.window)]
    for window in allowed or (runtime.window_size,):
        run = PlannedRun(config.with_runtime(window_size=window), given, free)
        choices = _choices(run, weights, options, free_host, companion, machine, limit)
        found = [placement for choice in choices for placement in _fitting(choice, room)]
        if found:
            return min(found, key=lambda p: (p.slowdown, p.device_bytes))
    raise MagiError(_too_little(config, weights, options, given, companion, room, windows))


def smallest(
    config: MagiConfig,
    weights: WeightSizes,
    options: MemoryOptions | None = None,
    given: int = 0,
    companion: int = 0,
) -> Placement:
    """The placement that takes least of the device, within what `options` fix; arguments as for `place`."""
    run = PlannedRun(config, given, None)
    choices = _choices(run, weights, options or MemoryOptions(), None, companion, Machine())
    return min((c.place(c.counts[-1]) for c in choices), key=lambda p: p.device_bytes)


def spread(layers: int, count: int) -> tuple[int, ...]:
    """`count` of so many layers, evenly: while one that stays is at work, those to come can be fetched."""
    return tuple(i * layers // count for i in range(count))


@dataclass(frozen=True)
class _Choice:
    """All that is decided but for how many layers stay on the device."""

    run: PlannedRun
    weights: WeightSizes
    options: MemoryOptions
    cache: CacheDevice
    token_block: int
    slots: int
    working_bytes: int
    key_bytes: int  # of a layer
    room_on_host: int | None
    machine: Machine
    seconds: float  # of a layer's work
    most_layers: int

    @property
    def counts(self) -> range:
        """How many layers may stay, from all to none."""
        layers = len(self.weights.blocks)
        most = min(self.most_layers, layers)
        least = most if self.options.streaming is False else 0
        return range(0 if self.options.streaming else most, least - 1, -1)

    def weight_bytes(self, count: int) -> int:
        """On the device, if `count` layers stay."""
        kept = set(spread(len(self.weights.blocks), count))
        fetched = [size for i, size in enumerate(self.weights.packed) if i not in kept]
        return self.weights.outer + sum(self.weights.packed[i] for i in kept) + ring_bytes(fetched, self.slots)

    def place(self, count: int) -> Placement:
        """The placement in which `count` layers stay."""
        weights, layers = self.weights, len(self.weights.blocks)
        on_device = spread(layers, count)
        on_host = self._on_host([i for i in range(layers) if i not in on_device])
        rates = [
            0.0 if i in on_device else self.machine.bus if i in on_host else self.machine.disk for i in range(layers)
        ]
        copies = [size / rate if rate else 0.0 for size, rate in zip(weights.packed, rates, strict=True)]
        keys = self.key_bytes / self.machine.bus if self.cache == "host" else 0.0
        took = iteration_seconds(self.seconds, copies, self.slots, keys, self.token_block)
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
            host_bytes=sum(weights.packed[i] for i in on_host) + layers * self.key_bytes * (self.cache == "host"),
            slowdown=took / fastest,
            run=self.run,
        )

    def _on_host(self, fetched: Sequence[int]) -> tuple[int, ...]:
        """Layers that wait in host memory: all, or as many as there is room for, evenly among the others."""
        if self.weights.numerics.stored_fp8 or self.options.pinned:
            return tuple(fetched)
        if self.options.pinned is False or self.room_on_host is None:
            return ()
        room = self.room_on_host - len(self.weights.blocks) * self.key_bytes * (self.cache == "host")
        for count in range(len(fetched), 0, -1):
            found = tuple(fetched[i] for i in spread(len(fetched), count))
            if sum(self.weights.packed[i] for i in found) <= room:
                return found
        return ()


def _choices(
    run: PlannedRun,
    weights: WeightSizes,
    options: MemoryOptions,
    free_host: int | None,
    companion: int,
    machine: Machine,
    limit: Limit | None = None,
) -> list[_Choice]:
    """Every combination of what is not fixed, the fastest first."""
    config, given = run.config, run.given
    seconds = iteration_flops(config, given) / len(weights.blocks) / (machine.tflops * 1e12)
    caches: tuple[CacheDevice, ...] = get_args(CacheDevice) if options.cache == "auto" else (options.cache,)
    blocks: tuple[int, ...] = TOKEN_BLOCKS if options.token_block is None else (options.token_block,)
    most_layers = len(weights.blocks)
    if limit:
        caches = ("host",) if limit.cache == "host" else caches
        blocks = tuple(b for b in blocks if b <= limit.token_block) or (limit.token_block,)
        most_layers = limit.layers
    keys = key_bytes(config, given, weights.itemsize)
    found = []
    for cache in caches:
        for block in blocks:
            working = working_bytes(
                config,
                given=given,
                cache_on_device=cache == "device",
                token_block=block,
                numerics=weights.numerics,
            )
            # Between two iterations only the cache stays.
            working = max(working, companion + len(weights.blocks) * keys * (cache == "device"))
            room_on_host = None if free_host is None else round(free_host * (1 - _HOST_RESERVE))
            found += [
                _Choice(
                    *(run, weights, options, cache, block, slots, working),
                    *(keys, room_on_host, machine, seconds, most_layers),
                )
                for slots in _SLOTS
            ]
    return found


def _fitting(choice: _Choice, room: int) -> Iterator[Placement]:
    """The placement with as many layers on the device as there is room for, if any."""
    for count in choice.counts:
        if math.ceil((choice.weight_bytes(count) + choice.working_bytes) / (1 - _RESERVE)) <= room:
            yield choice.place(count)
            return


def _too_little(
    config: MagiConfig,
    weights: WeightSizes,
    options: MemoryOptions,
    given: int,
    companion: int,
    room: int,
    windows: Sequence[int],
) -> str:
    def least(config: MagiConfig, **changes: Any) -> int:
        return smallest(config, weights, replace(options, **changes), given, companion).needed_bytes

    needed = least(config)
    remedies = {
        "a smaller size": True,
        "streaming weights": options.streaming is False,
        "keys on the host": options.cache == "device",
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

"""Timing a model of any size, with random weights or a file's: the sampler's iterations in the middle of a video."""

import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch

from ..checkpoint.mapped_file import TensorSource
from ..checkpoint.reader import Checkpoint
from ..config import LATENT_CHANNELS, SPATIAL_DOWNSAMPLE, MagiConfig
from ..errors import MagiError
from ..media.frames import check_size
from ..model_files.load import load_transformer
from ..planning.cost import forward_flops, input_tokens
from ..planning.footprint import weight_sizes
from ..planning.placement import MemoryOptions, place
from ..sampling.captions import Caption
from ..sampling.prepare import make_sampler
from ..sampling.schedule import check_steps
from ..sampling.state import ProgressEvent, SamplerState
from ..system.device import compute_device, free_memory, synchronize
from ..system.host_memory import memory_beside
from ..system.progress import OnProgress
from ..transformer.inputs import Pass
from ..transformer.model import Transformer
from ..transformer.random_weights import RandomTensors
from ..transformer.weights import check_tensors

_CAPTION_TOKENS = 120
# Operators whose time counts as matrix products and attention.
_HEAVY = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_mm", "attention", "mkldnn")


@dataclass(frozen=True)
class BenchSettings:
    """What to time.

    Attributes:
        config: model, size, steps and window.
        device: None: the best there is.
        dtype: None: bfloat16.
        chunks: active chunks in an iteration, at most the window; None: the window, but 1 on a CPU.
        iterations: how many to time; None: 3, but 1 on a CPU.
        warmup: iterations before them; None: 1, but 0 on a CPU.
        offload: True fetches every layer in its turn, False keeps all on the device; None: what memory allows.
        budget: bytes of device memory for everything, enforced where the device can; None: what is free.
        model: a file or folder instead of random weights; its layers may also be streamed from there.
        profile: also measure which share of the time goes into matrix products and attention.
    """

    config: MagiConfig
    device: str | None = None
    dtype: torch.dtype | None = None
    chunks: int | None = None
    iterations: int | None = None
    warmup: int | None = None
    offload: bool | None = None
    budget: int | None = None
    model: Path | None = None
    profile: bool = False


@dataclass(frozen=True)
class BenchResult:
    """What was measured. Times in seconds, memory in bytes; peak memory is the device's, or the process's on a CPU.

    `fetch_seconds` is what fetching all streamed layers takes with nothing else to do; beside the computing it should
    vanish.
    """

    device: str
    torch_version: str
    size: str
    weights: str
    active_chunks: int
    tokens: int
    seconds: list[float]
    seconds_per_iteration: float
    tokens_per_second: float
    tflop: float
    tflops_per_second: float
    weight_bytes: int
    load_seconds: float
    peak_memory: int | None
    predicted_peak: int | None = None
    layers_on_device: int = 0
    layers_on_host: int = 0
    layers: int = 0
    fetched_bytes: int = 0
    fetch_seconds: float = 0.0
    heavy_share: float | None = None
    heavy_operators: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Returns the fields as JSON values."""
        return asdict(self)


class _Enough(Exception):  # noqa: N818 (a signal)
    """All iterations are timed."""


def run_bench(
    settings: BenchSettings,
    on_load: OnProgress | None = None,
    on_progress: Callable[[int, int, float], None] | None = None,
) -> BenchResult:
    """Builds the model, brings the window to the middle of a video and times iterations.

    Args:
        settings: what to time.
        on_load: called with (layers loaded, layers).
        on_progress: called with (iterations done, iterations, fraction of the running one).

    Raises:
        MagiError: the model cannot take the sizes or steps, a setting is out of range, or it does not fit the memory.
    """
    device = compute_device(settings.device)
    on_cpu = device.type == "cpu"
    runtime = settings.config.runtime
    # What the sampler would refuse, but before gigabytes of weights are made.
    check_size(runtime.video_size_h, runtime.video_size_w)
    check_steps(runtime.num_steps, runtime.window_size, runtime.noise2clean_kvrange)
    if settings.config.model.num_layers < 1:
        raise MagiError(f"{settings.config.model.num_layers} layers are no model. Use at least 1.")
    active = (1 if on_cpu else runtime.window_size) if settings.chunks is None else settings.chunks
    if not 1 <= active <= runtime.window_size:
        raise MagiError(
            f"{active} active chunks do not fit the window of {runtime.window_size}. Use 1 to {runtime.window_size}."
        )
    warmup = (0 if on_cpu else 1) if settings.warmup is None else settings.warmup
    count = (1 if on_cpu else 3) if settings.iterations is None else settings.iterations
    if count < 1 or warmup < 0:
        raise MagiError(
            f"{count} iterations after {warmup} of warm-up cannot be timed. Use at least 1 after at least 0."
        )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        if settings.budget is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            # By its index: it takes no device without one. None is the current card, as "cuda" is.
            torch.cuda.set_per_process_memory_fraction(min(1.0, settings.budget / total), device.index)
    source = _source(settings)
    # Random weights are kept in memory, as they would have to be made again at every use.
    options = MemoryOptions(settings.budget, settings.offload, pinned=None if settings.model else True)
    sizes = weight_sizes(source.tensors, settings.config.model, device, dtype=settings.dtype)
    free = None if on_cpu else free_memory(device)
    chunk_frames = runtime.chunk_width * runtime.temporal_downsample_factor
    # The timed part of a video: as many chunks as are ever in the window, and one that is finished.
    placement = place(
        settings.config.with_runtime(num_frames=2 * runtime.window_size * chunk_frames),
        sizes,
        free,
        options,
        free_host=memory_beside(device),
    )
    started = time.perf_counter()
    model = load_transformer(source, settings.config, device, settings.dtype, progress=on_load, placement=placement)
    load_seconds = time.perf_counter() - started
    fetch_seconds = _fetch_all(model) if placement.streaming and not on_cpu else 0.0
    times = [0.0]

    def timed(event: ProgressEvent) -> None:
        synchronize(device)
        times.append(time.perf_counter())
        if len(times) > warmup + count:
            raise _Enough

    def on_fraction(fraction: float) -> None:
        if on_progress:
            on_progress(len(times) - 1, warmup + count, fraction)

    profiler = torch.profiler.profile(activities=_activities(device)) if settings.profile else None
    with _recorded_work(model) as recorded:
        sampler = make_sampler(
            model,
            caption=Caption(torch.randn(_CAPTION_TOKENS, settings.config.model.caption_channels)),
            style_tokens=(),
            duration_tokens=False,
            state=_middle_of_a_video(settings.config, active, device),
            # With fewer chunks than the window holds, no more may enter: they would be timed too.
            num_frames=chunk_frames * (active if active < runtime.window_size else active + warmup + count),
            progress=timed,
            heartbeat=on_fraction,
        )
        sampler.fill_cache()
        recorded.clear()
        synchronize(device)
        times[0] = time.perf_counter()
        try:
            with profiler or nullcontext():
                for _ in sampler:
                    pass
        except _Enough:
            pass
    seconds = [b - a for a, b in pairwise(times)][warmup:]
    # Iterations differ (some also refresh a finished chunk): time and work must be those of the same one.
    typical, (flops, tokens) = sorted(zip(seconds, recorded[warmup:], strict=True))[(len(seconds) - 1) // 2]
    result = BenchResult(
        device=_device_name(device),
        torch_version=torch.__version__,
        size=f"{runtime.video_size_w}x{runtime.video_size_h}",
        weights="random weights" if settings.model is None else f"the weights in {str(settings.model)!r}",
        active_chunks=active,
        tokens=tokens,
        seconds=seconds,
        seconds_per_iteration=typical,
        tokens_per_second=tokens / typical,
        tflop=flops / 1e12,
        tflops_per_second=flops / typical / 1e12,
        weight_bytes=sum(info.nbytes for info in source.tensors.values()),
        load_seconds=load_seconds,
        predicted_peak=None if on_cpu else placement.device_bytes,
        layers_on_device=len(placement.on_device),
        layers_on_host=len(placement.on_host),
        layers=placement.layers,
        fetched_bytes=sum(size for i, size in enumerate(sizes.packed) if i not in placement.on_device),
        fetch_seconds=fetch_seconds,
        peak_memory=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_process_memory(),
    )
    return replace(result, **_shares(profiler, device)) if profiler else result


def _source(settings: BenchSettings) -> TensorSource:
    if settings.model is None:
        return RandomTensors(settings.config.model, settings.config.engine.fp8_quant)
    checkpoint = Checkpoint(settings.model)
    check_tensors(checkpoint, settings.config.model, repr(str(checkpoint.path)))
    checkpoint.check_whole()
    return checkpoint


def _fetch_all(model: Transformer) -> float:
    """Returns the seconds that fetching all streamed layers takes, the second time."""
    for _ in range(2):
        synchronize(model.device)
        started = time.perf_counter()
        for _ in model.blocks:
            pass
        synchronize(model.device)
    return time.perf_counter() - started


def peak_process_memory() -> int:
    """Returns the most bytes of memory that this process has ever held."""
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _middle_of_a_video(config: MagiConfig, active: int, device: torch.device) -> SamplerState:
    """Returns a state with `active` chunks in the window, their latents noise."""
    runtime = config.runtime
    size = (runtime.video_size_h // SPATIAL_DOWNSAMPLE, runtime.video_size_w // SPATIAL_DOWNSAMPLE)
    shape = (1, LATENT_CHANNELS, runtime.chunk_width, *size)
    steps = runtime.num_steps // runtime.window_size
    # The second step of a stage, as the first one also refreshes the chunk that has just been finished.
    iteration = steps * (active - 1) + min(1, steps - 1)
    return SamplerState(iteration, {c: torch.randn(shape, device=device) for c in range(active)})


@contextmanager
def _recorded_work(model: Transformer) -> Iterator[list[tuple[float, int]]]:
    """Yields a list that gets operations and tokens of each of the model's iterations while this lasts."""
    recorded: list[tuple[float, int]] = []
    forward = model.forward

    def recording(passes: list[Pass], *rest: object) -> object:
        tokens = sum(input_tokens(model.shape, item) for p in passes for item in p.chunks)
        recorded.append((forward_flops(model.shape, passes), tokens))
        return forward(passes, *rest)  # type: ignore[arg-type]

    model.forward = recording  # type: ignore[method-assign, assignment]
    try:
        yield recorded
    finally:
        # The model and this would keep each other, and the card's memory, until Python looks for cycles.
        del model.forward


def _activities(device: torch.device) -> list[torch.profiler.ProfilerActivity]:
    kinds = [torch.profiler.ProfilerActivity.CPU]
    return [*kinds, torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else kinds


def _shares(profiler: torch.profiler.profile, device: torch.device) -> dict[str, Any]:
    """Returns the share of matrix products and attention in all operators' own time, and the ten largest shares."""
    attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    own = {e.key: float(getattr(e, attribute)) for e in profiler.key_averages() if e.key.startswith("aten::")}
    total = sum(own.values())
    heavy = sum(t for name, t in own.items() if any(h in name for h in _HEAVY))
    largest = sorted(own.items(), key=lambda item: -item[1])[:10]
    return {"heavy_share": heavy / total, "heavy_operators": {name: round(t / total, 4) for name, t in largest}}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"

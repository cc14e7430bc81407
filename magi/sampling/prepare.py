"""From captions, noise and prefix latents to a run of the sampler; all checks happen here, before any computing."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch

from ..config import LATENT_CHANNELS, SPATIAL_DOWNSAMPLE, MagiConfig
from ..errors import MagiError
from ..media.frames import check_size
from ..system.finite import check_finite
from ..transformer.model import Transformer
from .captions import Caption, caption_per_chunk, null_caption
from .sampler import Sampler
from .schedule import Schedule
from .special_tokens import SpecialTokens
from .state import Chunk, Noise, OnIteration, SamplerState, check_state


def make_sampler(
    model: Transformer,
    config: MagiConfig | None = None,
    *,
    caption: Caption | Sequence[Caption],
    special_tokens: SpecialTokens | None = None,
    style_tokens: Sequence[str] = ("hq",),
    duration_tokens: bool = True,
    negative_tokens: bool = False,
    noise: torch.Tensor | None = None,
    seed: int = 0,
    prefix: torch.Tensor | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    state: SamplerState | None = None,
    progress: OnIteration | None = None,
    heartbeat: Callable[[float], None] | None = None,
    report: Callable[[str], None] | None = None,
) -> Sampler:
    """Checks all arguments and builds a sampler; no chunk is computed until it is iterated.

    Args:
        model: the transformer.
        config: settings; None takes the model's own.
        caption: one for all chunks, or one per chunk (the last of a short list is used for all later chunks). A caption
            without tokens is unconditional.
        special_tokens: needed for style, duration and negative tokens.
        style_tokens: names from `special_tokens.STYLES`.
        duration_tokens: tell each chunk how many follow it.
        negative_tokens: steer away from burnt-in captions, logos, transitions and borders (base models).
        noise: initial latents (1, 16, K * 6, h, w) of all K chunks, prefix included; None draws them from `seed`.
        seed: any integer.
        prefix: scaled latents (1, 16, Tp, h, w) to continue; one latent frame is an image.
        num_frames: video frames to generate after the prefix, rounded down to a multiple of 4 and then up to whole
            chunks; None takes the config's.
        height: pixels, a multiple of 16; None takes that of the noise, the prefix or the config.
        width: likewise.
        state: state to resume from: a copy of another sampler's with the same model and arguments, from any device.
        progress: called after every forward iteration; what it raises ends the run.
        heartbeat: called many times per iteration with the fraction of it that is done, 0 .. 1; likewise.
        report: called with a sentence whenever memory ran out and the run changed for it; None issues a warning.

    Raises:
        MagiError: the arguments contradict each other, or the model or the settings; raised before any computing.
    """
    config = config or model.config
    if config.model != model.shape:
        raise MagiError(
            "The config's model_config is not the loaded model's. Use the config the model was loaded with."
        )
    config = config.with_runtime(num_frames=num_frames, video_size_h=height, video_size_w=width)
    tensors = {name: x for name, x in (("noise", noise), ("prefix", prefix)) if x is not None}
    config = with_size_of(tensors, config, explicit=(height is not None, width is not None))
    run = plan_run(config, 0 if prefix is None else prefix.shape[2])
    batch, channels, frames, *size = run.chunk_shape
    whole = (batch, channels, run.schedule.chunks * frames, *size)
    if noise is not None and tuple(noise.shape) != whole:
        raise MagiError(
            f"The noise has the shape {tuple(noise.shape)}; {config.runtime.num_frames} frames after {run.prefix_frames} "
            f"prefix latents need {whole}."
        )
    captions = caption_per_chunk(caption, run.chunks, config.model, special_tokens, style_tokens, duration_tokens)
    return start_sampler(
        model,
        run,
        captions,
        special_tokens=special_tokens,
        negative_tokens=negative_tokens,
        noise=noise,
        seed=seed,
        prefix=prefix,
        state=state,
        on_iteration=progress,
        on_progress=heartbeat,
        on_shortage=report,
    )


@dataclass(frozen=True)
class RunPlan:
    """A run that was found possible: what is denoised when, and in which shape.

    Attributes:
        config: the settings, with the run's size, length and window.
        schedule: all forward iterations of the run.
        chunk_shape: shape of the latents of one chunk, (1, 16, W, h, w).
        prefix_frames: latent frames that come before what is made.
    """

    config: MagiConfig
    schedule: Schedule
    chunk_shape: tuple[int, ...]
    prefix_frames: int

    @property
    def chunks(self) -> int:
        """Returns the number of chunks that are generated."""
        return self.schedule.chunks - self.schedule.prefix_chunks

    def with_window(self, window: int) -> "RunPlan":
        """Returns the same run with another number of chunks denoised at a time."""
        return plan_run(self.config.with_runtime(window_size=window), self.prefix_frames)


def plan_run(config: MagiConfig, prefix_frames: int = 0) -> RunPlan:
    """Checks the size, length, steps and window in `config` and makes the run's schedule.

    Args:
        config: settings; `num_frames` are video frames to generate after the prefix, rounded down to a multiple of 4 and then
            up to whole chunks.
        prefix_frames: latent frames that come before what is made.

    Raises:
        MagiError: the model does not support one of them.
    """
    runtime = config.runtime
    height, width = runtime.video_size_h, runtime.video_size_w
    check_size(height, width, config.model.patch_size * SPATIAL_DOWNSAMPLE)
    if runtime.num_frames < runtime.temporal_downsample_factor:
        raise MagiError(
            f"num_frames is {runtime.num_frames}; it must be at least {runtime.temporal_downsample_factor}."
        )
    size = (height // SPATIAL_DOWNSAMPLE, width // SPATIAL_DOWNSAMPLE)
    shape = (1, LATENT_CHANNELS, runtime.chunk_width, *size)
    return RunPlan(config, Schedule.of_run(runtime, prefix_frames), shape, prefix_frames)


def start_sampler(
    model: Transformer,
    run: RunPlan,
    captions: Sequence[torch.Tensor],
    *,
    special_tokens: SpecialTokens | None = None,
    negative_tokens: bool = False,
    noise: torch.Tensor | None = None,
    seed: int = 0,
    prefix: torch.Tensor | None = None,
    state: SamplerState | None = None,
    on_iteration: OnIteration | None = None,
    on_progress: Callable[[float], None] | None = None,
    on_shortage: Callable[[str], None] | None = None,
) -> Sampler:
    """Builds the sampler of a run that was planned.

    Args:
        model: the transformer.
        run: made by `plan_run`, for as many latent frames as `prefix` has.
        captions: per generated chunk, (tokens, channels), made by `caption_per_chunk`.
        special_tokens: as for `make_sampler`, like `negative_tokens`, `noise`, `seed`, `prefix` and `state`.
        negative_tokens: likewise.
        noise: likewise.
        seed: likewise.
        prefix: likewise.
        state: likewise.
        on_iteration: `progress` of `make_sampler`.
        on_progress: `heartbeat` of `make_sampler`.
        on_shortage: `report` of `make_sampler`.

    Raises:
        MagiError: the state is not one of such a run.
    """
    if state is not None:
        check_state(state, run.schedule, run.chunk_shape)
        state = state.to(model.device)
    null = null_caption(model.outer.null_caption.cpu(), special_tokens, negative_tokens)
    drawn = Noise(run.chunk_shape, seed, noise)
    return Sampler(
        *(model, run.config, run.schedule, drawn, captions, null, prefix, state),
        *(on_iteration, on_progress, on_shortage),
    )


@wraps(make_sampler)
def generate_latents(*args: Any, **kwargs: Any) -> Iterator[Chunk]:
    """Yields each chunk of latents as soon as it is clean. Arguments and errors are those of `make_sampler`."""
    return iter(make_sampler(*args, **kwargs))


def with_size_of(tensors: Mapping[str, torch.Tensor], config: MagiConfig, explicit: tuple[bool, bool]) -> MagiConfig:
    """Returns the config with the size of latents, where its height and width are not explicit.

    Args:
        tensors: latents by the names that an error calls them by.
        config: holds the explicit sides.
        explicit: of height and width, whether it counts as it is.

    Raises:
        MagiError: a tensor is no latents, (1, 16, frames, h, w), holds NaN or infinity, or is of another size.
    """
    for name, x in tensors.items():
        if x.ndim != 5 or x.shape[:2] != (1, LATENT_CHANNELS) or x.shape[2] < 1:
            raise MagiError(
                f"The {name} has the shape {tuple(x.shape)}; it must be (1, {LATENT_CHANNELS}, frames, height / 8, width / 8)."
            )
        check_finite(x, f"the {name}", "Mend what it comes from: there is no picture in it.")
    height, width = config.runtime.video_size_h, config.runtime.video_size_w
    sizes = {name: tuple(SPATIAL_DOWNSAMPLE * side for side in x.shape[3:]) for name, x in tensors.items()}
    if sizes:
        found = next(iter(sizes.values()))
        height, width = height if explicit[0] else found[0], width if explicit[1] else found[1]
    for name, (rows, columns) in sizes.items():
        if (rows, columns) != (height, width):
            raise MagiError(
                f"The {name} is {columns}x{rows} pixels, the video {width}x{height}. Make both the same size."
            )
    return config.with_runtime(video_size_h=height, video_size_w=width)

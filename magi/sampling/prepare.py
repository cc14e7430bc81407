"""From captions, noise and prefix latents to a run of the sampler; all checks happen here, before any computing."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch

from ..config import LATENT_CHANNELS, SPATIAL_DOWNSAMPLE, MagiConfig
from ..errors import MagiError
from ..media.frames import check_size
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
    run = prepare(
        config,
        caption=caption,
        special_tokens=special_tokens,
        style_tokens=style_tokens,
        duration_tokens=duration_tokens,
        negative_tokens=negative_tokens,
        noise=noise,
        prefix=prefix,
        num_frames=num_frames,
        height=height,
        width=width,
    )
    if state is not None:
        check_state(state, run.schedule, run.chunk_shape)
        state = state.to(model.device)
    null = null_caption(model.outer.null_caption.cpu(), special_tokens, negative_tokens)
    drawn = Noise(run.chunk_shape, seed, noise)
    return Sampler(
        model, run.config, run.schedule, drawn, run.captions, null, prefix, state, progress, heartbeat, report
    )


@dataclass(frozen=True)
class Run:
    """A run whose arguments were checked.

    Attributes:
        config: the settings, with the run's size and length.
        schedule: all forward iterations of the run.
        chunk_shape: shape of the latents of one chunk, (1, 16, W, h, w).
        captions: per generated chunk, (tokens, channels).
    """

    config: MagiConfig
    schedule: Schedule
    chunk_shape: tuple[int, ...]
    captions: list[torch.Tensor]


def prepare(
    config: MagiConfig,
    *,
    caption: Caption | Sequence[Caption],
    special_tokens: SpecialTokens | None = None,
    style_tokens: Sequence[str] = ("hq",),
    duration_tokens: bool = True,
    negative_tokens: bool = False,
    noise: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Run:
    """Performs all checks of `make_sampler`, whose arguments these are, without a loaded model.

    Raises:
        MagiError: the arguments contradict each other or the settings.
    """
    config = config.with_runtime(num_frames=num_frames, video_size_h=height, video_size_w=width)
    runtime = config.runtime
    latent_size = _latent_size(config, noise, prefix, explicit=(height is not None, width is not None))
    prefix_frames = 0 if prefix is None else prefix.shape[2]
    if runtime.num_frames < runtime.temporal_downsample_factor:
        raise MagiError(
            f"num_frames is {runtime.num_frames}; it must be at least {runtime.temporal_downsample_factor}."
        )
    schedule = Schedule.of_run(runtime, prefix_frames)
    shape = (1, LATENT_CHANNELS, runtime.chunk_width, *latent_size)
    whole = (*shape[:2], schedule.chunks * runtime.chunk_width, *latent_size)
    if noise is not None and tuple(noise.shape) != whole:
        raise MagiError(
            f"The noise has the shape {tuple(noise.shape)}; {runtime.num_frames} frames after {prefix_frames} prefix latents need {whole}."
        )
    made = schedule.chunks - schedule.prefix_chunks
    captions = caption_per_chunk(caption, made, config.model, special_tokens, style_tokens, duration_tokens)
    null_caption(torch.zeros(1, config.model.caption_channels), special_tokens, negative_tokens)
    return Run(config, schedule, shape, captions)


@wraps(make_sampler)
def generate_latents(*args: Any, **kwargs: Any) -> Iterator[Chunk]:
    """Yields each chunk of latents as soon as it is clean. Arguments and errors are those of `make_sampler`."""
    return iter(make_sampler(*args, **kwargs))


def _latent_size(
    config: MagiConfig, noise: torch.Tensor | None, prefix: torch.Tensor | None, explicit: tuple[bool, bool]
) -> tuple[int, int]:
    """Returns height and width of the latents.

    Raises:
        MagiError: the model does not support the size, or the tensors disagree.
    """
    runtime = config.runtime
    size = (runtime.video_size_h / SPATIAL_DOWNSAMPLE, runtime.video_size_w / SPATIAL_DOWNSAMPLE)
    for name, x in (("noise", noise), ("prefix", prefix)):
        if x is None:
            continue
        if x.ndim != 5 or x.shape[:2] != (1, LATENT_CHANNELS) or x.shape[2] < 1:
            raise MagiError(
                f"The {name} has the shape {tuple(x.shape)}; it must be (1, {LATENT_CHANNELS}, frames, height / 8, width / 8)."
            )
    sized = next((x for x in (noise, prefix) if x is not None), None)
    if sized is not None:
        size = (size[0] if explicit[0] else sized.shape[3], size[1] if explicit[1] else sized.shape[4])
    for name, x in (("noise", noise), ("prefix", prefix)):
        if x is not None and tuple(x.shape[3:]) != size:
            raise MagiError(
                f"The {name} is {x.shape[4] * SPATIAL_DOWNSAMPLE}x{x.shape[3] * SPATIAL_DOWNSAMPLE} pixels, the video "
                f"{size[1] * SPATIAL_DOWNSAMPLE:g}x{size[0] * SPATIAL_DOWNSAMPLE:g}. Make both the same size."
            )
    height, width = (round(n * SPATIAL_DOWNSAMPLE) for n in size)
    check_size(height, width, config.model.patch_size * SPATIAL_DOWNSAMPLE)
    return height // SPATIAL_DOWNSAMPLE, width // SPATIAL_DOWNSAMPLE

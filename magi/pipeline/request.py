"""What to make, and all that follows from it: size, length, prefix and schedule, found before anything is loaded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from warnings import warn

import torch

from ..config import SPATIAL_DOWNSAMPLE, MagiConfig, ModelConfig
from ..errors import MagiError
from ..media.frames import LONGEST_SECONDS, check_clip_seconds, check_mode, clip_end, complete_size, fit, size_for
from ..media.video_reader import probe, read_image, read_video
from ..planning.placement import Placement
from ..runs.identity import UNKNOWN, config_settings
from ..sampling.captions import Caption, caption_per_chunk, null_caption
from ..sampling.prepare import RunPlan, plan_run, with_size_of
from ..sampling.schedule import check_steps
from ..sampling.special_tokens import SpecialTokens
from ..system.paths import user_path
from ..system.whole_files import file_fingerprint, tensor_digest

Media = str | Path | torch.Tensor  # a file, or frames uint8 (T, H, W, 3)

_WIDE = 16 / 9


@dataclass(frozen=True)
class Request:
    """What to make.

    Attributes:
        prompt: for the whole video, or one per chunk (second); the last of a short list holds to the end.
        captions: instead of prompts, their embeddings.
        image: first frame.
        video: clip to continue; only its end is used.
        continue_seconds: how much of that end.
        latents: instead of an image or video, its scaled latents, (1, 16, T, h, w): one latent frame is an image.
        seconds: length of what is made; rounded up to whole chunks. Or `frames`.
        frames: see `seconds`.
        height: in pixels; None: the model's size, in the shape of the image or video.
        width: likewise.
        area: instead of both, a number of pixels or a name of `frames.AREAS`, in the shape of the input or else 16:9.
        fit: "crop", "pad" or "stretch", for an image or video of another shape.
        seed: any integer.
        num_steps: denoising steps per chunk; None: the model's own.
        window_size: chunks denoised at a time; None: the model's own. Fewer are less work per iteration, but see more
            of the past.
        style_tokens: see `special_tokens.STYLES`.
        duration_tokens: tell each chunk how many are to come.
        negative_tokens: steer away from burnt-in captions, logos, transitions and borders (base models).
        clean_prompt: clean prompts as the model's training captions were.
    """

    prompt: str | Sequence[str] = ()
    image: Media | None = None
    video: Media | None = None
    continue_seconds: float = 2.0
    seconds: float | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    area: int | str | None = None
    fit: str = "crop"
    seed: int = 0
    num_steps: int | None = None
    window_size: int | None = None
    style_tokens: Sequence[str] = ("hq",)
    duration_tokens: bool = True
    negative_tokens: bool = False
    clean_prompt: bool = True
    captions: Sequence[Caption] | None = None
    latents: torch.Tensor | None = None

    @property
    def texts(self) -> list[str]:
        """Returns the prompts as a list."""
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)


@dataclass(frozen=True)
class Plan:
    """A request that was found possible, with all that follows from it.

    Attributes:
        request: what was asked for.
        run: what is denoised when, and in which size.
        prefix: frames that the video starts from, uint8 (T, H, W, 3), or None; they are still to be encoded.
        latents: of those frames, once they are known: (1, 16, Tp, h, w) scaled, or None.
        captions: per generated chunk, (tokens, channels), once they are known.
        placement: what lies where; None: it is decided when the transformer is loaded.
    """

    request: Request
    run: RunPlan
    prefix: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    captions: list[torch.Tensor] | None = None
    placement: Placement | None = None

    @property
    def config(self) -> MagiConfig:
        """Returns the model's config with the request's settings."""
        return self.run.config

    @property
    def chunks(self) -> int:
        """Returns the number of chunks that will be generated."""
        return self.run.chunks

    @property
    def frames(self) -> int:
        """Returns the number of video frames that will come out."""
        prefix = self.run.prefix_frames
        hidden = 0 if prefix == 1 else prefix  # an image is the video's first frame, a clip lies before it
        runtime = self.config.runtime
        return (self.run.schedule.chunks * runtime.chunk_width - hidden) * runtime.temporal_downsample_factor

    @property
    def seconds(self) -> float:
        """Returns the length in seconds of what will come out."""
        return self.frames / self.config.runtime.fps


def make_plan(
    request: Request,
    config: MagiConfig,
    special: SpecialTokens | None,
    latents: torch.Tensor | None = None,
    on_notice: Callable[[str], None] = warn,
) -> Plan:
    """Checks a request and reads its image or video.

    Args:
        request: what to make.
        config: the model's.
        special: the model's special tokens; None where there are none.
        latents: of the image or video, scaled, (1, 16, Tp, h, w): then it is not read and need not even be there.
        on_notice: called with a sentence if something in the request has no effect.

    Raises:
        MagiError: anything about it that cannot work.
    """
    config = config.with_runtime(num_steps=request.num_steps, window_size=request.window_size, seed=request.seed)
    runtime = config.runtime
    check_steps(runtime.num_steps, runtime.window_size, runtime.noise2clean_kvrange)
    _check_alternatives(request)
    check_mode(request.fit)
    if request.negative_tokens and config.engine.distill:
        on_notice("Negative tokens steer base models; with distilled weights they change next to nothing.")
    _check_special_tokens(request, config, special)
    wanted = _wanted_frames(request, runtime.num_frames, runtime.fps)
    if request.latents is not None:
        latents = request.latents
        asked = config.with_runtime(video_size_h=request.height, video_size_w=request.width)
        with_size_of(
            {"tensor of latents": latents}, asked, explicit=(request.height is not None, request.width is not None)
        )
    elif request.image is None and request.video is None:
        latents = None
    prefix = _read_prefix(request, config) if latents is None else None
    if latents is not None:
        prefix_frames = latents.shape[2]
        own = [SPATIAL_DOWNSAMPLE * n for n in latents.shape[3:]]
        height, width = request.height or own[0], request.width or own[1]
    elif prefix is not None:
        prefix_frames = -(-len(prefix) // runtime.temporal_downsample_factor)
        height, width = (int(n) for n in prefix.shape[1:3])
    else:
        prefix_frames = 0
        height, width = _size(request, config, None)
    # As many latent frames as are asked for at least; an image is one of them.
    made = max(1, -(-wanted // runtime.temporal_downsample_factor) - (prefix_frames == 1))
    num_frames = made * runtime.temporal_downsample_factor
    run = plan_run(config.with_runtime(num_frames=num_frames, video_size_h=height, video_size_w=width), prefix_frames)
    if request.captions is not None:
        return Plan(request, run, prefix, latents, captions_of(request.captions, request, run, special))
    if not 1 <= len(request.texts) <= run.chunks:
        raise MagiError(
            f"There are {len(request.texts)} prompts for {run.chunks} chunks of a second each. "
            "Give one, or up to one per chunk."
        )
    return Plan(request, run, prefix, latents)


def captions_of(
    captions: Sequence[Caption], request: Request, run: RunPlan, special: SpecialTokens | None
) -> list[torch.Tensor]:
    """Returns the caption of each generated chunk, (tokens, channels), with the request's special tokens.

    Raises:
        MagiError: as `caption_per_chunk`.
    """
    return caption_per_chunk(
        captions, run.chunks, run.config.model, special, request.style_tokens, request.duration_tokens
    )


def _check_alternatives(request: Request) -> None:
    starts = [name for name in ("image", "video", "latents") if getattr(request, name) is not None]
    if len(starts) > 1:
        raise MagiError(f"Both {' and '.join(starts)} are given to start from. Give one of them.")
    if request.latents is not None and request.area is not None:
        raise MagiError(
            f"Both latents and an area ({request.area}) are given. Leave out the area: the latents' size counts."
        )
    if request.captions is not None and request.texts:
        raise MagiError("Both a prompt and captions are given. Give one of them.")


def _check_special_tokens(request: Request, config: MagiConfig, special: SpecialTokens | None) -> None:
    """Raises MagiError now for what would be refused after the text encoder has run."""
    text = torch.zeros(1, config.model.caption_channels)
    if request.captions is None:
        caption_per_chunk(Caption(text), 1, config.model, special, request.style_tokens, request.duration_tokens)
    null_caption(text, special, request.negative_tokens)


def _wanted_frames(request: Request, default: int, fps: int) -> int:
    if request.seconds is not None and request.frames is not None:
        raise MagiError(f"Both seconds ({request.seconds}) and frames ({request.frames}) are given. Give one of them.")
    if request.seconds is not None:
        if not 0 < request.seconds <= LONGEST_SECONDS:
            raise MagiError(f"seconds is {request.seconds}; it must be above 0, and at most {LONGEST_SECONDS} (a day).")
        return max(1, round(request.seconds * fps))
    frames = default if request.frames is None else request.frames
    if not 0 < frames <= LONGEST_SECONDS * fps:
        raise MagiError(f"frames is {frames}; it must be above 0, and at most {LONGEST_SECONDS * fps} (a day).")
    return frames


def _read_prefix(request: Request, config: MagiConfig) -> torch.Tensor | None:
    """Returns the request's image or end of its video, uint8 (T, H, W, 3) in the size to make; None without either."""
    if request.image is not None:
        image = request.image if isinstance(request.image, torch.Tensor) else read_image(request.image)
        _check_frames(image, "image")
        return fit(image[:1], *_size(request, config, image.shape[2] / image.shape[1]), request.fit)
    if request.video is None:
        return None
    runtime, tail = config.runtime, request.continue_seconds
    check_clip_seconds(tail)
    if isinstance(request.video, torch.Tensor):
        _check_frames(request.video, "video")
        size = _size(request, config, request.video.shape[2] / request.video.shape[1])
        frames = fit(request.video[-max(1, round(tail * runtime.fps)) :], *size, request.fit)
    else:
        info = probe(request.video)
        height, width = _size(request, config, info.width / info.height)
        frames = read_video(request.video, runtime.fps, tail_seconds=tail, height=height, width=width, mode=request.fit)
    return clip_end(frames)


def _size(request: Request, config: MagiConfig, aspect: float | None) -> tuple[int, int]:
    """Returns the (height, width) to make; `aspect` is width / height of the image or video, None without one."""
    height, width = request.height, request.width
    default = (config.runtime.video_size_h, config.runtime.video_size_w)
    if request.area is not None:
        if height is not None or width is not None:
            raise MagiError(f"Both an area ({request.area}) and a width or height are given. Give one of them.")
        return size_for(request.area, aspect or _WIDE)
    shape = aspect or default[1] / default[0]
    if height is None and width is None:
        return default if aspect is None else size_for(default[0] * default[1], aspect)
    return complete_size(height, width, shape, SPATIAL_DOWNSAMPLE * config.model.patch_size)


def _check_frames(frames: torch.Tensor, what: str) -> None:
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise MagiError(
            f"The {what} is {frames.dtype} {tuple(frames.shape)}; give torch.uint8 (frames, height, width, 3), one frame or more."
        )


def prompt_settings(request: Request, model: ModelConfig) -> dict[str, Any]:
    """Returns the arguments of `encode_prompts` that a request and a model decide."""
    return {"texts": request.texts, "clean": request.clean_prompt, "max_tokens": model.caption_max_length}


def request_settings(plan: Plan) -> dict[str, Any]:
    """Returns what a plan makes and what was asked for, JSON values by name; the model's files are left out."""
    request = plan.request
    return {
        **config_settings(plan.config),
        "prompt": request.texts,
        "captions": None if request.captions is None else tensor_digest(*(c.embeds for c in request.captions)),
        "clean_prompt": request.clean_prompt,
        "style_tokens": list(request.style_tokens),
        "duration_tokens": request.duration_tokens,
        "negative_tokens": request.negative_tokens,
        "image": _media_name(request.image),
        "image_content": _media_digest(request.image),
        "video": _media_name(request.video),
        "video_content": _media_digest(request.video),
        "latents": None if request.latents is None else tensor_digest(request.latents),
        "continue_seconds": request.continue_seconds,
        "size_asked_for": [request.width, request.height, request.area],
        "fit": request.fit,
    }


def _media_name(media: Media | None) -> str | None:
    return None if media is None else "frames" if isinstance(media, torch.Tensor) else Path(media).name


def _media_digest(media: Media | None) -> str | None:
    """Returns the fingerprint of a picture or video; `UNKNOWN` where its file cannot be read."""
    if media is None or isinstance(media, torch.Tensor):
        return None if media is None else tensor_digest(media)
    try:
        return file_fingerprint(user_path(media))
    except OSError:
        return UNKNOWN

"""What to make, and all that follows from it: size, length, given frames and schedule, found before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from warnings import warn

import torch

from ..config import SPATIAL_DOWNSAMPLE, MagiConfig, ModelConfig, RuntimeConfig
from ..errors import MagiError
from ..media.frames import check_mode, complete_size, fit, size_for
from ..media.video_reader import probe, read_image, read_video
from ..planning.placement import Placement
from ..runs.identity import UNKNOWN, config_settings
from ..sampling.captions import Caption, caption_per_chunk, null_caption
from ..sampling.schedule import check_steps, chunks_in
from ..sampling.special_tokens import SpecialTokens
from ..system.whole_files import file_fingerprint, tensor_digest

Media = str | Path | torch.Tensor  # a file, or frames uint8 (T, H, W, 3)

_WIDE = 16 / 9


@dataclass(frozen=True)
class Request:
    """What to make.

    Attributes:
        prompt: for the whole video, or one a chunk (second); the last of a short list holds to the end.
        image: first frame.
        video: clip to go on from; only its end is looked at.
        continue_seconds: how much of that end.
        seconds: length of what is made; rounded up to whole chunks. Or `frames`.
        frames: see `seconds`.
        height: in pixels; None: the model's size, in the shape of the image or video.
        width: likewise.
        area: instead of both, a number of pixels or a name of `frames.AREAS`, in the shape of the input or else 16:9.
        fit: "crop", "pad" or "stretch", for an image or video of another shape.
        seed: any integer.
        num_steps: denoising steps a chunk; None: the model's own.
        window_size: chunks denoised at a time; None: the model's own. Fewer work on less at once but look back on more.
        style_tokens: see `special_tokens.STYLES`.
        duration_tokens: tell each chunk how many are to come.
        negative_tokens: steer away from burnt-in captions, logos, transitions and borders (base models).
        clean_prompt: clean prompts as the model's training captions were.
    """

    prompt: str | Sequence[str]
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


@dataclass(frozen=True)
class Plan:
    """A request that was found possible, with all that follows from it.

    Attributes:
        request: what was asked for.
        config: the model's, with the request's settings.
        prefix: given frames, uint8 (T, H, W, 3), or None.
        latents: of the given frames, where they are known already: (1, 16, Tp, h, w) scaled, or None.
        chunks: chunks that will be generated.
        frames: frames that will come out.
        given: latent frames of the image or video.
        placement: what lies where; None: it is decided when the transformer is loaded.
    """

    request: Request
    config: MagiConfig
    prefix: torch.Tensor | None
    latents: torch.Tensor | None
    chunks: int
    frames: int
    given: int
    placement: Placement | None = None

    @property
    def seconds(self) -> float:
        """Length of what will come out."""
        return self.frames / self.config.runtime.fps


@dataclass(frozen=True)
class Length:
    """How long a video becomes.

    Attributes:
        num_frames: as `make_sampler` takes it: frames to make after the given ones.
        chunks: of the whole, given ones included.
        made: of them, those that are generated.
        frames: video frames that come out.
    """

    num_frames: int
    chunks: int
    made: int
    frames: int


def plan_length(runtime: RuntimeConfig, wanted: int, given: int, shown: bool) -> Length:
    """What becomes of a wish for `wanted` video frames: whole chunks, the given latent frames before them.

    Args:
        runtime: the model's.
        wanted: video frames that shall come out at least.
        given: latent frames of an image or clip.
        shown: they begin the video, as an image does; a clip comes before it.
    """
    per_latent, width = runtime.temporal_downsample_factor, runtime.chunk_width
    latents = max(1, -(-wanted // per_latent) - given * shown)
    chunks = chunks_in(runtime, latents * per_latent, given)
    hidden = 0 if shown else given
    return Length(latents * per_latent, chunks, chunks - given // width, (chunks * width - hidden) * per_latent)


def make_plan(
    request: Request, config: MagiConfig, special: SpecialTokens | None, latents: torch.Tensor | None = None
) -> Plan:
    """Checks a request and reads its image or video.

    Args:
        request: what to make.
        config: the model's.
        special: the model's special tokens; None where there are none.
        latents: of the image or video, scaled, (1, 16, Tp, h, w): then it is not read and need not even be there.

    Raises:
        MagiError: anything about it that cannot work.
    """
    config = config.with_runtime(num_steps=request.num_steps, window_size=request.window_size, seed=request.seed)
    runtime = config.runtime
    check_steps(runtime.num_steps, runtime.window_size, runtime.noise2clean_kvrange)
    if request.image is not None and request.video is not None:
        raise MagiError("Both an image and a video are given. Give one to start from.")
    check_mode(request.fit)
    if request.negative_tokens and config.engine.distill:
        warn("Negative tokens steer base models; with distilled weights they change next to nothing.", stacklevel=3)
    _check_special_tokens(request, config, special)
    wanted = _wanted_frames(request, runtime.num_frames, runtime.fps)
    if request.image is None and request.video is None:
        latents = None
    prefix = _prefix(request, config) if latents is None else None
    if latents is not None:
        given = latents.shape[2]
        made = [SPATIAL_DOWNSAMPLE * n for n in latents.shape[3:]]
        height, width = request.height or made[0], request.width or made[1]
    elif prefix is not None:
        given = -(-len(prefix) // runtime.temporal_downsample_factor)
        height, width = (int(n) for n in prefix.shape[1:3])
    else:
        given = 0
        height, width = _size(request, config, None)
    length = plan_length(runtime, wanted, given, shown=request.image is not None)
    config = config.with_runtime(num_frames=length.num_frames, video_size_h=height, video_size_w=width)
    if not isinstance(request.prompt, str) and not 1 <= len(request.prompt) <= length.made:
        raise MagiError(
            f"There are {len(request.prompt)} prompts for {length.made} chunks of a second each. "
            "Give one, or up to one a chunk."
        )
    return Plan(request, config, prefix, latents, length.made, length.frames, given)


def _check_special_tokens(request: Request, config: MagiConfig, special: SpecialTokens | None) -> None:
    """Refuses now what the sampler would refuse after the text encoder has run and the transformer is loaded."""
    text = torch.zeros(1, config.model.caption_channels)
    caption_per_chunk(Caption(text), 1, config.model, special, request.style_tokens, request.duration_tokens)
    null_caption(text, special, request.negative_tokens)


def _wanted_frames(request: Request, default: int, fps: int) -> int:
    if request.seconds is not None and request.frames is not None:
        raise MagiError(f"Both seconds ({request.seconds}) and frames ({request.frames}) are given. Give one of them.")
    if request.seconds is not None:
        if not 0 < request.seconds < float("inf"):
            raise MagiError(f"seconds is {request.seconds}; it must be above 0.")
        return max(1, round(request.seconds * fps))
    frames = default if request.frames is None else request.frames
    if frames <= 0:
        raise MagiError(f"frames is {frames}; it must be above 0.")
    return frames


def _prefix(request: Request, config: MagiConfig) -> torch.Tensor | None:
    """The given frames in the size of the video."""
    if request.image is not None:
        image = request.image if isinstance(request.image, torch.Tensor) else read_image(request.image)
        _check_frames(image, "image")
        return fit(image[:1], *_size(request, config, image.shape[2] / image.shape[1]), request.fit)
    if request.video is None:
        return None
    runtime, tail = config.runtime, request.continue_seconds
    if not 0 < tail < float("inf"):
        raise MagiError(f"continue_seconds is {tail}; it must be above 0.")
    if isinstance(request.video, torch.Tensor):
        _check_frames(request.video, "video")
        size = _size(request, config, request.video.shape[2] / request.video.shape[1])
        frames = fit(request.video[-max(1, round(tail * runtime.fps)) :], *size, request.fit)
    else:
        info = probe(request.video)
        height, width = _size(request, config, info.width / info.height)
        frames = read_video(request.video, runtime.fps, tail_seconds=tail, height=height, width=width, mode=request.fit)
    # Whole latents that end where the clip ends: frames too many are dropped at the beginning.
    per_latent = runtime.temporal_downsample_factor
    return frames[len(frames) % per_latent :] if len(frames) >= per_latent else frames


def _size(request: Request, config: MagiConfig, aspect: float | None) -> tuple[int, int]:
    """(height, width) to make; `aspect` is width / height of the given frames."""
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
    """What `encode_prompts` makes of a request for a model."""
    texts = [request.prompt] if isinstance(request.prompt, str) else list(request.prompt)
    return {"texts": texts, "clean": request.clean_prompt, "max_tokens": model.caption_max_length}


def request_settings(plan: Plan) -> dict[str, Any]:
    """What a plan makes, and what was asked for; the files that make it are the pipeline's to add."""
    request = plan.request
    return {
        **config_settings(plan.config),
        "prompt": [request.prompt] if isinstance(request.prompt, str) else list(request.prompt),
        "clean_prompt": request.clean_prompt,
        "style_tokens": list(request.style_tokens),
        "duration_tokens": request.duration_tokens,
        "negative_tokens": request.negative_tokens,
        "image": _name(request.image),
        "image_content": _content(request.image),
        "video": _name(request.video),
        "video_content": _content(request.video),
        "continue_seconds": request.continue_seconds,
        "size_asked_for": [request.width, request.height, request.area],
        "fit": request.fit,
    }


def _name(media: Media | None) -> str | None:
    return None if media is None else "frames" if isinstance(media, torch.Tensor) else Path(media).name


def _content(media: Media | None) -> str | None:
    """The fingerprint of a picture or video, `UNKNOWN` where it is away."""
    if media is None or isinstance(media, torch.Tensor):
        return None if media is None else tensor_digest(media)
    try:
        return file_fingerprint(Path(media).expanduser())
    except OSError:
        return UNKNOWN

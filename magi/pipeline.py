"""Prompt, picture or video in, frames out: the parts tied together, each loaded when its turn comes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint
from .config import SPATIAL_DOWNSAMPLE, MagiConfig
from .device import pick_device
from .embedded import embedded_files
from .embedding_cache import EmbeddingCache
from .errors import MagiError
from .frames import check_mode, check_size, fit, from_model, size_for, to_model
from .generate import make_sampler
from .model import Transformer, load_transformer
from .model_files import ModelFiles, load_special_tokens
from .prompt import Caption
from .prompt_encoding import encode_prompts
from .recognise import recognise, resolve_config
from .sampler_state import ProgressEvent
from .schedule import Schedule
from .special_tokens import check_styles
from .vae import VideoVAE, load_vae
from .video_reader import probe, read_image, read_video
from .weights import check_tensors

Media = str | Path | torch.Tensor  # a file, or frames uint8 (T, H, W, 3)


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
        fit: "crop", "pad" or "stretch", for an image or video of another shape.
        seed: any integer.
        num_steps: denoising steps a chunk; None: the model's own.
        window_size: chunks denoised at a time; None: the model's own. 1 takes least memory.
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
        chunks: chunks that will be generated.
        frames: frames that will come out.
    """

    request: Request
    config: MagiConfig
    prefix: torch.Tensor | None
    chunks: int
    frames: int

    @property
    def seconds(self) -> float:
        """Length of what will come out."""
        return self.frames / self.config.runtime.fps


@dataclass(frozen=True)
class Clip:
    """Finished frames: uint8 (T, H, W, 3) RGB on the CPU, and the number of the first one."""

    first_frame: int
    frames: torch.Tensor


@dataclass(frozen=True)
class Stage:
    """How far a part of the work is. `sampled` is there after each forward iteration, for previews."""

    name: str  # "text", "prefix", "load", "sample" or "decode"
    done: float
    total: float
    sampled: ProgressEvent | None = None


StageProgress = Callable[[Stage], None]


class MagiPipeline:
    """A model's files and how to run them. Nothing is loaded before `run`; the transformer and VAE then stay loaded."""

    def __init__(
        self,
        files: ModelFiles,
        config: MagiConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        vae_dtype: torch.dtype = torch.bfloat16,
        text_device: torch.device | str | None = "cpu",
        text_dtype: torch.dtype | None = None,
        cache: EmbeddingCache | None = None,
        offload: bool | None = None,
    ) -> None:
        """`from_files` checks the files first; arguments are described there."""
        self.files = files
        self.config = config
        self.device = pick_device(device)
        self._dtype = dtype
        self._vae_dtype = vae_dtype
        self._text_device = text_device
        self._text_dtype = text_dtype
        self._cache = cache
        self._offload = offload
        self._transformer: Transformer | None = None
        self._vae: VideoVAE | None = None

    @classmethod
    def from_files(
        cls,
        transformer: str | Path,
        vae: str | Path,
        text_encoder: str | Path,
        special_tokens: str | Path | None = None,
        tokenizer: str | Path | None = None,
        *,
        config: MagiConfig | None = None,
        distilled: bool | None = None,
        **options: Any,
    ) -> "MagiPipeline":
        """A pipeline over checked files; only their headers are read.

        Args:
            transformer: file or folder.
            vae: file or folder.
            text_encoder: T5 v1.1 XXL, file or folder.
            special_tokens: special_tokens.npz; without it style, duration and negative tokens must be off.
            tokenizer: where it is not beside the text encoder.
            config: official config; None tells it from the file.
            distilled: the variant, where nothing in the file tells it.
            **options: `device` and `dtype` to compute on and in (None: the best there is; bfloat16), `vae_dtype`,
                `text_device` ("cpu") and `text_dtype` (float32) for T5, `cache` for embeddings, `offload` (None: only
                if the weights do not fit the device).

        Raises:
            MagiError: a file is missing, damaged or something else, or base and distilled are mixed up.
        """
        files = ModelFiles(
            Path(transformer),
            Path(vae),
            Path(text_encoder),
            Path(special_tokens) if special_tokens else None,
            Path(tokenizer) if tokenizer else None,
        )
        with Checkpoint(transformer) as checkpoint:
            config = resolve_config(checkpoint, config, distilled)
            check_tensors(checkpoint, config.model, repr(str(transformer)))
        found = recognise(vae)
        if found.kind != "vae":
            raise MagiError(f"{str(vae)!r} is {found.name}, not a MAGI-1 VAE. Choose another file.")
        load_special_tokens(files)
        return cls(files, config, **options)

    @classmethod
    def embedded(cls, folder: str | Path, **options: Any) -> "MagiPipeline":
        """The small demo model, its files made below `folder` on first use."""
        files = embedded_files(folder)
        options = {"vae_dtype": torch.float32, **options}
        return cls.from_files(files.transformer, files.vae, files.text_encoder, files.special_tokens, **options)

    # -- what will be made -------------------------------------------------------------------------------------------

    def plan(self, request: Request) -> Plan:
        """Checks a request and reads its image or video.

        Raises:
            MagiError: anything about it that cannot work.
        """
        runtime = self.config.runtime
        if request.image is not None and request.video is not None:
            raise MagiError("Both an image and a video are given. Give one to start from.")
        check_mode(request.fit)
        check_styles(request.style_tokens)
        wanted = _wanted_frames(request, runtime.num_frames, runtime.fps)
        height, width = self._size(request)
        prefix = self._prefix(request, height, width)
        per_latent = runtime.temporal_downsample_factor
        given = 0 if prefix is None else -(-len(prefix) // per_latent)
        # An image is the first latent frame of what comes out; a video's frames come before it.
        shown = given if request.image is not None else 0
        latents = max(1, -(-wanted // per_latent) - shown)
        config = self.config.with_runtime(
            num_frames=latents * per_latent,
            video_size_h=height,
            video_size_w=width,
            num_steps=request.num_steps,
            window_size=request.window_size,
            seed=request.seed,
        )
        chunks = -(-(latents + given) // runtime.chunk_width)
        schedule = Schedule.of(config.runtime, chunks, given // runtime.chunk_width)
        if not isinstance(request.prompt, str) and not 1 <= len(request.prompt) <= chunks - schedule.prefix_chunks:
            raise MagiError(
                f"There are {len(request.prompt)} prompts for {chunks - schedule.prefix_chunks} chunks of a second each. "
                "Give one, or up to one a chunk."
            )
        made = chunks * runtime.chunk_width - (given - shown)
        return Plan(request, config, prefix, chunks - schedule.prefix_chunks, made * per_latent)

    def _size(self, request: Request) -> tuple[int, int]:
        height, width = request.height, request.width
        source = request.image if request.image is not None else request.video
        default = (self.config.runtime.video_size_h, self.config.runtime.video_size_w)
        if height is None and width is None:
            if source is None:
                return default
            return size_for(default[0] * default[1], _aspect(source))
        aspect = _aspect(source) if source is not None else default[1] / default[0]
        step = SPATIAL_DOWNSAMPLE * self.config.model.patch_size
        if height is None and width is not None:
            height = max(2, round(width / aspect / step)) * step
        if width is None and height is not None:
            width = max(2, round(height * aspect / step)) * step
        size = (height or 0, width or 0)
        check_size(*size, step)
        return size

    def _prefix(self, request: Request, height: int, width: int) -> torch.Tensor | None:
        if request.image is not None:
            image = request.image if isinstance(request.image, torch.Tensor) else read_image(request.image)
            return fit(image[:1], height, width, request.fit)
        if request.video is None:
            return None
        runtime, tail = self.config.runtime, request.continue_seconds
        if tail <= 0:
            raise MagiError(f"continue_seconds is {tail}; it must be above 0.")
        if isinstance(request.video, torch.Tensor):
            frames = fit(request.video[-max(1, round(tail * runtime.fps)) :], height, width, request.fit)
        else:
            frames = read_video(
                request.video, runtime.fps, tail_seconds=tail, height=height, width=width, mode=request.fit
            )
        # Whole latents that end where the clip ends: frames too many are dropped at the beginning.
        per_latent = runtime.temporal_downsample_factor
        return frames[len(frames) % per_latent :] if len(frames) >= per_latent else frames

    # -- making it ---------------------------------------------------------------------------------------------------

    def generate(self, *, progress: StageProgress | None = None, **request: Any) -> Iterator[Clip]:
        """Plans and runs a request given by keywords: yields frames as soon as they are done."""
        return self.run(self.plan(Request(**request)), progress)

    def run(self, plan: Plan, progress: StageProgress | None = None) -> Iterator[Clip]:
        """Runs a plan. What `progress` raises ends it.

        Raises:
            MagiError: the text encoder's files are not as they should be (found before anything else is loaded).
        """
        request = plan.request
        prompts = [request.prompt] if isinstance(request.prompt, str) else list(request.prompt)
        special = load_special_tokens(self.files)
        model = self.config.model
        embeds = encode_prompts(
            prompts,
            self.files.text_encoder,
            tokenizer=self.files.tokenizer,
            cache=self._cache,
            device=self._text_device,
            dtype=self._text_dtype,
            clean=request.clean_prompt,
            max_tokens=model.caption_max_length,
            channels=model.caption_channels,
            progress=_counted(progress, "text"),
        )
        prefix = None
        if plan.prefix is not None:
            prefix = self.vae.encode(to_model(plan.prefix), progress=_counted(progress, "prefix"))
        transformer = self.load(_counted(progress, "load"))
        done = [0, 1]  # iterations done and in all, for the heartbeat between them

        def sampled(event: ProgressEvent) -> None:
            done[:] = event.iteration, event.total
            if progress:
                progress(Stage("sample", event.iteration, event.total, event))

        def heartbeat(fraction: float) -> None:
            if progress:
                progress(Stage("sample", done[0] + min(fraction, 0.999), done[1]))

        sampler = make_sampler(
            transformer,
            plan.config,
            caption=[Caption(e) for e in embeds],
            special_tokens=special,
            style_tokens=request.style_tokens,
            duration_tokens=request.duration_tokens,
            negative_tokens=request.negative_tokens,
            seed=request.seed,
            prefix=prefix,
            progress=sampled,
            heartbeat=heartbeat,
        )
        done[1] = sampler.total
        first = 0
        latents = (chunk.latents for chunk in sampler)
        for video in self.vae.decode_chunks(latents, progress=_counted(progress, "decode")):
            frames = from_model(video).cpu()
            yield Clip(first, frames)
            first += len(frames)

    def load(self, progress: Callable[[int, int], None] | None = None) -> Transformer:
        """The transformer, loaded on first use."""
        if self._transformer is None:
            self._transformer = load_transformer(
                self.files.transformer, self.config, self.device, self._dtype, self._offload, progress
            )
        return self._transformer

    @property
    def vae(self) -> VideoVAE:
        """The VAE, loaded on first use."""
        if self._vae is None:
            self._vae = load_vae(self.files.vae, self.device, self._vae_dtype)
        return self._vae


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


def _aspect(media: Media) -> float:
    if isinstance(media, torch.Tensor):
        return media.shape[2] / media.shape[1]
    info = probe(media)
    return info.width / info.height


def _counted(progress: StageProgress | None, name: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(Stage(name, done, total))

"""Prompt, picture or video in, frames out: the parts tied together, each loaded when its turn comes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from .config import MagiConfig
from .device import pick_device
from .embedded import embedded_files
from .errors import MagiError
from .generate import make_sampler
from .load import load_transformer
from .media.frames import from_model, to_model
from .model import Transformer
from .model_files import ModelFiles, check_transformer, load_special_tokens
from .prompt import Caption, caption_per_chunk
from .recognise import recognise
from .request import Media, Plan, Request, make_plan
from .sampler_state import ProgressEvent
from .special_tokens import SpecialTokens
from .text.embedding_cache import EmbeddingCache
from .text.prompt_encoding import encode_prompts
from .vae import VideoVAE, load_vae
from .weights import Precision

__all__ = ["Clip", "MagiPipeline", "Media", "Plan", "Request", "Stage", "StageProgress"]


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
        precision: Precision = "auto",
        attention: str = "auto",
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
        self._precision: Precision = precision
        self._attention = attention
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
                if the weights do not fit the device), `precision` ("fp8": half the memory for bf16 weights) and
                `attention` as for `load_transformer`.

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
        how = {name: options[name] for name in ("device", "dtype", "precision", "attention") if name in options}
        config = check_transformer(transformer, config, distilled, **how)
        found = recognise(vae)
        if found.kind != "vae":
            raise MagiError(f"{str(vae)!r} is {found.name}, not a MAGI-1 VAE. Choose another file.")
        load_vae(vae, "meta")  # reads no weights, but finds those that are missing
        pipeline = cls(files, config, **options)
        _ = pipeline._special_tokens  # a wrong file is found here
        return pipeline

    @classmethod
    def embedded(cls, folder: str | Path, **options: Any) -> "MagiPipeline":
        """The small demo model, its files made below `folder` on first use."""
        files = embedded_files(folder)
        options = {"vae_dtype": torch.float32, **options}
        return cls.from_files(**vars(files), **options)

    def plan(self, request: Request) -> Plan:
        """Checks a request and reads its image or video.

        Raises:
            MagiError: anything about it that cannot work.
        """
        return make_plan(request, self.config, self._special_tokens)

    def generate(self, *, progress: StageProgress | None = None, **request: Any) -> Iterator[Clip]:
        """Plans and runs a request given by keywords: yields frames as soon as they are done."""
        return self.run(self.plan(Request(**request)), progress)

    def run(self, plan: Plan, progress: StageProgress | None = None) -> Iterator[Clip]:
        """Runs a plan. What `progress` raises ends it.

        Raises:
            MagiError: the text encoder's files are not as they should be (found before anything else is loaded), or the
                device runs out of memory.
        """
        try:
            yield from self._run(plan, progress)
        except torch.OutOfMemoryError as error:
            raise MagiError(
                f"{self.device} ran out of memory at {plan.config.runtime.video_size_w}x{plan.config.runtime.video_size_h} "
                f"with a window of {plan.config.runtime.window_size}. Try a smaller size, or offloading."
            ) from error

    def _run(self, plan: Plan, progress: StageProgress | None) -> Iterator[Clip]:
        request = plan.request
        prompts = [request.prompt] if isinstance(request.prompt, str) else list(request.prompt)
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
        captions = [Caption(e) for e in embeds]
        caption_per_chunk(
            captions, plan.chunks, model, None, (), False
        )  # another model's encoder: say so before loading
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
            caption=captions,
            special_tokens=self._special_tokens,
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
        # A clip's frames come before what is made. The sampler leaves them out, but keeps a lone latent, as an image's.
        skip = 1 if plan.request.video is not None and prefix is not None and prefix.shape[2] == 1 else 0
        latents = (chunk.latents[:, :, skip if chunk.index == 0 else 0 :] for chunk in sampler)
        for video in self.vae.decode_chunks(latents, progress=_counted(progress, "decode")):
            frames = from_model(video).cpu()
            yield Clip(first, frames)
            first += len(frames)

    @cached_property
    def _special_tokens(self) -> SpecialTokens | None:
        return load_special_tokens(self.files)

    def load(self, progress: Callable[[int, int], None] | None = None) -> Transformer:
        """The transformer, loaded on first use."""
        if self._transformer is None:
            self._transformer = load_transformer(
                self.files.transformer,
                self.config,
                self.device,
                self._dtype,
                self._offload,
                progress,
                precision=self._precision,
                attention=self._attention,
            )
        return self._transformer

    @property
    def vae(self) -> VideoVAE:
        """The VAE, loaded on first use."""
        if self._vae is None:
            self._vae = load_vae(self.files.vae, self.device, self._vae_dtype)
        return self._vae


def _counted(progress: StageProgress | None, name: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(Stage(name, done, total))

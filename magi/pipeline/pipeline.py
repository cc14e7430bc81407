"""Prompt, picture or video in, frames out: plan, encode, sample, decode, each model loaded when its turn comes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from warnings import warn

import torch

from ..config import MagiConfig
from ..errors import MagiError
from ..media.frames import from_model, to_model
from ..model_files.embedded import Model, embedded_files
from ..model_files.identify import recognise
from ..model_files.load import check_transformer
from ..model_files.locate import ModelFiles, load_special_tokens
from ..model_files.repeating import repeating_files
from ..planning.placement import MemoryOptions, Placement
from ..runs.autosave import SAVE_SECONDS, Autosave
from ..runs.store import RunStore
from ..sampling.captions import Caption
from ..sampling.prepare import start_sampler
from ..sampling.special_tokens import SpecialTokens
from ..sampling.state import Chunk, ProgressEvent
from ..system.device import compute_device, is_out_of_memory
from ..text.embedding_cache import EmbeddingCache
from ..text.encode import check_encoder, encode_prompts
from ..transformer.weights import Precision
from ..vae.video_vae import load_vae
from .models import Models
from .phases import OnPhase, Phase, phase_callback
from .request import Media, Plan, Request, captions_of, make_plan, prompt_settings, request_settings
from .resident_models import ResidentModels
from .saved_run import embeds_in, file_settings, pack_inputs, prefix_in

__all__ = ["Clip", "MagiPipeline", "Media", "OnPhase", "Phase", "Plan", "Request"]


@dataclass(frozen=True)
class Clip:
    """Finished frames: uint8 (T, H, W, 3) RGB on the CPU, and the number of the first one."""

    first_frame: int
    frames: torch.Tensor


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
        memory: MemoryOptions | None = None,
        compiled: bool = False,
        models: Models | None = None,
        special_tokens: SpecialTokens | None = None,
    ) -> None:
        """Takes files as they are; `from_files` checks them first, and describes the other arguments.

        Args:
            files: of the model.
            config: that fits them.
            device: see `from_files`, like the following ones.
            dtype: likewise.
            vae_dtype: likewise.
            text_device: likewise.
            text_dtype: likewise.
            cache: likewise.
            offload: likewise.
            precision: likewise.
            attention: likewise.
            memory: likewise.
            compiled: likewise.
            models: keeps the transformer and VAE in memory, in place of what this would make of the files.
            special_tokens: in place of the file's.
        """
        self.files = files
        self.config = config
        self.device = compute_device(device)
        self._dtype = dtype
        self._vae_dtype = vae_dtype
        self._text_device = compute_device(text_device)
        self._text_dtype = text_dtype
        self._cache = cache
        self._precision: Precision = precision
        self._attention, self._compiled = attention, compiled
        memory = memory or MemoryOptions()
        self._loaded_special_tokens = special_tokens
        self._models: Models = models or ResidentModels(
            files,
            config,
            self.device,
            dtype=dtype,
            vae_dtype=vae_dtype,
            precision=precision,
            attention=attention,
            memory=memory if offload is None else replace(memory, streaming=offload),
            compiled=compiled,
        )

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
        """Returns a pipeline over checked files; only their headers are read.

        Args:
            transformer: file or folder.
            vae: file or folder.
            text_encoder: T5 v1.1 XXL, file or folder; it may be missing where all prompts are in the cache.
            special_tokens: special_tokens.npz; without it style, duration and negative tokens must be off.
            tokenizer: where it is not beside the text encoder.
            config: official config; None: recognised from the file.
            distilled: whether the weights are distilled, where nothing in the file tells.
            **options: `device` and `dtype` to compute on and in (None: the best there is; bfloat16), `vae_dtype`,
                `text_device` ("cpu") and `text_dtype` (float32) for T5, `cache` for embeddings, `offload`
                (None: as many layers as do not fit the device), `precision` ("fp8": half the memory for bf16 weights),
                `attention`, `memory` and `compiled` as for `load_transformer`.

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
        compute = {name: options[name] for name in ("device", "dtype", "precision", "attention") if name in options}
        config = check_transformer(transformer, config, distilled, **compute)
        found = recognise(vae)
        if found.kind != "vae":
            raise MagiError(f"{str(vae)!r} is {found.name}, not a MAGI-1 VAE. Choose another file.")
        load_vae(vae, "meta")  # reads no weights, but finds those that are missing
        pipeline = cls(files, config, **options)
        _ = pipeline._special_tokens  # a wrong file is found here
        return pipeline

    @classmethod
    def embedded(cls, folder: str | Path | None = None, model: Model = "distill", **options: Any) -> "MagiPipeline":
        """Returns a pipeline over an embedded model; `options` are those of `from_files`, with float32 as the default types.

        Args:
            folder: where the files of "repeating" are made on first use; the others are part of the package.
            model: "distill" and "base" know moving shapes at 64x64 pixels; "repeating" repeats what it sees, a photo for example.

        Raises:
            MagiError: files are missing or cannot be made, or the model is unknown.
        """
        files = repeating_files(folder) if model == "repeating" else embedded_files(model)
        if options.get("dtype") is None and options.get("precision") not in ("bf16", "fp32"):
            options["dtype"] = torch.float32
        return cls.from_files(**vars(files), **{"vae_dtype": torch.float32, **options})

    def plan(
        self, request: Request, store: RunStore | None = None, on_notice: Callable[[str], None] | None = None
    ) -> Plan:
        """Checks a request, reads its image or video and plans what lies where; no weights are loaded.

        Args:
            request: what to make.
            store: holds a run to resume, if any; the image or video then comes from there.
            on_notice: called with a sentence if the plan is not what was asked for; None issues a warning.

        Raises:
            MagiError: something about the request cannot work, or it does not fit the memory.
        """
        notify = on_notice or partial(warn, stacklevel=2)
        saved = store.inputs() if store else None
        if saved is None and request.captions is None:
            check_encoder(**self._text_arguments(request))
        plan = make_plan(request, self.config, self._special_tokens, prefix_in(saved or {}), notify)
        placement, wanted = self._placement(plan), plan.config.runtime.window_size
        if placement.window != wanted:
            notify(
                f"There is too little memory for a window of {wanted} chunks at this size: {placement.window} are denoised at "
                "a time, which changes the video."
            )
        return replace(plan, run=plan.run.with_window(placement.window), placement=placement)

    def _placement(self, plan: Plan) -> Placement:
        return self._models.place(
            plan.config, plan.run.prefix_frames, allow_smaller_window=plan.request.window_size is None
        )

    def _text_arguments(self, request: Request) -> dict[str, Any]:
        """Returns what decides the prompts' embeddings, for `encode_prompts` and `check_encoder`."""
        files = {
            "encoder": self.files.required("text_encoder"),
            "tokenizer": self.files.tokenizer,
            "cache": self._cache,
        }
        return {**prompt_settings(request, self.config.model), **files, "dtype": self._text_dtype}

    def settings(self, plan: Plan) -> dict[str, Any]:
        """Returns all that shapes a plan's video, JSON values by name, for `RunStore.open`; loads no weights."""
        return {
            **request_settings(plan),
            **file_settings(self.files, self._special_tokens, self._text_dtype, self._cache),
            "dtype": str(self._dtype or "auto"),
            "precision": self._precision,
            "attention": self._attention,
            "compiled": self._compiled or None,
            "vae_dtype": str(self._vae_dtype),
        }

    def generate(
        self,
        *,
        progress: OnPhase | None = None,
        state: str | Path | None = None,
        resume: bool = False,
        **request: Any,
    ) -> Iterator[Clip]:
        """Plans a request given by keywords, and returns an iterator over its frames, each as soon as it is decoded.

        Args:
            progress: called with how far the work is; what it raises ends the run.
            state: folder in which the run is kept until it is finished, so that it can be resumed.
            resume: resume the run that is kept there, if there is one: all its frames are yielded, those of finished
                chunks decoded from the saved latents.
            **request: the fields of `Request`.

        Raises:
            MagiError: something about the request cannot work; or a run is kept in `state` that is not to be resumed,
                has other settings or is damaged.
        """
        store = None if state is None else RunStore(state)
        if store is not None and store.exists and not resume:
            raise MagiError(
                f"There is an unfinished run in {str(store.folder)!r}. Resume it (resume=True), or remove the folder."
            )
        plan = self.plan(Request(**request), store)
        if store is None:
            return self.run(plan, progress)
        store.open(self.settings(plan))
        return self._run_and_discard(plan, progress, store)

    def _run_and_discard(self, plan: Plan, progress: OnPhase | None, store: RunStore) -> Iterator[Clip]:
        try:
            yield from self.run(plan, progress, store)
            store.discard()
        finally:
            store.close()

    def run(
        self,
        plan: Plan,
        progress: OnPhase | None = None,
        store: RunStore | None = None,
        save_seconds: float = SAVE_SECONDS,
    ) -> Iterator[Clip]:
        """Yields the frames of a plan, encoded, sampled and decoded, as soon as they are there.

        Args:
            plan: made by `plan`.
            progress: called with how far the work is; what it raises ends the run.
            store: opened with the plan's `settings`; the run is kept there, and resumed if `open` found one.
            save_seconds: the longest time between two states that are saved.

        Raises:
            MagiError: the text encoder's files are missing or damaged (found before anything else is loaded), or the
                device runs out of memory.
        """
        try:
            yield from self._run(plan, progress, store, save_seconds)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise MagiError(
                f"{self.device} ran out of memory at {plan.config.runtime.video_size_w}x{plan.config.runtime.video_size_h} "
                f"with a window of {plan.config.runtime.window_size}. Try a smaller size, or offloading."
            ) from error

    def _run(self, plan: Plan, progress: OnPhase | None, store: RunStore | None, save_seconds: float) -> Iterator[Clip]:
        saved = store.saved if store is not None else None
        if store is not None and saved is not None and saved.finished == plan.chunks:
            chunks = store.chunks()  # all are finished: only decoding is left
        else:
            plan = self.encode(plan, progress, store)
            chunks = self.sample(plan, progress, store, save_seconds)
        latents = (chunk.latents for chunk in chunks)
        first = 0
        for video in self._models.vae.decode_chunks(latents, progress=phase_callback(progress, "decode")):
            frames = from_model(video).cpu()
            yield Clip(first, frames)
            first += len(frames)

    def encode(self, plan: Plan, progress: OnPhase | None = None, store: RunStore | None = None) -> Plan:
        """Returns the plan with captions and prefix latents: encoded now, or read from the run that `store` has saved.

        Raises:
            MagiError: the text encoder's files are missing, damaged or another model's.
        """
        request = plan.request
        saved = store.inputs() if store is not None and store.saved is not None else None
        if saved is not None:
            embeds = embeds_in(saved)
        elif request.captions is not None:
            embeds = [caption.embeds for caption in request.captions]
        else:
            embeds = encode_prompts(
                **self._text_arguments(request), device=self._text_device, progress=phase_callback(progress, "text")
            )
        captions = plan.captions or captions_of([Caption(e) for e in embeds], request, plan.run, self._special_tokens)
        prefix = plan.latents
        if plan.prefix is not None:
            prefix = self._models.vae.encode(to_model(plan.prefix), progress=phase_callback(progress, "prefix"))
        if store is not None:
            store.keep_inputs(pack_inputs(embeds, prefix))
        return replace(plan, captions=captions, latents=prefix, prefix=None)

    def sample(
        self,
        plan: Plan,
        progress: OnPhase | None = None,
        store: RunStore | None = None,
        save_seconds: float = SAVE_SECONDS,
        on_notice: Callable[[str], None] | None = None,
    ) -> Iterator[Chunk]:
        """Yields the chunks of a plan as soon as they are clean; those that the store has are read: if all, nothing is loaded.

        Args:
            plan: made by `encode`, or by `plan`: what of it is not encoded yet is first.
            progress: called with how far the work is; what it raises ends the run.
            store: opened with the plan's `settings`; the run is kept there, and resumed if `open` found one.
            save_seconds: the longest time between two states that are saved.
            on_notice: called with a sentence if memory runs out and the run takes less; None issues a warning.
        """
        if store is not None and store.saved and store.saved.finished >= plan.chunks:
            yield from store.chunks()
            return
        if plan.captions is None or plan.prefix is not None:
            plan = self.encode(plan, progress, store)
        assert plan.captions is not None  # noqa: S101 (encoded)
        placement = plan.placement or self._placement(plan)
        transformer = self._models.transformer(placement, phase_callback(progress, "load"))
        autosave = None if store is None else Autosave(store, transformer, save_seconds)
        done = [0, 1]  # iterations done, and in all

        def on_iteration(event: ProgressEvent) -> None:
            done[:] = event.iteration, event.total
            on_phase(Phase("sample", event.iteration, event.total, event))

        def on_progress(fraction: float) -> None:
            on_phase(Phase("sample", done[0] + min(fraction, 0.999), done[1]))

        def on_phase(phase: Phase) -> None:
            if autosave:
                autosave.save_if_due()
            if progress:
                progress(phase)

        sampler = start_sampler(
            transformer,
            plan.run,
            plan.captions,
            special_tokens=self._special_tokens,
            negative_tokens=plan.request.negative_tokens,
            seed=plan.request.seed,
            prefix=plan.latents,
            state=autosave.state if autosave else None,
            on_iteration=on_iteration,
            on_progress=on_progress,
            on_shortage=on_notice,
        )
        done[:] = sampler.state.iteration, sampler.total
        window = sampler.window
        try:
            yield from self._models.share_device(autosave.chunks(sampler) if autosave else iter(sampler))
        finally:
            if sampler.window < window:
                self._models.left_with(sampler.window)

    @cached_property
    def _special_tokens(self) -> SpecialTokens | None:
        return self._loaded_special_tokens or load_special_tokens(self.files)

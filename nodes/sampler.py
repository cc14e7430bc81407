"""The sampler: text, and what to start from, to latents."""

import logging
import time
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from comfy_api.latest import io

from ..magi.config import SPATIAL_DOWNSAMPLE, RuntimeConfig
from ..magi.errors import MagiError
from ..magi.media.frames import from_model
from ..magi.pipeline.progress import Stage
from ..magi.pipeline.request import Plan, Request
from ..magi.runs.store import Saved
from ..magi.sampling.captions import need_special_tokens
from ..magi.sampling.schedule import check_steps
from ..magi.sampling.special_tokens import SpecialTokens
from ..magi.sampling.state import ProgressEvent
from ..magi.vae.preview import RoughDecoder
from .comfyui import host, media, menus, runs, schema
from .comfyui.models import Model
from .comfyui.pipeline import ManagedModels, managed_pipeline
from .comfyui.progress import Clock, NodeProgress
from .text import captions_of

_PREVIEW_SECONDS = 1.0  # between two rough previews
_FROM_MODEL = "0: the model's own"


class Magi1Sampler(io.ComfyNode):
    """Makes the video, in latents."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return schema.schema(
            node_id="Magi1Sampler",
            display_name="MAGI-1 Sampler",
            aliases=["ksampler", "magi", "generate video"],
            description="Makes the video chunk by chunk, a second each. Shows how long it will be, and how long it still takes.",
            inputs=[
                schema.Model.Input("model", tooltip="From the MAGI-1 Model Loader."),
                io.Conditioning.Input("text", tooltip="From MAGI-1 Text Encode."),
                io.Float.Input(
                    "seconds",
                    default=4.0,
                    min=0.5,
                    max=600.0,
                    step=0.5,
                    tooltip="Length. It is rounded up to whole chunks of 24 frames (1 s); what comes out is shown under the node.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Another number, another video. The first seconds do not depend on the length.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=256,
                    step=4,
                    tooltip=f"Denoising steps a chunk, a multiple of 4. {_FROM_MODEL}. Base models take 32 to 64, distilled ones 8, 12, 16, 32 or 64.",
                ),
                io.Int.Input(
                    "window",
                    default=0,
                    min=0,
                    max=16,
                    tooltip=f"Chunks denoised at a time. {_FROM_MODEL} (4), best as a rule: fewer must look back on more, and save no memory.",
                ),
                io.Float.Input(
                    "guidance",
                    default=0.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip=f"How closely the prompt is followed, for base models only. {_FROM_MODEL} (7.5).",
                ),
                schema.advanced(
                    io.Float.Input(
                        "previous_guidance",
                        default=0.0,
                        min=0.0,
                        max=10.0,
                        step=0.1,
                        tooltip=f"How closely a chunk follows the ones before it, for base models only. {_FROM_MODEL} (1.5).",
                    )
                ),
                schema.advanced(
                    io.Boolean.Input(
                        "negative_tokens",
                        default=False,
                        tooltip="Steers away from burnt-in captions, logos, transitions and borders; for base models.",
                    )
                ),
                io.Latent.Input(
                    "start",
                    optional=True,
                    tooltip="A size, picture or clip from the other MAGI-1 nodes; or latents to go on from. Nothing: text to video in the model's own size.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="Only for previews in true colours."),
                schema.advanced(
                    io.Boolean.Input(
                        "resume",
                        default=True,
                        optional=True,
                        tooltip="Keeps the run on disk until it is finished: the very same one, queued after a cancel or a crash, goes on where it stopped.",
                    )
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="samples"),
                io.Int.Output(display_name="frames", tooltip="Frames that the decoder will give, 24 per second."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, steps: int | None = None, window: int | None = None) -> bool | str:
        """Refuses steps that cannot be split over the window before anything runs; what is the model's own is not known here."""
        if not steps:
            return True
        released = RuntimeConfig()
        try:
            check_steps(steps, window or released.window_size, released.noise2clean_kvrange)
        except MagiError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        model: Model,
        text: list[Any],
        seconds: float,
        seed: int,
        steps: int,
        window: int,
        guidance: float,
        previous_guidance: float = 0.0,
        negative_tokens: bool = False,
        start: dict[str, Any] | None = None,
        vae: Any = None,
        resume: bool = True,
    ) -> io.NodeOutput:
        """Checks everything, loads the transformer and runs."""
        captions, styles, durations = captions_of(text)
        if model.special_tokens is None and need_special_tokens(captions, styles, durations, negative_tokens):
            # They may have been put there since the loader ran; if not, this says where they belong.
            tokens = SpecialTokens.load(menus.find_special_tokens(model.transformer.path))
            model = replace(model, special_tokens=tokens)
        models, notices = ManagedModels(model, vae), list[str]()
        config = model.config.with_guidance(guidance or None, previous_guidance or None)
        pipeline = managed_pipeline(model, config, models)
        request = Request(
            captions=captions,
            **_start(start),
            seconds=seconds,
            seed=seed,
            num_steps=steps or None,
            window_size=window or None,
            style_tokens=styles,
            duration_tokens=durations,
            negative_tokens=negative_tokens,
        )
        plan = pipeline.plan(request, on_notice=notices.append)
        assert plan.placement is not None  # noqa: S101 (a pipeline's plan has one)
        logging.info(f"MAGI-1 {model.name}: {plan.placement.describe()}.")
        view = _View(cls.hidden.unique_id, plan, models)
        for notice in notices:
            view.note(notice)
        store = runs.open_run(pipeline.settings(plan), view.note) if resume else None
        finished = []
        with host.device_work(
            f"at {view.size} with a window of {plan.config.runtime.window_size}",
            "Try a smaller size, or another model.",
        ):
            if store and store.saved:
                view.resumed(store.saved)
            for chunk in pipeline.sample(plan, view, store, on_notice=view.note):
                finished.append(chunk.latents.to("cpu", torch.float32))
                if chunk.index >= view.taken_over:
                    view.finished(chunk.index, finished[-1])
        if store:
            store.discard()
        view.done()
        return io.NodeOutput({"samples": torch.cat(finished, dim=2)}, plan.frames)


def _start(start: dict[str, Any] | None) -> dict[str, Any]:
    """Returns what a request takes from the LATENT to start from: its size, and its latents unless they are empty."""
    if start is None:
        return {}
    samples = media.check_latent(start)
    height, width = (SPATIAL_DOWNSAMPLE * side for side in samples.shape[3:])
    return {"height": height, "width": width, "latents": samples if samples.any() else None}


class _View:
    """What a user sees of a run."""

    def __init__(self, node_id: str | None, plan: Plan, models: ManagedModels) -> None:
        runtime = plan.config.runtime
        self.size = f"{runtime.video_size_w}x{runtime.video_size_h}"
        self.taken_over = 0  # chunks that were made before this run
        self._models = models
        self._chunks = plan.chunks
        self._length = f"{plan.seconds:g} s = {plan.frames} frames"
        self._progress = NodeProgress(node_id, load=0.04, sample=0.96)
        self._clock, self._previewed = Clock(), 0.0
        self._schedule = plan.run.schedule
        self._part = 0.0  # of the sampling
        self._where = self._note = ""
        self._progress.say(f"{self._length}, {self.size}, {runtime.num_steps} steps per chunk", at_once=True)

    def __call__(self, stage: Stage) -> None:
        """Shows a stage of the pipeline's work."""
        if stage.name == "load":
            self._progress.at("load", 0.99 * stage.done / stage.total)
            self._progress.say(f"{self._length}: loading the model, {stage.done / stage.total:.0%}")
            return
        self._part = stage.done / stage.total
        self._show(None if stage.sampled is None else self._expected(stage.sampled))

    @cached_property
    def _rough(self) -> RoughDecoder:
        return RoughDecoder(self._models.preview_vae)

    def note(self, text: str) -> None:
        """What a user should know of the run's state on disk: in the log, and below every line from now on."""
        logging.warning(f"MAGI-1: {text}")
        self._note = f"\n{text}"

    def resumed(self, saved: Saved) -> None:
        """Shows that a run which was begun before is resumed."""
        total = len(saved.state.schedule(self._schedule))
        self.taken_over, self._part = saved.finished, saved.state.iteration / total
        self._where = f"continuing at chunk {min(saved.finished + 1, self._chunks)} of {self._chunks}"
        logging.info(f"MAGI-1: {self._where}, after {saved.state.iteration} of {total} steps.")
        self._progress.say(f"{self._length}: {self._where}", at_once=True)

    def finished(self, index: int, latents: torch.Tensor) -> None:
        """Shows the last frame of a clean chunk as it is."""
        picture, decoder = self._rough(latents), self._models.preview_vae
        if decoder is not None:
            video = decoder.decode(latents[:, :, -1:], progress=lambda *_: host.check_interrupt())
            picture = from_model(video[:, :, -1:])[0].cpu()
        self._where = f"chunk {index + 1} of {self._chunks} is done"
        self._show(picture)

    def done(self) -> None:
        """Shows the last line."""
        self._progress.at("sample", 1)
        self._progress.say(f"{self._length}, {self.size}{self._note}", at_once=True)

    def _expected(self, event: ProgressEvent) -> torch.Tensor | None:
        """Returns a preview of the oldest chunk that is being denoised, as it is expected to become, once in a while."""
        self._where = f"chunk {max(0, event.first_chunk) + 1} of {self._chunks}"
        if time.monotonic() - self._previewed < _PREVIEW_SECONDS:
            return None
        self._previewed = time.monotonic()
        width = event.latents.shape[2] // len(event.timesteps)
        left = 1 - event.timesteps[0]
        return self._rough(event.latents[:, :, :width] + left * event.velocity[:, :, :width])

    def _show(self, picture: torch.Tensor | None = None) -> None:
        part = self._part
        self._progress.at("sample", part, picture)
        self._progress.say(
            f"{self._length}: {self._where or 'starting'}, {part:.0%}{self._clock.left(part)}{self._note}"
        )

"""The sampler: from text, and what the video starts from, to latents."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io

from ..magi import __version__
from ..magi.config import SPATIAL_DOWNSAMPLE, RuntimeConfig
from ..magi.errors import MagiError
from ..magi.pipeline.request import Request
from ..magi.sampling.captions import need_special_tokens
from ..magi.sampling.schedule import check_steps
from ..magi.sampling.special_tokens import SpecialTokens
from .comfyui import host, media, menus, runs, schema
from .comfyui.families import (
    check_fit,
    embedded_size,
    family_of_latent,
    latent_of,
    size_error,
    size_notice,
)
from .comfyui.graph import feeds, graph_of
from .comfyui.models import Model
from .comfyui.pipeline import ManagedModels, managed_pipeline
from .comfyui.sampler_view import SamplerView
from .comfyui.termination import saved_on_termination
from .comfyui.vae import magi_vae
from .text import captions_of, family_of

_FROM_MODEL = "0: the model's own"
_DECODERS = {"Magi1VAEDecode", "VAEDecode", "VAEDecodeTiled"}
_TOO_LONG = (
    "Ask for fewer seconds or a smaller size; or take the decoder off, save the latents (Save Latent), and decode them where there is "
    "more memory."
)


class Magi1Sampler(io.ComfyNode):
    """Makes the video, in latents."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns the node's inputs and outputs."""
        return schema.schema(
            node_id="Magi1Sampler",
            display_name="MAGI-1 Sampler",
            aliases=["ksampler", "magi", "magi1", "generate video", "text to video", "t2v"],
            essentials="Video Generation",
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
                    tooltip=f"Denoising steps per chunk, a multiple of 4. {_FROM_MODEL}. Base models take 32 to 64, distilled ones 8, 12, 16, 32 or 64.",
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
                    tooltip="A size, picture or clip from the other MAGI-1 nodes; or latents to continue. Nothing: text to video in the model's own size.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="Only for previews in true colours."),
                schema.advanced(
                    io.Boolean.Input(
                        "resume",
                        default=True,
                        optional=True,
                        tooltip="Keeps the run on disk: the very same one, queued after a cancel or a crash, resumes where it stopped; if it was finished, it is read.",
                    )
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="samples"),
                io.Int.Output(display_name="frames", tooltip="Frames that the decoder will give, 24 per second."),
                io.String.Output(
                    display_name="info", tooltip="What was made, and what is to be said of it, for Preview as Text."
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def validate_inputs(cls, steps: int | None = None, window: int | None = None) -> bool | str:
        """Returns True, or why the steps cannot be split over the window; a model's own numbers are not known here."""
        if not steps:
            return True
        released = RuntimeConfig()
        try:
            check_steps(steps, window or released.window_size, released.noise2clean_kvrange)
        except MagiError as error:
            return str(error)
        return True

    @classmethod
    @schema.checked
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
        """Checks everything, loads the transformer and returns latents (1, 16, T, h, w), the frames and what was made."""
        check_fit(model.family, "model", family_of(text), "text encoder")
        check_fit(model.family, "model", None if vae is None else magi_vae(vae).family, "VAE")
        check_fit(model.family, "model", family_of_latent(start), "VAE or model that made the start")
        captions, styles, durations = captions_of(text)
        if model.special_tokens is None and need_special_tokens(captions, styles, durations, negative_tokens):
            # The file may have been added since the loader ran; if not, this says where it belongs.
            tokens = SpecialTokens.load(menus.find_special_tokens(model.transformer.path))
            model = replace(model, special_tokens=tokens)
        models, notices = ManagedModels(model, vae), list[str]()
        config = model.config.with_guidance(guidance or None, previous_guidance or None)
        pipeline = managed_pipeline(model, config, models)
        request = Request(
            captions=captions,
            **_start(start, model, notices.append),
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
        if feeds(graph_of(cls.hidden.dynprompt), cls.hidden.unique_id, _DECODERS):  # not after hours of sampling
            runtime = plan.config.runtime
            media.check_room(plan.frames, runtime.video_size_h, runtime.video_size_w, _TOO_LONG)
        view = SamplerView(cls.hidden.unique_id, plan, models)
        for notice in notices:
            view.show_notice(notice)
        store = runs.open_run(pipeline.settings(plan), view.show_notice) if resume else None
        finished: list[torch.Tensor] = []
        work = host.device_work(
            f"at {view.size} with a window of {plan.config.runtime.window_size}",
            "Try a smaller size, or another model.",
        )
        try:
            with saved_on_termination(), work:
                if store and store.saved:
                    view.show_resumed(store.saved)
                for chunk in pipeline.sample(plan, view.show_phase, store, on_notice=view.show_notice):
                    finished.append(chunk.latents.to("cpu", torch.float32))
                    if chunk.index >= view.resumed_chunks:
                        view.show_chunk(chunk.index, finished[-1])
            if store:
                store.finish(__version__)
        except host.Interrupted:
            if store is None or store.exists:
                view.show_stopped(kept=store is not None)
            raise
        finally:
            models.unpin()
            if store:
                store.close()
        info = view.show_done()
        samples = latent_of(torch.cat(finished, dim=2), model.family)
        return io.NodeOutput(samples, plan.frames, info, ui={"text": [info]})


def _start(start: dict[str, Any] | None, model: Model, on_notice: Callable[[str], None]) -> dict[str, Any]:
    """Returns what a request takes from the LATENT to start from: its size, and its latents unless they are empty.

    A model of one size makes that, whatever the size of empty latents; `on_notice` is then called with a line that says so.
    """
    if start is None:
        return {}
    samples = media.check_latent(start)
    empty = not samples.any()
    asked = tuple(SPATIAL_DOWNSAMPLE * side for side in samples.shape[3:])
    height, width = embedded_size(model.family) or asked
    if (height, width) != asked:
        if not empty:
            raise size_error(*asked)
        on_notice(size_notice(*asked))
    return {"height": height, "width": width, "latents": None if empty else samples}

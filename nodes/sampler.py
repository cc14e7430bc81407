"""The sampler: text, and what to start from, to latents."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io

from ..magi.config import MagiConfig, RuntimeConfig
from ..magi.errors import MagiError
from ..magi.media.frames import from_model
from ..magi.pipeline.request import Length, plan_length
from ..magi.runs.autosave import Keeper
from ..magi.runs.store import RunStore, Saved
from ..magi.sampling.captions import need_special_tokens
from ..magi.sampling.prepare import Run, make_sampler, prepare
from ..magi.sampling.schedule import check_steps
from ..magi.sampling.special_tokens import SpecialTokens
from ..magi.sampling.state import Chunk, ProgressEvent
from ..magi.vae.preview import RoughDecoder
from ..magi.vae.tiling import Tiling
from ..magi.vae.video_vae import VideoVAE
from .comfyui import host, media, memory, menus, runs, schema
from .comfyui.models import Model
from .comfyui.progress import Clock, NodeProgress
from .comfyui.vae import magi_vae, working_memory
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
        config = model.config.with_guidance(guidance or None, previous_guidance or None)
        config = config.with_runtime(num_steps=steps or None, window_size=window or None)
        check_steps(config.runtime.num_steps, config.runtime.window_size, config.runtime.noise2clean_kvrange)
        prefix, config = _start(start, config)
        given = 0 if prefix is None else prefix.shape[2]
        length = plan_length(config.runtime, round(seconds * config.runtime.fps), given, shown=given == 1)
        captions, styles, durations = captions_of(text)
        if model.special_tokens is None and need_special_tokens(captions, styles, durations, negative_tokens):
            # They may have been put there since the loader ran; if not, this says where they belong.
            tokens = SpecialTokens.load(menus.find_special_tokens(model.transformer.path))
            model = replace(model, special_tokens=tokens)
        settings: dict[str, Any] = {
            "caption": captions,
            "special_tokens": model.special_tokens,
            "style_tokens": styles,
            "duration_tokens": durations,
            "negative_tokens": negative_tokens,
            "prefix": prefix,
            "num_frames": length.num_frames,
        }
        run = prepare(config, **settings)
        placement = model.transformer.plan(run.config, given, may_narrow=not window)
        logging.info(f"MAGI-1 {model.name}: {placement.describe()}.")
        narrow = placement.window != config.runtime.window_size
        if narrow:
            config = config.with_runtime(window_size=placement.window)
            run = prepare(config, **settings)
        view = _View(cls.hidden.unique_id, run, length)
        if narrow:
            view.note(f"There is only memory for a window of {placement.window}: the video differs from one with more.")
        store = runs.open_run(model, run, seed, prefix, negative_tokens, view.note) if resume else None
        finished = []
        with host.device_work(
            f"at {view.size} with a window of {config.runtime.window_size}",
            "Try a smaller size, or another model.",
        ):
            if store and store.saved:
                view.resumed(store.saved)
            loaded, decoder = _load(model, vae, placement.spare_bytes, view)
            view.use(decoder)
            for chunk in _chunks(loaded, config, store, view, model.transformer.left_with, seed=seed, **settings):
                finished.append(chunk.latents.to("cpu", torch.float32))
                if chunk.index >= view.taken_over:
                    view.finished(chunk.index, finished[-1])
        if store:
            store.discard()
        view.done()
        return io.NodeOutput({"samples": torch.cat(finished, dim=2)}, length.frames)


def _chunks(
    loaded: Any,
    config: MagiConfig,
    store: RunStore | None,
    view: "_View",
    left_with: Callable[[int], None],
    **settings: Any,
) -> Iterator[Chunk]:
    """The chunks, first those that the store has; in the end `left_with` is told the window, if it had to become smaller.

    The sampler goes with this, and with it its keys on the device.
    """
    keeper = None if store is None else Keeper(store, loaded)

    def sampled(event: ProgressEvent) -> None:
        if keeper:
            keeper.alive()
        view.sampled(event)

    def heartbeat(fraction: float) -> None:
        if keeper:
            keeper.alive()
        view.heartbeat(fraction)

    state = keeper.state if keeper else None
    sampler = make_sampler(
        loaded, config, state=state, progress=sampled, heartbeat=heartbeat, report=view.note, **settings
    )
    window = sampler.window
    try:
        yield from keeper.chunks(sampler) if keeper else sampler
    finally:
        if sampler.window < window:
            left_with(sampler.window)


def _start(start: dict[str, Any] | None, config: MagiConfig) -> tuple[torch.Tensor | None, MagiConfig]:
    """Given latents, if any, and the config with the size of the video."""
    if start is None:
        return None, config
    samples = media.check_latent(start)
    config = config.with_runtime(video_size_h=8 * samples.shape[3], video_size_w=8 * samples.shape[4])
    return (samples if samples.any() else None), config


def _load(model: Model, vae: Any, working: int, view: "_View") -> tuple[Any, VideoVAE | None]:
    """The transformer, and the VAE for previews where both fit without a change of what goes where."""
    if vae is not None:
        patcher = magi_vae(vae).patcher
        usable, both = host.usable_memory(), working + working_memory(Tiling(frames=4))  # of one latent frame
        if usable is None or model.patcher.model_size() + patcher.model_size() + both <= usable:
            return tuple(memory.load(model.patcher, patcher, working=both, progress=view.loading))
    return memory.load(model.patcher, working=working, progress=view.loading)[0], None


class _View:
    """What a user sees of a run."""

    def __init__(self, node_id: str | None, run: Run, length: Length) -> None:
        runtime = run.config.runtime
        self.size = f"{runtime.video_size_w}x{runtime.video_size_h}"
        self._chunks = length.made
        self._length = f"{length.frames / runtime.fps:g} s = {length.frames} frames"
        self._progress = NodeProgress(node_id, load=0.04, sample=0.96)
        self._clock, self._previewed = Clock(), 0.0
        self._schedule = run.schedule
        self._iteration, self._total = 0, len(run.schedule)
        self._where = self._note = ""
        self.taken_over = 0  # chunks that were made before this run
        self._decoder: VideoVAE | None = None
        self._rough: Any = None
        self._progress.say(f"{self._length}, {self.size}, {runtime.num_steps} steps a chunk", at_once=True)

    def use(self, decoder: VideoVAE | None) -> None:
        """Makes ready for previews."""
        self._decoder, self._rough = decoder, RoughDecoder(decoder)
        self._progress.at("load", 1)

    def note(self, text: str) -> None:
        """What a user should know of the run's state on disk: in the log, and below every line from now on."""
        logging.warning(f"MAGI-1: {text}")
        self._note = f"\n{text}"

    def resumed(self, saved: Saved) -> None:
        """A run that was begun before goes on."""
        self.taken_over, self._iteration = saved.finished, saved.state.iteration
        self._total = len(saved.state.schedule(self._schedule))
        self._where = f"continuing at chunk {min(saved.finished + 1, self._chunks)} of {self._chunks}"
        logging.info(f"MAGI-1: {self._where}, after {saved.state.iteration} of {self._total} steps.")
        self._progress.say(f"{self._length}: {self._where}", at_once=True)

    def loading(self, done: int, total: int) -> None:
        """Parts of the weights have been placed."""
        self._progress.at("load", 0.99 * done / total)
        self._progress.say(f"{self._length}: loading the model, {done / total:.0%}")

    def sampled(self, event: ProgressEvent) -> None:
        """A step has been made: shows the oldest chunk that is being denoised, as it is expected to become."""
        self._iteration, self._total = event.iteration, event.total
        self._where = f"chunk {max(0, event.first_chunk) + 1} of {self._chunks}"
        picture = None
        if time.monotonic() - self._previewed >= _PREVIEW_SECONDS:
            self._previewed = time.monotonic()
            t = event.timesteps[0]
            width = event.latents.shape[2] // len(event.timesteps)
            expected = event.latents[:, :, :width] + (1 - t) * event.velocity[:, :, :width]
            picture = self._rough(expected)
        self._show(self._iteration / self._total, picture)

    def heartbeat(self, fraction: float) -> None:
        """Part of a step has been made."""
        self._show((self._iteration + min(fraction, 0.999)) / self._total)

    def finished(self, index: int, latents: torch.Tensor) -> None:
        """A chunk is clean: shows its last frame as it is."""
        picture = self._rough(latents)
        if self._decoder is not None:
            video = self._decoder.decode(latents[:, :, -1:], progress=lambda *_: host.check_interrupt())
            picture = from_model(video[:, :, -1:])[0].cpu()
        self._where = f"chunk {index + 1} of {self._chunks} is done"
        self._show(self._iteration / self._total, picture)

    def done(self) -> None:
        """The last line."""
        self._progress.at("sample", 1)
        self._progress.say(f"{self._length}, {self.size}{self._note}", at_once=True)

    def _show(self, part: float, picture: torch.Tensor | None = None) -> None:
        self._progress.at("sample", part, picture)
        self._progress.say(
            f"{self._length}: {self._where or 'starting'}, {part:.0%}{self._clock.left(part)}{self._note}"
        )

"""What a user sees of the sampler at work: the node's bar, a line of text and previews."""

import logging
import time
from functools import cached_property

import torch

from ...magi.media.frames import from_model
from ...magi.pipeline.phases import Phase
from ...magi.pipeline.request import Plan
from ...magi.runs.store import Saved
from ...magi.sampling.state import ProgressEvent
from ...magi.vae.preview import RoughDecoder
from . import host
from .pipeline import ManagedModels
from .progress import Clock, NodeProgress

_PREVIEW_SECONDS = 1.0  # between two rough previews


class SamplerView:
    """Shows a run of the sampler under its node, and logs what a user should read.

    Attributes:
        size: of the video, as WIDTHxHEIGHT.
        resumed_chunks: number of chunks that an earlier run had finished.
    """

    def __init__(self, node_id: str | None, plan: Plan, models: ManagedModels) -> None:
        runtime = plan.config.runtime
        self.size = f"{runtime.video_size_w}x{runtime.video_size_h}"
        self.resumed_chunks = 0
        self._models = models
        self._chunks = plan.chunks
        self._length = f"{plan.seconds:g} s = {plan.frames} frames"
        self._progress = NodeProgress(node_id, load=0.04, sample=0.96)
        self._clock, self._last_preview = Clock(), 0.0  # time.monotonic()
        self._schedule = plan.run.schedule
        self._part = 0.0  # of the sampling that is done
        self._status = ""
        self._notices: list[str] = []
        self._progress.show_now(f"{self._length}, {self.size}, {runtime.num_steps} steps per chunk")

    def show_phase(self, phase: Phase) -> None:
        """Shows how far "load" or "sample" is, with a preview once in a while. Raises if the user has cancelled."""
        part = phase.done / phase.total
        if phase.name == "load":
            self._progress.move("load", 0.99 * part)
            self._progress.show_text(f"{self._length}: loading the model, {part:.0%}")
            return
        self._part = part
        self._update(None if phase.sampled is None else self._preview(phase.sampled))

    @cached_property
    def _rough_decoder(self) -> RoughDecoder:
        return RoughDecoder(self._models.preview_vae)

    def show_notice(self, text: str) -> None:
        """Logs a notice, and shows it below every line from now on, in place of the last one; at the end all are shown."""
        logging.warning(f"MAGI-1: {text}")
        self._notices.append(text)

    def show_resumed(self, saved: Saved) -> None:
        """Shows where an earlier run is resumed, or that it was finished."""
        total = len(saved.state.schedule(self._schedule))
        self.resumed_chunks, self._part = saved.finished, saved.state.iteration / total
        if saved.finished >= self._chunks:
            self.show_notice("This very run was finished before: its latents are taken from disk.")
            return
        self._status = f"continuing at chunk {min(saved.finished + 1, self._chunks)} of {self._chunks}"
        logging.info(f"MAGI-1: {self._status}, after {saved.state.iteration} of {total} steps.")
        self._progress.show_now(f"{self._length}: {self._status}")

    def show_chunk(self, index: int, latents: torch.Tensor) -> None:
        """Shows the last frame of a finished chunk, (1, 16, t, h, w): decoded if the VAE is loaded, else rough."""
        picture, decoder = self._rough_decoder(latents), self._models.preview_vae
        if decoder is not None:
            video = decoder.decode(latents[:, :, -1:], progress=lambda *_: host.check_interrupt())
            picture = from_model(video[:, :, -1:])[0].cpu()
        self._status = f"chunk {index + 1} of {self._chunks} is done"
        self._update(picture)

    def show_done(self) -> str:
        """Fills the bar; shows and returns the last lines: what was made, and all notices."""
        self._progress.move("sample", 1)
        text = "\n".join([f"{self._length}, {self.size}", *dict.fromkeys(self._notices)])
        self._progress.show_now(text)
        return text

    def show_stopped(self, kept: bool) -> None:
        """Shows where the run was cancelled, and whether it can be resumed."""
        then = "Queue the same run again, and it continues there." if kept else "Nothing is kept: resume is off."
        self._progress.show_now(f"Stopped at {self._part:.0%}. {then}")
        logging.info(f"MAGI-1: Stopped at {self._part:.0%}. {then}")

    def _preview(self, event: ProgressEvent) -> torch.Tensor | None:
        """Returns a rough picture, uint8 (h, w, 3), of what the oldest chunk will be; None if one was just shown."""
        self._status = f"chunk {max(0, event.first_chunk) + 1} of {self._chunks}"
        if time.monotonic() - self._last_preview < _PREVIEW_SECONDS:
            return None
        self._last_preview = time.monotonic()
        width = event.latents.shape[2] // len(event.timesteps)
        remaining = 1 - event.timesteps[0]  # of the time, which ends at 1
        return self._rough_decoder(event.latents[:, :, :width] + remaining * event.velocity[:, :, :width])

    def _update(self, picture: torch.Tensor | None = None) -> None:
        part, notice = self._part, "".join(f"\n{text}" for text in self._notices[-1:])
        self._progress.move("sample", part, picture)
        self._progress.show_text(
            f"{self._length}: {self._status or 'starting'}, {part:.0%}{self._clock.left(part)}{notice}"
        )

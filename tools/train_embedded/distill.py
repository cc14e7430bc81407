"""Distils the embedded base model: `python -m tools.train_embedded.distill --base STATE --out FOLDER`.

The student takes one pass where the base takes three, and its steps are as long as two of the base's: what it learns is the mean
of the guided velocities that the base has in the two halves of a step. The step size is its second time signal, so that one
student runs in 8, 12 and 16 steps. The text encoder stays as it is.

The same command resumes a run.
"""

import argparse
import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import get_args

import torch

from magi.sampling.guidance import guidance_weights
from magi.sampling.schedule import time_grid

from .batches import Examples, Stream, examples
from .components import CHUNK_FRAMES, components_of, noise_like
from .loop import Training, add_arguments, add_chunks, begin_with, compile_layers, lengths_of, start
from .train import BASE, Trained, worn
from .videos import Video
from .windows import Batch, PassKind, Tensors, Window, WindowChunk, WindowDrawer, collate

STUDENT = BASE.as_variant(distill=True)
STEPS = (8, 12, 16)  # of the student
PASSES = {"text": 0.85, "independent": 0.15}
_KINDS: tuple[PassKind, ...] = get_args(PassKind)


def teacher_windows(window: Window) -> dict[PassKind, Window]:
    """Returns the base model's windows for a student's window: its three passes over the same chunks."""

    def of(kind: PassKind, chunk: WindowChunk, index: int) -> WindowChunk:
        own = kind == "text"
        if chunk.clean:
            return dataclasses.replace(chunk, conditional=False, step_size=None)
        alone = kind == "independent"
        return dataclasses.replace(
            chunk,
            captioned=own,
            conditional=own,
            position=0 if alone else chunk.position,
            first_seen=index if alone else chunk.first_seen,
            step_size=None,
        )

    return {kind: tuple(of(kind, c, i) for i, c in enumerate(window)) for kind in _KINDS}


@dataclass(frozen=True)
class Passes(Tensors):
    """The base model's passes over the same chunks.

    Attributes:
        windows: of all passes, (3 * B, n), those of a pass together.
        weights: of each pass in the guided velocity, (3, B, n, 1, 1, 1, 1).
    """

    windows: Batch
    weights: torch.Tensor


@dataclass(frozen=True)
class Lesson(Tensors):
    """What the student is asked, and what the teacher needs to answer.

    Attributes:
        examples: the student's windows.
        first: the teacher's passes at the same times.
        second: those half a step later.
        half: half of each chunk's step, (B, n, 1, 1, 1, 1); 0 for clean chunks.
    """

    examples: Examples
    first: Passes
    second: Passes
    half: torch.Tensor


def passes(chosen: Sequence[Window]) -> Passes:
    """Returns the base model's passes for a student's windows of equal length."""
    every = [teacher_windows(window) for window in chosen]
    found = [[guidance_weights(chunk.time, BASE.runtime) for chunk in window] for window in chosen]
    weights = torch.tensor([[[getattr(w, kind) for w in row] for row in found] for kind in _KINDS])
    return Passes(
        collate([p[kind] for kind in _KINDS for p in every], CHUNK_FRAMES), weights[..., None, None, None, None]
    )


def lesson(clips: Sequence[Video], chosen: Sequence[Window], rng: random.Random, num_steps: int) -> Lesson:
    """Makes the lesson of windows of equal length, of runs with so many steps."""
    ends = [end_times(window, num_steps) for window in chosen]
    later = [
        tuple(dataclasses.replace(c, time=0.5 * (c.time + end)) for c, end in zip(window, row, strict=True))
        for window, row in zip(chosen, ends, strict=True)
    ]
    half = [[0.5 * (end - c.time) for c, end in zip(w, row, strict=True)] for w, row in zip(chosen, ends, strict=True)]
    return Lesson(
        examples(clips, chosen, rng), passes(chosen), passes(later), torch.tensor(half)[..., None, None, None, None]
    )


def end_times(window: Window, num_steps: int) -> list[float]:
    """Returns the time at which each chunk's step ends; that of a clean chunk is its own."""
    grid = _grid(num_steps)

    def end(chunk: WindowChunk) -> float:
        return chunk.time if chunk.clean else grid[min(range(len(grid)), key=lambda i: abs(grid[i] - chunk.time)) + 1]

    return [end(chunk) for chunk in window]


@cache
def _grid(num_steps: int) -> list[float]:
    return time_grid(num_steps, STUDENT.engine.shortcut_mode).tolist()


class Teacher:
    """The base model's guided velocities."""

    def __init__(self, model: Trained) -> None:
        """Takes a trained base model."""
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def velocity(
        self, passes: Passes, latents: torch.Tensor, embeds: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Returns the guided velocities of a batch of windows, (B, n, 16, W, h, w)."""
        count = len(_KINDS)
        every = self.model.transformer(
            latents.repeat(count, *[1] * (latents.ndim - 1)),
            captions=embeds.repeat(count, 1, 1, 1),
            lengths=lengths.repeat(count, 1) * passes.windows.captioned,
            **passes.windows.inputs(),
        )
        return (passes.weights * every.float().unflatten(0, (count, -1))).sum(0)

    def two_steps(self, lesson: Lesson, latents: torch.Tensor, *caption: torch.Tensor) -> torch.Tensor:
        """Returns the mean velocity of the two halves of the windows' steps."""
        first = self.velocity(lesson.first, latents, *caption)
        kept = lesson.examples.windows.clean_frames[:, :, None, :, None, None]
        between = torch.where(kept, latents, latents + lesson.half * first)
        return 0.5 * (first + self.velocity(lesson.second, between, *caption))


def loss_of(student: Trained, teacher: Teacher, lesson: Lesson) -> torch.Tensor:
    """Returns how far the student's velocities are from the mean of the teacher's two steps."""
    batch, windows = lesson.examples, lesson.examples.windows
    clean = worn(batch.latents.float(), windows)
    latents = windows.latents(clean, noise_like(clean))
    with torch.no_grad():
        embeds, lengths = student.captions(batch)
    target = teacher.two_steps(lesson, latents, embeds, lengths)
    velocity = student.transformer(latents, captions=embeds, lengths=lengths, **windows.inputs())
    return windows.loss(velocity, target, torch.zeros_like(target))


def main() -> None:
    """Distils."""
    parser = argparse.ArgumentParser(description="Distils the embedded base model.")
    add_arguments(parser)
    add_chunks(parser)
    parser.add_argument("--base", type=Path, required=True, help="state.pt of the base model's training")
    parser.set_defaults(steps=2000, batch=24, rate=1e-3, muon=0.005, chunks=["1=0.3", "2=0.3", "4=0.4"])
    args = parser.parse_args()
    start(args)
    teacher, student = Trained(BASE).to(args.device), Trained(STUDENT).to(args.device)
    for model in (teacher, student):
        begin_with(model, args.base)
    begin_with(student, args.init)
    student.text.load_state_dict(teacher.text.state_dict())  # both models have one
    for part in (student.text, student.hints):
        part.requires_grad_(False)
    training = Training(student, student.transformer.videodit_blocks["layers"], args)
    sources = [
        (
            WindowDrawer(STUDENT.with_runtime(num_steps=steps), windows=(1, 2, 4), passes=PASSES, jitter=False),
            partial(lesson, num_steps=steps),
        )
        for steps in STEPS
    ]
    stream = Stream(components_of(args.out), sources, lengths_of(args.chunks), args.batch, args.uses, *training.place)
    compile_layers(teacher.transformer.videodit_blocks["layers"], args)
    guide = Teacher(teacher)
    training.run(stream, lambda lesson: (loss_of(student, guide, lesson), len(lesson.examples.latents)))


if __name__ == "__main__":
    main()

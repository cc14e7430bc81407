"""Distils the embedded base model: `python -m tools.train_embedded.distill --base STATE --out FOLDER`.

The student takes one pass where the base takes three, and its steps are as long as two of the base's: what it learns is the mean
of the guided velocities that the base has in the two halves of a step. The step size is its second time signal, so that one
student runs in 8, 12 and 16 steps. The text encoder stays as it is.

The same command resumes a run.
"""

import argparse
import dataclasses
import random
from pathlib import Path
from typing import get_args

import torch

from magi.config import MagiConfig
from magi.sampling.guidance import combine, guidance_weights
from magi.sampling.schedule import time_grid

from . import videos
from .components import components_of
from .loop import Training, add_arguments, add_chunks, lengths_of, start
from .train import BASE, Trained, clean_latents
from .videos import CHUNK_FRAMES, Pool, Video, windows
from .windows import Batch, PassKind, Window, WindowChunk, WindowDrawer, collate

STUDENT = BASE.as_variant(distill=True)
STEPS = (8, 12, 16)  # of the student
PASSES = {"text": 0.85, "independent": 0.15}
MUON_RATE = 0.005
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


class Teacher:
    """The base model's guided velocities."""

    def __init__(self, model: Trained, config: MagiConfig) -> None:
        """Takes a trained base model and the guidance scales."""
        self.model, self.runtime = model.eval().requires_grad_(False), config.runtime

    @torch.no_grad()
    def velocity(
        self, chosen: list[Window], latents: torch.Tensor, embeds: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Returns the guided velocities of a batch of windows of equal length, (B, n, 16, W, h, w)."""
        passes = [teacher_windows(window) for window in chosen]
        batch = collate([p[kind] for kind in _KINDS for p in passes], CHUNK_FRAMES).to(latents.device)
        count = len(_KINDS)
        every = self.model.transformer(
            latents.repeat(count, *[1] * (latents.ndim - 1)),
            captions=embeds.repeat(count, 1, 1, 1),
            lengths=lengths.repeat(count, 1) * batch.captioned,
            **batch.inputs(),
        )
        found = dict(zip(_KINDS, every.chunk(count), strict=True))
        guided = [
            combine(guidance_weights(chunk.time, self.runtime), {kind: v[row, i] for kind, v in found.items()})
            for row, window in enumerate(chosen)
            for i, chunk in enumerate(window)
        ]
        return torch.stack(guided).view_as(latents)

    def two_steps(
        self, chosen: list[Window], ends: torch.Tensor, latents: torch.Tensor, batch: Batch, *caption: torch.Tensor
    ) -> torch.Tensor:
        """Returns the mean velocity of two equal steps from the windows' times to `ends`, (B, n)."""
        half = 0.5 * (ends - batch.times)[..., None, None, None, None]
        first = self.velocity(chosen, latents, *caption)
        kept = batch.clean_frames[:, :, None, :, None, None]
        between = torch.where(kept, latents, latents + half * first)
        times = (0.5 * (ends + batch.times)).tolist()
        moved = [
            tuple(c if c.clean else dataclasses.replace(c, time=t) for c, t in zip(window, row, strict=True))
            for window, row in zip(chosen, times, strict=True)
        ]
        return 0.5 * (first + self.velocity(moved, between, *caption))


def end_times(chosen: list[Window], num_steps: int) -> torch.Tensor:
    """Returns the time at which each chunk's step ends, (B, n); that of a clean chunk is its own."""
    grid = time_grid(num_steps, STUDENT.engine.shortcut_mode)

    def end(chunk: WindowChunk) -> float:
        return chunk.time if chunk.clean else float(grid[int((grid - chunk.time).abs().argmin()) + 1])

    return torch.tensor([[end(c) for c in window] for window in chosen])


def loss_of(
    student: Trained, teacher: Teacher, clips: list[Video], chosen: list[Window], num_steps: int, rng: random.Random
) -> torch.Tensor:
    """Returns how far the student's velocities are from the mean of the teacher's two steps."""
    device = student.text.special.device
    batch, clean = collate(chosen, CHUNK_FRAMES).to(device), clean_latents(clips, chosen).to(device)
    latents = batch.latents(clean, torch.randn(clean.shape, device=device))
    with torch.no_grad():
        embeds, lengths = student.captions(clips, chosen, rng)
    lengths = lengths * batch.captioned
    target = teacher.two_steps(chosen, end_times(chosen, num_steps).to(device), latents, batch, embeds, lengths)
    velocity = student.transformer(latents, captions=embeds, lengths=lengths, **batch.inputs())
    return batch.loss(velocity, target, torch.zeros_like(target))


def main() -> None:
    """Distils."""
    parser = argparse.ArgumentParser(description="Distils the embedded base model.")
    add_arguments(parser)
    add_chunks(parser)
    parser.add_argument("--base", type=Path, required=True, help="state.pt of the base model's training")
    parser.set_defaults(steps=4000, batch=32, rate=1e-3, chunks=["2=0.5", "4=0.5"])
    args = parser.parse_args()
    start(args)
    base = torch.load(args.base, weights_only=True, map_location=args.device)["average"]
    teacher, student = Trained(BASE).to(args.device), Trained(STUDENT).to(args.device)
    teacher.load_state_dict(base)
    student.load_state_dict(base)
    for part in (student.text, student.hints):
        part.requires_grad_(False)
    training = Training(student, student.transformer.videodit_blocks["layers"], args, MUON_RATE)
    chunks, rng = lengths_of(args.chunks), training.rng
    pool = Pool(components_of(args.out), max(chunks), training.first_seed, videos.POOL)
    drawn = {
        steps: windows(
            pool,
            WindowDrawer(STUDENT.with_runtime(num_steps=steps), windows=(1, 2, 4), passes=PASSES, jitter=False),
            chunks,
            args.batch,
            rng,
        )
        for steps in STEPS
    }
    guide = Teacher(teacher, BASE)

    def loss() -> tuple[torch.Tensor, int]:
        steps = rng.choice(STEPS)
        clips, chosen = next(drawn[steps])
        training.seed = pool.next_seed
        return loss_of(student, guide, clips, chosen, steps, rng), len(clips)

    training.run(loss)


if __name__ == "__main__":
    main()

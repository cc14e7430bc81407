"""Measures what model files make of held-out scenes: `python -m tools.train_embedded.evaluate --help`.

Every task asks the pipeline itself for videos, as a user would, and `measure.py` looks at their frames. What is right is said
by `Score`; the numbers are shares of clips.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from magi import MagiPipeline

from . import world
from .captions import captions
from .export import BASE_FOLDER, STUDENT_FOLDER
from .measure import Seen, measure
from .sheet import contact_sheet

FIRST_SEED = 10_000  # of evaluation
PLACE = 6.0  # pixels within which an object starts where it was
SPEED_ERROR = 0.15  # of the speed that a continued clip has
Frames = NDArray[np.uint8]


@dataclass
class Score:
    """How often each thing was right, and the clips with what was asked for.

    Attributes:
        right: by name, whether it was right in each clip.
        videos: frames of the first clips.
        prompts: of these, per second.
    """

    right: dict[str, list[bool]] = field(default_factory=dict)
    videos: list[Frames] = field(default_factory=list)
    prompts: list[Sequence[str]] = field(default_factory=list)

    def add(self, frames: Frames, prompts: Sequence[str], **right: bool) -> None:
        """Adds a clip."""
        for name, value in right.items():
            self.right.setdefault(name, []).append(bool(value))
        self.videos.append(frames)
        self.prompts.append(prompts)

    def shares(self) -> dict[str, float]:
        """Returns the share of clips in which each thing was right."""
        return {name: round(sum(values) / len(values), 3) for name, values in self.right.items()}


@dataclass(frozen=True)
class Maker:
    """Makes videos with a pipeline.

    Attributes:
        pipeline: over the model's files.
        options: fields of `Request` for every video.
    """

    pipeline: MagiPipeline
    options: dict[str, Any] = field(default_factory=dict)

    def video(self, prompts: Sequence[str], seed: int, **request: Any) -> Frames:
        """Returns the frames that come out, (T, 64, 64, 3)."""
        size = {"height": world.SIZE, "width": world.SIZE, "seconds": len(prompts)}
        clips = self.pipeline.generate(prompt=list(prompts), seed=seed, **{**size, **self.options, **request})
        return torch.cat([clip.frames for clip in clips]).numpy()


def _scene(seed: int, chunks: int, changes: float = 0.0) -> world.Scene:
    return world.draw(seed, chunks, held_out=True, changes=changes)


def _matches(seen: Seen | None, scene: world.Scene, chunk: int) -> dict[str, bool]:
    """Returns what of a second is as the scene has it."""
    return {
        "object": seen is not None,
        "background": seen is not None and seen.background == scene.background,
        "colour": seen is not None and seen.colour == scene.colours[chunk],
        "shape": seen is not None and seen.shape == scene.shape,
        "motion": seen is not None and seen.motion == world.shown_or_asked(scene)[chunk],
    }


def text(maker: Maker, count: int) -> Score:
    """Two seconds from a prompt; the first is measured."""
    score = Score()
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        scene = _scene(seed, 2)
        prompts = [captions(scene, seed, held_out=True)[0]] * 2
        frames = maker.video(prompts, seed)
        right = _matches(measure(frames)[0], scene, 0)
        if scene.motions[0] in world.DIRECTIONS:
            right["direction"] = right["motion"]
        score.add(frames, prompts, **right)
    return score


def change(maker: Maker, count: int) -> Score:
    """Four seconds whose prompt turns the motion as the third begins."""
    score, seed = Score(), FIRST_SEED + 1000
    while len(score.videos) < count:
        seed += 1
        scene = _turning(seed)
        if scene is None:
            continue
        prompts = captions(scene, seed, held_out=True)
        frames = maker.video(prompts, seed)
        seen = measure(frames)
        first, _, third, last = (_matches(part, scene, chunk) for chunk, part in enumerate(seen))
        # The third second shows the new motion alone; by the fourth the object may have come to the last place.
        score.add(frames, prompts, **last | {"first": first["motion"], "turned": third["motion"]})
    return score


def _turning(seed: int) -> world.Scene | None:
    """Returns a scene that moves one way for two seconds and another for two, with room for both; None if this seed has none."""
    scene = _scene(seed, 2)
    if scene.motions[0] not in world.DIRECTIONS:
        return None
    ways = [name for name in world.DIRECTIONS if name != scene.motions[0]]
    way = ways[seed % len(ways)]
    motions, colours = (*scene.motions, way, way), scene.colours * 2
    scene = dataclasses.replace(scene, motions=motions, colours=colours)
    return scene if world.shown_motions(scene) == list(motions) else None


def picture(maker: Maker, count: int) -> Score:
    """Two seconds from a picture and a prompt; in the second one the object may have come to the last place and rest."""
    score = Score()
    for seed in range(FIRST_SEED + 2000, FIRST_SEED + 2000 + count):
        scene = _scene(seed, 2)
        prompts = [captions(scene, seed, held_out=True)[0]] * 2
        frames = maker.video(prompts, seed, image=torch.from_numpy(world.frames(scene)[:1]))
        first, last = measure(frames)
        right = _matches(last, scene, 1) | {"motion": _matches(first, scene, 0)["motion"]}
        place = first is not None and np.abs(first.centre[:4].mean(0) - scene.start).max() <= PLACE
        score.add(frames, prompts, place=place, **right)
    return score


def clip(maker: Maker, count: int, frames_before: int) -> Score:
    """A second that goes on from a clip, with the prompt that fits it."""
    score, seed = Score(), FIRST_SEED + 3000
    while len(score.videos) < count:
        seed += 1
        scene = _moving(seed, frames_before + world.CHUNK)
        if scene is None:
            continue
        prompts = captions(scene, seed, held_out=True)[-1:]
        before = world.frames(scene)[:frames_before]
        seconds = frames_before / world.FPS
        frames = maker.video(prompts, seed, video=torch.from_numpy(before), continue_seconds=seconds)
        seen = measure(frames)[0]
        right = _matches(seen, scene, scene.chunks - 1)
        way = np.array(world.DIRECTIONS[scene.motions[-1]]) * world.SPEED
        off = np.inf if seen is None else float(np.linalg.norm(np.array(seen.velocity) - way))
        score.add(np.concatenate([before, frames]), prompts, velocity=off <= SPEED_ERROR * world.SPEED, **right)
    return score


def _moving(seed: int, frames: int) -> world.Scene | None:
    """Returns a scene that rests, if need be, and then moves one way until so many frames; None if this seed has none.

    An object crosses the frame in two seconds; it may have done so two frames before the end.
    """
    scene = _scene(seed, 1)
    if scene.motions[0] not in world.DIRECTIONS:
        return None
    rests = max(0, -(-(frames - 2) // world.CHUNK) - 2)
    motions = ("still",) * rests + scene.motions * 2
    scene = dataclasses.replace(scene, motions=motions, colours=scene.colours * len(motions))
    return scene if world.shown_motions(scene) == list(motions) else None


def long(maker: Maker, count: int) -> Score:
    """Twenty seconds of changing motions; the last one is measured."""
    score = Score()
    for seed in range(FIRST_SEED + 4000, FIRST_SEED + 4000 + count):
        scene = _scene(seed, 20, changes=0.3)
        prompts = captions(scene, seed, held_out=True)
        frames = maker.video(prompts, seed)
        score.add(frames, prompts, **_matches(measure(frames)[-1], scene, 19))
    return score


def elsewhere(maker: Maker, count: int) -> Score:
    """The same prompt with another seed."""
    score = Score()
    for seed in range(FIRST_SEED + 5000, FIRST_SEED + 5000 + count):
        prompts = [captions(_scene(seed, 1), seed, held_out=True)[0]]
        both = [measure(frames := maker.video(prompts, s))[0] for s in (seed, seed + 1)]
        apart = None not in both and np.abs(both[0].centre[0] - both[1].centre[0]).max() > 3
        score.add(frames, prompts, elsewhere=apart)
    return score


TASKS: dict[str, Callable[[Maker, int], Score]] = {
    "text": text,
    "change": change,
    "picture": picture,
    "clip8": lambda maker, count: clip(maker, count, 8),
    "clip32": lambda maker, count: clip(maker, count, 32),
    "clip50": lambda maker, count: clip(maker, count, 50),
    "long": long,
    "elsewhere": elsewhere,
}


def main() -> None:
    """Runs the tasks, prints a line for each, and draws a contact sheet of the first clips of each."""
    parser = argparse.ArgumentParser(description="Measures what model files make of held-out scenes.")
    parser.add_argument("--model", type=Path, required=True, help="folder that `export.py` wrote")
    parser.add_argument("--base", action="store_true", help="the base model instead of the distilled one")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--count", type=int, default=100, help="clips of each task (default: %(default)d)")
    parser.add_argument("--guidance", type=float, help="text guidance (default: the model's own)")
    parser.add_argument("--steps", type=int, help="steps (default: the model's own)")
    parser.add_argument("--window", type=int, help="window size (default: the model's own)")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp8"), help="how the weights are kept")
    parser.add_argument("--offload", action="store_true", help="stream the layers")
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipeline = MagiPipeline.from_files(
        args.model / (BASE_FOLDER if args.base else STUDENT_FOLDER),
        args.model / "vae",
        args.model / "text_encoder",
        args.model / "special_tokens.npz",
        vae_dtype=torch.float32,
        dtype=torch.float32,
        precision=args.precision,
        offload=args.offload or None,
    )
    if args.guidance is not None:
        pipeline.config = pipeline.config.with_guidance(text=args.guidance)
    maker = Maker(pipeline, {"num_steps": args.steps, "window_size": args.window})
    for name in args.tasks:
        began = time.monotonic()
        score = TASKS[name](maker, args.count)
        row = {"task": name, "clips": len(score.videos), **score.shares()}
        print(json.dumps(row | {"seconds": round(time.monotonic() - began)}), flush=True)
        if args.sheets:
            args.sheets.mkdir(parents=True, exist_ok=True)
            sheet = contact_sheet(score.videos[:8], score.prompts[:8], every=6, scale=1)
            Image.fromarray(sheet).save(args.sheets / f"{name}.png")


if __name__ == "__main__":
    main()

"""A request on the command line becomes a file: written chunk by chunk, kept while it is made, resumed, tidied up after."""

import argparse
import dataclasses
import json
import secrets
import sys
import time
from contextlib import suppress
from itertools import chain
from pathlib import Path

from ..errors import MagiError
from ..media.video_reader import probe
from ..media.video_writer import VideoWriter, check_name, is_partial_of, read_metadata
from ..pipeline.pipeline import MagiPipeline, Plan, Request
from ..runs.store import RunStore
from ..system.paths import user_path
from .bars import Bars
from .join import joined_clip

_RANDOM = -1  # as a seed


def write_video(
    pipeline: MagiPipeline, request: Request, args: argparse.Namespace, scale: int = 1, *, replace: bool = False
) -> int:
    """Makes the video and writes it chunk by chunk, so that finished chunks survive an error; returns 0.

    Args:
        pipeline: makes it.
        request: says what.
        args: say where to, and how.
        scale: each pixel becomes a square of so many, side by side, in the file.
        replace: whether a video of that name is replaced even without --overwrite.

    Raises:
        RunInUseError: another process is writing the same output.
        MagiError: an unfinished run is kept there, and neither --resume nor --overwrite is given.
    """
    if not 0 <= args.state_minutes < float("inf"):
        raise MagiError(f"--state-minutes is {args.state_minutes:g}; it must be 0 (after every step) or more.")
    out = user_path(args.out)
    check_name(out, overwrite=True)  # whether it is taken is said later, where it is not this run's own
    store = RunStore(out.with_suffix(".run"))
    store.lock()  # the output's owner, too, whether the run is kept or not
    try:
        if store.exists and not args.no_state:
            if store.made(out):  # killed between its last two steps
                _tidy(store, out)
                if args.resume:
                    print(f"{args.out} was finished by this run before: nothing is left to do.", file=sys.stderr)
                    return 0
            elif not (args.resume or args.overwrite):
                raise MagiError(
                    f"There is an unfinished run in {str(store.folder)!r}. Resume it (--resume), or start over (--overwrite)."
                )
        if request.seed == _RANDOM:
            request = dataclasses.replace(request, seed=_drawn_seed(store if args.resume else None))
        return _write(pipeline, request, args, scale, args.overwrite or replace, store)
    finally:
        store.close()


def _write(
    pipeline: MagiPipeline, request: Request, args: argparse.Namespace, scale: int, overwrite: bool, owner: RunStore
) -> int:
    """Writes the video, and keeps the run in `owner`, which is locked, unless --no-state is given."""
    store = None if args.no_state else owner
    if args.join:
        probe(args.video)  # a run that is resumed does not need the clip, but its video does
    plan = pipeline.plan(request, store if args.resume else None)
    runtime = plan.config.runtime
    if store and args.resume:
        store.open(pipeline.settings(plan))
    writer = VideoWriter(
        args.out,
        scale * runtime.video_size_h,
        scale * runtime.video_size_w,
        runtime.fps,
        args.crf,
        _metadata(plan, pipeline, args.command),
        overwrite,
    )
    owner.lock()  # there may have been no folder before
    if store:
        writer.on_whole = store.note_result
        if not args.resume:
            store.open(pipeline.settings(plan), overwrite=True)
    print(
        f"{args.out}: {_summary(plan)}, {runtime.num_steps} steps, seed {request.seed}, on {pipeline.device}",
        file=sys.stderr,
    )
    if args.resume:
        print(_resume_message(store, plan), file=sys.stderr)
    elif args.video and not args.join and probe(args.video).sound:
        print(
            f"note: {args.video} has sound, which is not continued. --join puts the clip in front, with its sound.",
            file=sys.stderr,
        )
    if plan.placement is not None and pipeline.device.type != "cpu":
        print(f"memory: {plan.placement.describe()}", file=sys.stderr)
    started = time.monotonic()
    try:
        with writer, Bars() as bars:
            for clip in pipeline.run(plan, bars, store, 60 * args.state_minutes):
                made = clip.frames.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
                # Not before there is something to follow it: a file of the clip alone is no result to keep.
                join = args.join and clip.first_frame == 0
                before = joined_clip(args.video, args.fit, writer, plan.frames, bars) if join else ()
                for frames in chain(before, (made,)):
                    first = writer.frames_written == 0
                    writer.write(frames)
                    if store and first:
                        store.note_partial(writer.partial_path)
    except BaseException:
        if writer.frames_written:
            print(f"The {writer.frames_written} frames finished so far are in {writer.partial_path}", file=sys.stderr)
        if store and store.exists:
            print(f"The run is kept in {store.folder}: the same command with --resume continues it.", file=sys.stderr)
        elif store:
            store.discard()  # files that were written before saving the first state failed
        raise
    print(f"wrote {writer.path} ({writer.frames_written} frames, {time.monotonic() - started:.0f} s)", file=sys.stderr)
    if store:
        _tidy(store, writer.path)
    return 0


def _drawn_seed(store: RunStore | None) -> int:
    """Returns a random seed, or that of the run that is to be resumed."""
    saved = store.saved_settings().get("seed") if store and store.exists else None
    return saved if isinstance(saved, int) else secrets.randbelow(1 << 32)


def _tidy(store: RunStore, video: Path) -> None:
    """Removes a run whose video is finished, and the partial videos of the tries before."""
    for partial in store.partials():
        if is_partial_of(partial, video):
            with suppress(OSError):  # Windows: a player has it open
                partial.unlink(missing_ok=True)
                partial.with_suffix(".tmp").unlink(missing_ok=True)
    store.discard()


def _resume_message(store: RunStore | None, plan: Plan) -> str:
    if store is None or store.saved is None:
        return "note: No state of this run is saved, so it starts with the first chunk."
    finished = store.saved.finished
    return (
        f"resuming {store.folder}: {finished} of {plan.chunks} chunks are finished"
        f"{f', chunk {finished + 1} is in progress' if finished < plan.chunks else ''}"
    )


def _summary(plan: Plan) -> str:
    runtime = plan.config.runtime
    return f"{runtime.video_size_w}x{runtime.video_size_h}, {plan.frames} frames ({plan.seconds:g} s) in {plan.chunks} chunks"


def made_by(path: Path, command: str) -> bool:
    """Returns whether a file is a video that this command of ours wrote."""
    try:
        return bool(json.loads(read_metadata(path)["comment"])["magi"]["command"] == command)
    except (MagiError, KeyError, ValueError, TypeError, RecursionError):
        return False


def _metadata(plan: Plan, pipeline: MagiPipeline, command: str) -> dict[str, str]:
    """Returns the video's metadata, title and settings; files by their names only, as their folders may be private."""
    request, runtime = plan.request, plan.config.runtime
    settings = {
        "command": command,
        "model": Path(pipeline.files.transformer).name,
        "prompt": request.prompt,
        "image": Path(str(request.image)).name if request.image is not None else None,
        "video": Path(str(request.video)).name if request.video is not None else None,
        "seed": request.seed,
        "size": f"{runtime.video_size_w}x{runtime.video_size_h}",
        "steps": runtime.num_steps,
        "window": runtime.window_size,
        "style": list(request.style_tokens),
        "negative": request.negative_tokens,
        "passes": runtime.cfg_number,
    }
    title = request.prompt if isinstance(request.prompt, str) else request.prompt[0]
    return {"title": title, "comment": json.dumps({"magi": settings}, ensure_ascii=False)}

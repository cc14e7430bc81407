"""`python -m magi generate`: a video file from a prompt, a picture or a video."""

import argparse
import json
import sys
import time
from itertools import chain
from pathlib import Path

import torch

from ..config import PRESETS, MagiConfig
from ..errors import MagiError
from ..media.frames import AREAS
from ..media.video_reader import probe
from ..media.video_writer import VideoWriter
from ..model_files.locate import find_files
from ..pipeline.pipeline import MagiPipeline, Plan, Request
from ..planning.placement import MemoryOptions
from ..runs.autosave import SAVE_SECONDS
from ..runs.store import RunStore
from ..sampling.special_tokens import STYLES
from ..text.embedding_cache import EmbeddingCache
from .arguments import parse_bytes, parse_size
from .bars import Bars
from .embedded import EMBEDDED, embedded_pipeline
from .join import check_join, joined_clip

DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `generate`."""
    files = parser.add_argument_group("model")
    files.add_argument(
        "--model",
        default="embedded",
        help=f"one of {', '.join(PRESETS)}; or one that comes with this package: {', '.join(EMBEDDED)} (moving shapes, and the "
        "last one for photos); or a file or folder (default: %(default)s)",
    )
    files.add_argument(
        "--models", default="models", metavar="FOLDER", help="where `download` put the files (default: %(default)s)"
    )
    files.add_argument("--vae", help="file or folder (default: below --models)")
    files.add_argument("--text-encoder", help="T5 v1.1 XXL, file or folder (default: below --models)")
    files.add_argument("--tokenizer", help="folder or file, where it is not beside the text encoder")
    files.add_argument("--special-tokens", help="special_tokens.npz (default: below --models)")
    files.add_argument("--config", help="official JSON config (default: recognised from the file)")
    files.add_argument(
        "--variant",
        choices=("auto", "base", "distilled"),
        default="auto",
        help="what the weights are, where the file does not tell",
    )
    add_content_arguments(parser)
    run = parser.add_argument_group("computation")
    add_device_arguments(run)
    run.add_argument("--dtype", choices=DTYPES, default="auto", help="of the transformer (default: %(default)s)")
    run.add_argument(
        "--fp8-storage",
        action="store_true",
        help="keep the layers of bf16 weights in float8: half the memory, a small loss",
    )
    run.add_argument(
        "--attention", default="auto", help="kernel: auto, flash, efficient, math or sage (default: %(default)s)"
    )
    run.add_argument(
        "--compile",
        action="store_true",
        help="have torch.compile make the layers' kernels: faster after a first iteration that takes minutes; needs a C++ "
        "compiler or Triton; the last bits of the video differ",
    )
    run.add_argument(
        "--offload",
        choices=("auto", "on", "off"),
        default="auto",
        help="fetch layers as they are needed instead of keeping them on the device (default: those that do not fit)",
    )
    run.add_argument("--memory", metavar="SIZE", help="graphics memory to use, e.g. 8GB (default: what is free)")
    run.add_argument("--text-device", default="cpu", help="where the text encoder runs (default: %(default)s)")
    run.add_argument("--text-dtype", choices=DTYPES, default="auto", help="of the text encoder (default: fp32)")
    run.add_argument(
        "--cache",
        default=default_cache(),
        type=Path,
        help="folder for text embeddings and the embedded photo model (default: %(default)s)",
    )


def add_content_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options for what the video shows and where it is written."""
    content = parser.add_argument_group("content")
    content.add_argument("--prompt", action="append", help="what to show; repeat it for one prompt per second")
    content.add_argument("--image", help="picture to start from")
    content.add_argument("--video", help="video to continue")
    content.add_argument(
        "--continue-seconds",
        type=float,
        default=2.0,
        help="how much of the video's end the model sees (default: %(default)s)",
    )
    content.add_argument(
        "--join",
        action="store_true",
        help="put the continued video in front, with its sound, and silence after it (default: the file begins where the "
        "video ends, and has no sound)",
    )
    length = content.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, help="length, rounded up to whole seconds (default: 4)")
    length.add_argument("--frames", type=int, help="length in frames at 24 per second, rounded up to whole seconds")
    content.add_argument(
        "--size",
        help=f"WIDTHxHEIGHT in multiples of 16, or {', '.join(AREAS)} (default: the model's, in the shape of the input; the "
        "embedded models of moving shapes take a square)",
    )
    content.add_argument(
        "--fit",
        choices=("crop", "pad", "stretch"),
        default="crop",
        help="how an input of another shape is fitted (default: %(default)s)",
    )
    content.add_argument("--seed", type=int, default=0, help="another number, another video (default: %(default)s)")
    content.add_argument("--steps", type=int, help="denoising steps per chunk (default: the model's)")
    content.add_argument("--window", type=int, help="chunks denoised at a time (default: the model's)")
    content.add_argument("--style", nargs="*", choices=STYLES, default=["hq"], help="style tokens (default: hq)")
    content.add_argument("--no-duration", action="store_true", help="do not tell the model how long the video is")
    content.add_argument(
        "--negative", action="store_true", help="steer away from burnt-in text, logos, cuts and borders (base models)"
    )
    content.add_argument("--raw-prompt", action="store_true", help="do not clean the prompt")
    out = parser.add_argument_group("output")
    out.add_argument("--out", default="magi.mp4", help="the file to write (default: %(default)s)")
    out.add_argument("--crf", type=int, default=18, help="quality, 1 (best) to 51 (default: %(default)s)")
    out.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the file if it is there, and start over where an unfinished run is kept",
    )
    kept = out.add_mutually_exclusive_group()
    kept.add_argument(
        "--resume",
        action="store_true",
        help="resume the run that was interrupted: the same command, with this added",
    )
    kept.add_argument("--no-state", action="store_true", help="do not keep the run's state on disk")
    out.add_argument(
        "--state-minutes",
        type=float,
        default=SAVE_SECONDS / 60,
        metavar="N",
        help="save the run's state, in a folder .run beside OUT, after every chunk and every N minutes (default: %(default)g)",
    )


def add_device_arguments(parser: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """Adds the option for the device to compute on."""
    parser.add_argument("--device", help="cuda, cuda:1, xpu, mps or cpu (default: the best there is)")


def default_cache() -> Path:
    """Returns the folder of text embeddings and the embedded photo model: below ~/.cache on every system, like those of torch."""
    return Path.home() / ".cache" / "magi1"


def main(args: argparse.Namespace) -> int:
    """Runs `generate`."""
    if not args.prompt:
        raise MagiError('No prompt is given. Say what to show: --prompt "A cat looks around".')
    check_join(args)
    pipeline = _pipeline(args)
    return write_video(pipeline, request_from(args), args)


def write_video(pipeline: MagiPipeline, request: Request, args: argparse.Namespace, scale: int = 1) -> int:
    """Makes the video and writes it chunk by chunk, so that finished chunks survive an error; returns 0.

    Args:
        pipeline: makes it.
        request: says what.
        args: say where to, and how.
        scale: each pixel becomes a square of so many, side by side, in the file.
    """
    store = _store(args)
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
        _metadata(plan, pipeline),
        args.overwrite,
    )
    if store and not args.resume:
        store.discard()
        store.open(pipeline.settings(plan))
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
        for partial in store.partials():  # of the runs before this one; this one's is gone
            partial.unlink(missing_ok=True)
            partial.with_suffix(".tmp").unlink(missing_ok=True)
        store.discard()
    return 0


def _store(args: argparse.Namespace) -> RunStore | None:
    """Returns the store of the run, None where it is not kept.

    Raises:
        MagiError: an unfinished run is kept there, and neither --resume nor --overwrite is given.
    """
    if not 0 <= args.state_minutes < float("inf"):
        raise MagiError(f"--state-minutes is {args.state_minutes:g}; it must be 0 (after every step) or more.")
    out = Path(args.out)
    if args.no_state or out.suffix.lower() != ".mp4":  # another name is refused before anything runs
        return None
    store = RunStore(out.with_suffix(".run"))
    if store.exists and not (args.resume or args.overwrite):
        raise MagiError(
            f"There is an unfinished run in {str(store.folder)!r}. Resume it (--resume), or start over (--overwrite)."
        )
    return store


def _resume_message(store: RunStore | None, plan: Plan) -> str:
    if store is None or store.saved is None:
        return "note: No state of this run is saved, so it starts with the first chunk."
    finished = store.saved.finished
    return (
        f"resuming {store.folder}: {finished} of {plan.chunks} chunks are finished"
        f"{f', chunk {finished + 1} is in progress' if finished < plan.chunks else ''}"
    )


def request_from(args: argparse.Namespace) -> Request:
    """Returns the request that the content arguments describe."""
    size = parse_size(args.size) if args.size else (None, None)
    height, width = (None, None) if isinstance(size, str) else size
    return Request(
        prompt=args.prompt[0] if len(args.prompt) == 1 else tuple(args.prompt),
        image=args.image,
        video=args.video,
        continue_seconds=args.continue_seconds,
        seconds=args.seconds if args.seconds is not None or args.frames is not None else 4.0,
        frames=args.frames,
        height=height,
        width=width,
        area=size if isinstance(size, str) else None,
        fit=args.fit,
        seed=args.seed,
        num_steps=args.steps,
        window_size=args.window,
        style_tokens=tuple(args.style),
        duration_tokens=not args.no_duration,
        negative_tokens=args.negative,
        clean_prompt=not args.raw_prompt,
    )


def _pipeline(args: argparse.Namespace) -> MagiPipeline:
    options = {
        "device": args.device,
        "dtype": DTYPES[args.dtype],
        "precision": "fp8" if args.fp8_storage else "auto",
        "attention": args.attention,
        "compiled": args.compile,
        "offload": {"auto": None, "on": True, "off": False}[args.offload],
        "memory": MemoryOptions(budget=None if args.memory is None else parse_bytes(args.memory)),
        "text_device": args.text_device,
        "text_dtype": DTYPES[args.text_dtype],
        "cache": EmbeddingCache(args.cache / "text", remedy="Choose another folder with --cache."),
    }
    if args.model in EMBEDDED:
        return embedded_pipeline(args, **options)
    files = find_files(args.models, args.model, args.vae, args.text_encoder, args.special_tokens, args.tokenizer)
    config = MagiConfig.from_json(args.config) if args.config else PRESETS.get(args.model)
    distilled = {"auto": None, "base": False, "distilled": True}[args.variant]
    return MagiPipeline.from_files(**vars(files), config=config, distilled=distilled, **options)


def _summary(plan: Plan) -> str:
    runtime = plan.config.runtime
    return f"{runtime.video_size_w}x{runtime.video_size_h}, {plan.frames} frames ({plan.seconds:g} s) in {plan.chunks} chunks"


def _metadata(plan: Plan, pipeline: MagiPipeline) -> dict[str, str]:
    """Returns the video's metadata, title and settings; files by their names only, as their folders may be private."""
    request, runtime = plan.request, plan.config.runtime
    settings = {
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

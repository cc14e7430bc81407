"""`python -m magi generate`: a video file from a prompt, a picture or a video."""

import argparse
import os
import tempfile
from pathlib import Path

import torch

from ..config import PRESETS, MagiConfig
from ..errors import MagiError
from ..media.frames import AREAS
from ..model_files.locate import find_files
from ..pipeline.pipeline import MagiPipeline, Request
from ..planning.placement import MemoryOptions
from ..runs.autosave import SAVE_SECONDS
from ..sampling.special_tokens import STYLES
from ..system.paths import user_path
from ..text.embedding_cache import EmbeddingCache
from .arguments import parse_bytes, parse_size
from .embedded import EMBEDDED, embedded_pipeline
from .join import check_join
from .write_video import write_video

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
    content.add_argument(
        "--seed", type=int, default=0, help="another number, another video; -1: a random one (default: %(default)s)"
    )
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
    """Returns the folder of text embeddings and the embedded photo model: below ~/.cache on every system, like those of torch.

    Containers often run users without a home: then it is below the system's folder for temporary files.
    """
    home = user_path("~")
    if home.is_absolute():
        return home / ".cache" / "magi1"
    return Path(tempfile.gettempdir()) / f"magi1-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"


def main(args: argparse.Namespace) -> int:
    """Runs `generate`."""
    if not args.prompt:
        raise MagiError('No prompt is given. Say what to show: --prompt "A cat looks around".')
    check_join(args)
    pipeline = _pipeline(args)
    return write_video(pipeline, request_from(args), args)


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


def _refuse_files(args: argparse.Namespace) -> None:
    """Raises MagiError for options that name files of another model than the embedded one, which is complete."""
    options = ("vae", "text_encoder", "tokenizer", "special_tokens", "config")
    given = [f"--{name.replace('_', '-')}" for name in options if getattr(args, name)]
    given += ["--variant"] * (args.variant != "auto")
    if given:
        raise MagiError(
            f"{given[0]} is for a model in files, and --model is {args.model!r}, which has its own. Name the transformer's file "
            f"or folder (--model), or leave out {given[0]}."
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
        _refuse_files(args)
        return embedded_pipeline(args, **options)
    files = find_files(args.models, args.model, args.vae, args.text_encoder, args.special_tokens, args.tokenizer)
    config = MagiConfig.from_json(args.config) if args.config else PRESETS.get(args.model)
    distilled = {"auto": None, "base": False, "distilled": True}[args.variant]
    return MagiPipeline.from_files(**vars(files), config=config, distilled=distilled, **options)

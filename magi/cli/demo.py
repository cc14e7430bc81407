"""`python -m magi demo`: `generate` with the embedded model and a photo; nothing is downloaded."""

import argparse
from pathlib import Path

from ..model_files.embedded import DEMO_IMAGE
from ..pipeline.pipeline import MagiPipeline
from .generate import add_content_arguments, add_device_arguments, default_cache, request_from, write_video

_OUT = "demo.mp4"
_PROMPT = "A ginger cat looks around, close-up, soft light"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `demo`: those of `generate` for the content, with defaults."""
    parser.epilog = (
        "The embedded model is set up by hand to repeat what it sees, and nothing in it is trained. "
        "It runs through exactly the code that the real weights run through."
    )
    add_content_arguments(parser)
    add_device_arguments(parser)
    parser.add_argument(
        "--cache", default=default_cache(), type=Path, help="where the model's files are made (default: %(default)s)"
    )
    parser.set_defaults(out=_OUT)


def main(args: argparse.Namespace) -> int:
    """Runs `demo`."""
    args.prompt = args.prompt or [_PROMPT]
    args.overwrite = args.overwrite or args.out == _OUT  # the last demo, not a file somebody named
    if args.image is None and args.video is None:
        args.image = str(DEMO_IMAGE)
    pipeline = MagiPipeline.embedded(args.cache, device=args.device)
    return write_video(pipeline, request_from(args), args)

"""The models that come with this package, by their names on the command line."""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from ..model_files.embedded import EMBEDDED_SIZE, Model
from ..pipeline.pipeline import MagiPipeline
from .arguments import parse_size

# By their names for --model, and as `MagiPipeline.embedded` calls them.
EMBEDDED: Mapping[str, Model] = {
    "embedded": "distill",
    "embedded-base": "base",
    "embedded-photo": "repeating",
}


def embedded_pipeline(args: argparse.Namespace, **options: Any) -> MagiPipeline:
    """Returns the pipeline of the embedded model that --model names, and prints what it can do.

    Sets --size to that of the model where none is given: it knows no other one.
    """
    kind = EMBEDDED[args.model]
    if kind == "repeating":
        note = "This is the embedded photo model: it only repeats what it sees, tinted by the prompt."
    else:
        own = f"{EMBEDDED_SIZE}x{EMBEDDED_SIZE}"
        args.size = args.size or own
        note = (
            f"This is the small embedded model. It knows moving shapes at {own}, such as "
            '"A small red circle moves to the right on a white background.", and nothing else.'
        )
        if args.image or args.video:
            note += " A photo or film needs `--model embedded-photo`."
        if parse_size(args.size) != parse_size(own):
            note += f" At {args.size} its shapes come out broken."
    print(f"note: {note} The real models are named by `python -m magi download --list`.", file=sys.stderr)
    return MagiPipeline.embedded(args.cache, kind, **options)

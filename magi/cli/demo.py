"""`python -m magi demo`: what the embedded model can do, in three videos; nothing is downloaded."""

import argparse
from pathlib import Path
from typing import Any

from ..config import FPS
from ..errors import MagiError
from ..media.video_writer import check_name
from ..model_files.embedded import DEMO_IMAGE, DEMO_SHAPE
from ..system.paths import user_path
from .embedded import EMBEDDED, embedded_pipeline
from .generate import add_content_arguments, add_device_arguments, default_cache, request_from
from .join import check_join
from .write_video import made_by, write_video

_OUT = "demo.mp4"
_SCALE = 4  # 64x64 pixels look like a stamp in a player
_PHOTO = "embedded-photo"
_PHOTO_PROMPT = "A ginger cat looks around, close-up, soft light"
TEXT = (
    *["A small red circle moves to the right on a white background."] * 2,
    *["The small red circle now moves down on a white background."] * 2,
)
PICTURE = ("A large yellow star moves to the left on a dark blue background.",)
CONTINUED = ("The small red circle now grows on a white background.",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `demo`: those of `generate` for the content, with defaults."""
    parser.epilog = (
        "Without --prompt, --image and --video it makes three videos of moving shapes: from text, with another motion from the "
        "third second on (demo.mp4); from a picture (demo_picture.mp4); and the first one continued (demo_continued.mp4). With "
        f"any of the three options it makes one. The model makes 64x64 pixels, which are written {_SCALE} times as large. It is "
        "tiny, and runs through exactly the code that the real weights run through."
    )
    add_content_arguments(parser)
    add_device_arguments(parser)
    parser.add_argument(
        "--model",
        choices=EMBEDDED,
        help=f"(default: embedded; with --image or --video {_PHOTO}, which repeats what it sees)",
    )
    parser.add_argument(
        "--cache",
        default=default_cache(),
        type=Path,
        help="where the photo model's files are made (default: %(default)s)",
    )
    parser.set_defaults(out=_OUT)


def main(args: argparse.Namespace) -> int:
    """Runs `demo`."""
    check_join(args)
    given = args.image or args.video
    args.model = args.model or (_PHOTO if given else "embedded")
    if given or args.prompt or args.model == _PHOTO:
        return _one(args)
    out = user_path(args.out)
    check_name(out, overwrite=True)
    picture, continued = (str(out.with_name(f"{out.stem}_{name}{out.suffix}")) for name in ("picture", "continued"))
    for path in (picture, continued):  # the first one is checked before it is made, as every video is
        check_name(Path(path), args.overwrite or _replaces(args, path))
    pipeline = embedded_pipeline(args, device=args.device)

    def make(prompts: tuple[str, ...], seconds: float, **changes: Any) -> None:
        own = argparse.Namespace(**{**vars(args), **changes})
        if own.seconds is None and own.frames is None:
            own.seconds = seconds
        length = own.seconds if own.frames is None else own.frames / FPS
        own.prompt = [prompt for second, prompt in enumerate(prompts) if second == 0 or second < length]
        write_video(pipeline, request_from(own), own, _SCALE, replace=_replaces(args, own.out))

    make(TEXT, 4)
    make(PICTURE, 3, image=str(DEMO_SHAPE), out=picture)
    make(CONTINUED, 2, video=args.out, join=True, out=continued)
    return 0


def _one(args: argparse.Namespace) -> int:
    """Makes the one video that is asked for."""
    photo = args.model == _PHOTO
    if not args.prompt and not photo:
        raise MagiError(f'No prompt is given. Say how the shape moves: --prompt "{PICTURE[0]}".')
    args.prompt = args.prompt or [_PHOTO_PROMPT]
    if photo and not args.video:
        args.image = args.image or str(DEMO_IMAGE)
    pipeline = embedded_pipeline(args, device=args.device)
    return write_video(pipeline, request_from(args), args, 1 if photo else _SCALE, replace=_replaces(args, args.out))


def _replaces(args: argparse.Namespace, path: str) -> bool:
    """Returns whether a file is the last demo, of a name that nobody chose: it makes room for this one."""
    return args.out == _OUT and made_by(Path(path), args.command)

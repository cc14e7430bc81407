"""`python -m magi remote`: MAGI-1 24B as a paid service, or a fake server of that service."""

import argparse
import getpass
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from ..errors import MagiError
from ..media.image import read_image
from ..media.video_writer import check_name
from ..remote.address import DEFAULT, BaseUrl
from ..remote.api import VERSIONS, Api
from ..remote.client import Client
from ..remote.key import VARIABLE, find_key, refuse_key_in, save_key
from ..remote.progress import RemoteProgress
from ..remote.request import ASPECTS, FPS, FRAMES, RESOLUTIONS, RemoteRequest
from ..system.paths import user_path
from ..system.whole_files import put_in_place
from .generate import default_cache

_WIDTH = 100  # covers what the bar has left on the line
_MOST_PORT = 65535
_FORMAT = "{percentage:3.0f}%|{bar:20}| {desc}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `python -m magi remote`."""
    parser.epilog = (
        f"The API key is taken from the environment variable {VARIABLE}, else from the file that --save-key writes. "
        "A command that is repeated resumes its task; nothing is submitted twice."
    )
    content = parser.add_argument_group("content")
    content.add_argument("--prompt", help="what to show")
    content.add_argument("--image", help="picture to start from: a file, or an address that everybody can open")
    content.add_argument("--frames", type=int, default=96, help=f"{FRAMES[0]} to {FRAMES[1]} (default: %(default)s)")
    content.add_argument("--fps", type=int, default=24, help=f"{FPS[0]} to {FPS[1]} per second (default: %(default)s)")
    content.add_argument("--resolution", choices=RESOLUTIONS, default="720p", help="(default: %(default)s)")
    content.add_argument(
        "--aspect", choices=ASPECTS, default="auto", help="auto is the picture's (default: %(default)s)"
    )
    content.add_argument("--seed", type=int, default=0, help="-1: another video every time (default: %(default)s)")
    content.add_argument(
        "--no-safety-checker", action="store_true", help="switch off the service's check of the content"
    )
    out = parser.add_argument_group("output")
    out.add_argument("--out", default="remote.mp4", type=Path, help="the file to write (default: %(default)s)")
    out.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    service = parser.add_argument_group("service")
    service.add_argument(
        "--resume-id",
        metavar="ID",
        default="",
        help="fetch the video of this task, also without --prompt; or, after an attempt of unknown outcome, the confirm code from its message, to submit again",
    )
    service.add_argument("--api-version", choices=VERSIONS, default="v2", help="(default: %(default)s)")
    service.add_argument("--base-url", default=DEFAULT, help="(default: %(default)s)")
    service.add_argument(
        "--cache",
        default=default_cache(),
        type=Path,
        help="folder for the key and the records of tasks (default: %(default)s)",
    )
    service.add_argument(
        "--key-file", type=Path, help="where the API key is, or goes (default: wavespeed_api_key.txt below --cache)"
    )
    service.add_argument("--save-key", action="store_true", help="ask for the API key, keep it, and do nothing else")
    service.add_argument(
        "--fake-server",
        action="store_true",
        help="serve what looks like the service on this machine, to try it without a key and without paying",
    )
    service.add_argument("--port", type=int, default=8190, help="of the fake server (default: %(default)s)")


def main(args: argparse.Namespace) -> int:
    """Runs `python -m magi remote` and returns its exit status.

    Raises:
        MagiError: there is no video; see `Client.make`.
    """
    key_file = args.key_file or args.cache / "wavespeed_api_key.txt"
    if args.fake_server:
        return _serve(args.port)
    if args.save_key:
        save_key(key_file, getpass.getpass("WaveSpeed API key (it is not shown): "))
        print(f"The key is in {str(key_file)!r}. Keep that file to yourself.", file=sys.stderr)
        return 0
    if args.prompt is None and not args.resume_id:
        raise MagiError('No prompt is given. Say what to show: --prompt "A cat looks around".')
    refuse_key_in(key_file, args.prompt or "", args.base_url, args.resume_id, args.image or "")
    out = user_path(args.out).absolute()
    check_name(out, args.overwrite)
    request = None if args.prompt is None else _request(args)
    base = BaseUrl(args.base_url)
    key = find_key(key_file, base, chosen_here=True)
    started = time.monotonic()
    with tqdm(total=1, bar_format=_FORMAT, file=sys.stderr) as bar:

        def log(sentence: str) -> None:
            # Not through tqdm.write: Ctrl-C may come while the bar's lock is taken, and another thread logs then.
            print(f"\r{sentence:<{_WIDTH}}", file=sys.stderr, flush=True)

        def on_progress(at: RemoteProgress) -> None:
            bar.n = at.part
            bar.set_description_str(at.text)

        client = Client(Api(base, args.api_version, key), args.cache / "remote", log)
        if request is None:
            made = client.fetch(args.resume_id, out.parent, on_progress)
            _rename(made.path, out, args.overwrite)
        else:
            made = client.make(
                request, out.parent, on_progress, args.resume_id, lambda path, _: _rename(path, out, args.overwrite)
            )
    print(f"wrote {out} ({made.facts}, {time.monotonic() - started:.0f} s), task {made.task_id}", file=sys.stderr)
    return 0


def _rename(path: Path, out: Path, overwrite: bool) -> None:
    try:
        put_in_place(path, out, overwrite=overwrite)
    except FileExistsError as error:
        raise MagiError(
            f"The video is {str(path)!r}: {str(out)!r} was made by something else meanwhile, and is not replaced."
        ) from error
    except OSError as error:
        raise MagiError(
            f"The video is {str(path)!r}; it could not be renamed to {str(out)!r} ({error.strerror})."
        ) from error


def _request(args: argparse.Namespace) -> RemoteRequest:
    return RemoteRequest(
        prompt=args.prompt,
        image=_image(args.image),
        num_frames=args.frames,
        fps=args.fps,
        resolution=args.resolution,
        aspect_ratio=args.aspect,
        seed=None if args.seed == -1 else args.seed,
        safety_checker=not args.no_safety_checker,
    )


def _image(given: str | None) -> torch.Tensor | str | None:
    """Returns the picture's pixels, or its URL where it is one."""
    if given is None or "://" in given:
        return given
    return read_image(given)[0]


def _serve(port: int) -> int:
    from ..remote.fake_server import FakeServer

    if not 0 <= port <= _MOST_PORT:
        raise MagiError(f"There is no port {port}. Choose one from 0 (any that is free) to {_MOST_PORT}: --port 8190.")
    try:
        server = FakeServer(port)
    except OSError as error:
        another = port + 1 if port < _MOST_PORT else 8190
        raise MagiError(
            f"Port {port} cannot be used ({error.strerror}). Choose another one: --port {another}."
        ) from error
    with server:
        print(
            f"The fake server listens at {server.url}, on this machine only. Set the node's base_url to that, or use\n"
            f"    python -m magi remote --base-url {server.url} --prompt ...\n"
            f"It makes test pictures, not MAGI-1's. The command sends it your key too, if you have one; the node does not. Stop it with Ctrl-C.",
            file=sys.stderr,
        )
        while True:
            time.sleep(1)

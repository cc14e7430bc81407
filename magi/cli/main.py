"""The command line: `python -m magi COMMAND ...`."""

import argparse
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from tqdm import tqdm

from ..errors import MagiError
from ..system.device import is_out_of_memory
from .streams import PIPE_CLOSED, drop_stdout, tolerant_streams

# Command -> (module, one line of help). Modules are imported when their command is used.
COMMANDS = {
    "generate": ("generate", "make a video from a prompt, a picture or a video"),
    "demo": ("demo", "make three videos with the small embedded model: nothing to download"),
    "inspect": ("inspect", "say what a weight file is and what it needs"),
    "bench": ("bench", "measure a model's speed and memory on this machine, with random weights or a file's"),
    "synth": ("synth", "write a checkpoint of random weights with a released model's layout"),
    "plan": ("plan", "say what of a run would lie where, what it takes and what it costs; nothing is loaded"),
    "remote": ("remote", "have the 24B model make the video at WaveSpeedAI, for money"),
    "download": ("download", "fetch the official files"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status.

    0: done; 1: an error the user can mend; 130: interrupted; 141: nobody reads the output any more; 143: terminated.
    """
    with tolerant_streams():
        try:
            return _run(argv)
        except BrokenPipeError:
            drop_stdout()
            return PIPE_CLOSED


def _run(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m magi", description="MAGI-1 video generation on one's own machine.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == next((a for a in arguments if not a.startswith("-")), None):
            import_module(f".{module}", __package__).add_arguments(command)
    args = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings(), _ended_by_sigterm():
            warnings.showwarning = _show_warning
            return int(import_module(f".{COMMANDS[args.command][0]}", __package__).main(args))
    except MagiError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: The memory is too small for this ({error}). Take a smaller size or model.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except _TerminatedError:
        print("terminated", file=sys.stderr)
        return 143


class _TerminatedError(BaseException):
    """The process was asked to end. As with Ctrl-C, whatever is at work keeps what it has made."""


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Raises `_TerminatedError` in the work at a SIGTERM, as `docker stop` or a scheduler sends it."""
    if threading.current_thread() is not threading.main_thread():  # only that one can catch signals
        yield
        return

    def end(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends it at once
        raise _TerminatedError

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Prints our own warnings, plain UserWarnings, as notes; those of libraries are for developers."""
    if category is UserWarning:
        tqdm.write(f"note: {message}", file=sys.stderr)  # above the bars, not behind one

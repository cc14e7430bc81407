"""Runs of the sampler on disk: the same run, queued again, resumes where it stopped, or is taken from there.

A run that was cancelled or crashed resumes. A finished one is read: ComfyUI drops results when RAM runs short, or ends
while they are decoded, and hours of sampling must not be lost with them.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

from ...magi import __version__
from ...magi.errors import MagiError
from ...magi.runs.identity import run_key
from ...magi.runs.store import RunInUseError, RunStore
from . import host

_MAX_RUNS = 5  # of each kind, unfinished and finished, that are kept
_MAX_FINISHED_BYTES = 2 << 30  # of the finished ones, but for the newest


def open_run(settings: Mapping[str, Any], on_notice: Callable[[str], None]) -> RunStore | None:
    """Returns the store of the run with these settings: new, to be resumed, or finished; removes the oldest others.

    A finished run of another version of this pack is made again. None: another ComfyUI is making this very run.

    Args:
        settings: `MagiPipeline.settings` of the run's plan.
        on_notice: called with a sentence that the user should read.
    """
    folder = host.cache_folder() / "runs" / run_key(settings)[:32]
    _make_room(folder)
    store = RunStore(folder, on_notice)
    try:
        store.open(settings, overwrite=store.finished_by not in (None, __version__))
    except RunInUseError:
        on_notice("Another ComfyUI is making this very run now, so this one is not kept on disk.")
        return None
    except MagiError as error:
        logging.warning(f"MAGI-1: {error}")
        on_notice("What was saved of this run is damaged, so it starts over.")
        store.open(settings, overwrite=True)
    return store


def _make_room(folder: Path) -> None:
    """Removes the oldest runs beyond those that are kept, never the one in `folder`."""
    ages, sizes = dict[Path, float](), dict[Path, int]()
    with suppress(OSError):  # there are none yet
        for run in folder.parent.iterdir():
            with suppress(OSError):  # another process has just removed it, or holds a file of it
                if run.is_dir() and run != folder:
                    sizes[run] = sum(file.stat().st_size for file in run.iterdir())
                    ages[run] = run.stat().st_mtime
    others = sorted(ages, key=lambda run: ages[run], reverse=True)
    finished = [run for run in others if RunStore(run).finished_by is not None]
    unfinished = [run for run in others if run not in finished]
    totals = accumulate(sizes[run] for run in finished)
    within = sum(total <= _MAX_FINISHED_BYTES for total in totals)
    for old in (*unfinished[_MAX_RUNS - 1 :], *finished[min(_MAX_RUNS - 1, within) :]):
        with suppress(RunInUseError):  # another ComfyUI is making it
            RunStore(old, logging.warning).discard()

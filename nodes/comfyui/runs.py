"""Runs of the sampler on disk: the same run, queued again after a cancel or a crash, resumes where it stopped."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...magi.errors import MagiError
from ...magi.runs.identity import run_key
from ...magi.runs.store import RunStore
from . import host

_MAX_RUNS = 5  # unfinished ones that are kept


def open_run(settings: Mapping[str, Any], on_notice: Callable[[str], None]) -> RunStore:
    """Returns the store of the run with these settings, new or to be resumed; removes the oldest others beyond five.

    Args:
        settings: `MagiPipeline.settings` of the run's plan.
        on_notice: called with a sentence that the user should read.
    """
    folder = host.cache_folder() / "runs" / run_key(settings)[:32]
    _make_room(folder)
    store = RunStore(folder, on_notice)
    try:
        store.open(settings)
    except MagiError as error:
        logging.warning(f"MAGI-1: {error}")
        on_notice("What was saved of this run is damaged, so it starts over.")
        store.discard()
        store.open(settings)
    return store


def _make_room(folder: Path) -> None:
    """Removes the oldest runs beyond `_MAX_RUNS`, never the one in `folder`."""
    try:
        others = [run for run in folder.parent.iterdir() if run.is_dir() and run != folder]
        others.sort(key=lambda run: run.stat().st_mtime, reverse=True)
    except OSError:  # there are none yet, or another process has just removed one
        return
    for old in others[_MAX_RUNS - 1 :]:
        RunStore(old, logging.warning).discard()

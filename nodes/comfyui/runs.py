"""Runs of the sampler on disk, by which the same one, queued again after a cancel or a crash, goes on where it stopped."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from ...magi.checkpoint.reader import Checkpoint
from ...magi.errors import MagiError
from ...magi.runs.identity import config_settings, run_key
from ...magi.runs.store import RunStore
from ...magi.sampling.prepare import Run
from ...magi.system.whole_files import tensor_digest
from . import host
from .models import Model

_MOST = 5  # unfinished runs that are kept


def open_run(
    model: Model, run: Run, seed: int, prefix: torch.Tensor | None, negative: bool, report: Callable[[str], None]
) -> RunStore:
    """The store of exactly this run, begun or to be resumed; the oldest others are removed where there are too many.

    Args:
        model: from the loader.
        run: prepared.
        seed: of its noise.
        prefix: given latents.
        negative: whether negative tokens are used.
        report: told, in a sentence, what a user should know of it.
    """
    held, special = model.transformer, model.special_tokens
    with Checkpoint(held.path) as checkpoint:
        fingerprint = checkpoint.fingerprint()
    settings = {
        **config_settings(run.config),
        "seed": seed,
        "model": fingerprint,
        "precision": held.precision,
        "attention": held.attention,
        "captions": tensor_digest(*run.captions),
        "negative_tokens": None if not negative or special is None else tensor_digest(special.negative()),
        "given_latents": None if prefix is None else tensor_digest(prefix),
    }
    folder = host.cache_folder() / "runs" / run_key(settings)[:32]
    _make_room(folder)
    store = RunStore(folder, report)
    try:
        store.open(settings)
    except MagiError as error:
        logging.warning(f"MAGI-1: {error}")
        report("What was saved of this run is damaged, so it begins anew.")
        store.discard()
        store.open(settings)
    return store


def _make_room(folder: Path) -> None:
    """Removes the oldest runs but a few, never the one in `folder`."""
    try:
        others = [run for run in folder.parent.iterdir() if run.is_dir() and run != folder]
        others.sort(key=lambda run: run.stat().st_mtime, reverse=True)
    except OSError:  # there are none yet, or another process has just removed one
        return
    for old in others[_MOST - 1 :]:
        RunStore(old, logging.warning).discard()

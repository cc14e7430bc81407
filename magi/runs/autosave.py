"""Saves a run while it is made: after every chunk, every few minutes between, and when it ends early."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..sampling.state import Chunk, SamplerState
from .store import RunStore

if TYPE_CHECKING:
    from ..sampling.sampler import Sampler
    from ..transformer.model import Transformer

SAVE_SECONDS = 300.0  # longest time between two saved states


class Autosave:
    """Saves a sampler's run into an open store.

    Iterate over `chunks`, and call `save_if_due` from the sampler's progress callbacks.
    """

    def __init__(self, store: RunStore, model: "Transformer", seconds: float = SAVE_SECONDS) -> None:
        """Sets the model's token block to that of the saved run, if there is one, so that the last bits stay the same.

        Where device or torch differ, so that they may not, `store.on_notice` is called.

        Args:
            store: opened with the run's settings.
            model: that the sampler runs.
            seconds: the longest time between two states that are saved.
        """
        self._store = store
        self._seconds = seconds
        self._model = model
        self._next_save = 0.0  # time.monotonic()
        self._sampler: Sampler | None = None
        self._latest: tuple[SamplerState, int] | None = None  # the state to save, and the chunks finished by then
        if saved := store.saved:
            block = saved.environment.get("token_block")
            model.token_block = block if type(block) is int and block > 0 else model.token_block
            environments = (saved.environment, self._environment)
            before, now = ([values.get(name) for name in ("device", "torch")] for values in environments)
            if before != now:
                store.on_notice(
                    f"The run was started on {before[0]} with torch {before[1]} and is resumed on {now[0]} with torch {now[1]}: "
                    "the rest may differ in the last bits."
                )

    @property
    def _environment(self) -> dict[str, Any]:
        """Returns what decides the last bits beside the settings, as it is now: the token block may shrink."""
        model = self._model
        return {"device": model.device.type, "torch": torch.__version__, "token_block": model.token_block}

    @property
    def state(self) -> SamplerState | None:
        """Returns the state for the sampler to resume from; None for a new run."""
        return self._store.saved.state if self._store.saved else None

    def chunks(self, sampler: "Sampler") -> Iterator[Chunk]:
        """Yields all chunks of the run: the store's, then the sampler's, each saved before it is yielded."""
        finished = self._store.saved.finished if self._store.saved else 0
        self._sampler, self._latest = sampler, (sampler.state, finished)
        self._next_save = time.monotonic() + self._seconds
        yield from self._store.chunks()
        try:
            for chunk in sampler:
                self._store.add(chunk)
                self._latest = (sampler.state, chunk.index + 1)
                self._save()
                yield chunk
        except BaseException:
            self._update()
            self._save()
            raise
        finally:
            self._sampler = (
                None  # breaks the reference cycle through its callbacks, so that its K/V cache is freed at once
            )

    def save_if_due(self) -> None:
        """Saves the sampler's state if the last save is `seconds` ago."""
        if time.monotonic() >= self._next_save:
            self._update()
            self._save()

    def _update(self) -> None:
        """Takes the sampler's state for the one to save, unless a chunk in it is finished but not yet in the store."""
        if self._sampler is not None and self._latest is not None:
            (before, finished), now = self._latest, self._sampler.state
            if max(now.clean, default=-1) == max(before.clean, default=-1):
                self._latest = (now, finished)

    def _save(self) -> None:
        if self._latest is not None:
            self._store.save(*self._latest, self._environment)
        self._next_save = time.monotonic() + self._seconds

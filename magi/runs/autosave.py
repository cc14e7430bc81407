"""Keeps a run on disk while it is made: after every chunk, every so often between, and when it is ended early."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..sampling.state import Chunk, SamplerState
from .store import RunStore

if TYPE_CHECKING:
    from ..sampling.sampler import Sampler
    from ..transformer.model import Transformer

SAVE_SECONDS = 300.0  # between two states within a chunk


class Keeper:
    """Ties a sampler to an open store. Call `save_if_due` from the sampler's progress callbacks, iterate over `chunks`."""

    def __init__(self, store: RunStore, model: "Transformer", seconds: float = SAVE_SECONDS) -> None:
        """Has the model compute as when the store's run was saved; `seconds` is the longest time between two states.

        Where the last bits may come out differently all the same, the store reports so.
        """
        self._store = store
        self._seconds = seconds
        self._model = model
        self._due = 0.0
        self._sampler: Sampler | None = None
        self._stands: tuple[SamplerState, int] | None = None  # a state and the chunks finished by then
        if saved := store.saved:
            model.token_block = int(saved.how.get("token_block", model.token_block))
            before, now = ([how.get(name) for name in ("device", "torch")] for how in (saved.how, self._how))
            if before != now:
                store.report(
                    f"The run was begun on {before[0]} with torch {before[1]} and goes on on {now[0]} with torch {now[1]}: "
                    "the rest may differ in the last bits."
                )

    @property
    def _how(self) -> dict[str, Any]:
        """What decides the last bits; the token block may become smaller on the way."""
        model = self._model
        return {"device": model.device.type, "torch": torch.__version__, "token_block": model.token_block}

    @property
    def state(self) -> SamplerState | None:
        """Returns the state that the sampler is to resume from."""
        return self._store.saved.state if self._store.saved else None

    def chunks(self, sampler: "Sampler") -> Iterator[Chunk]:
        """All chunks of the run: those of the store, then those that are made, each one saved before it is handed on."""
        finished = self._store.saved.finished if self._store.saved else 0
        self._sampler, self._stands, self._due = sampler, (sampler.state, finished), time.monotonic() + self._seconds
        yield from self._store.chunks()
        try:
            for chunk in sampler:
                self._store.add(chunk)
                self._stands = (sampler.state, chunk.index + 1)
                self._save()
                yield chunk
        except BaseException:
            self._look()
            self._save()
            raise
        finally:
            self._sampler = None  # which holds this through its callbacks; its keys are to go at once

    def save_if_due(self) -> None:
        """Saves where the sampler stands, if it is time to."""
        if time.monotonic() >= self._due:
            self._look()
            self._save()

    def _look(self) -> None:
        """Takes note of where the sampler stands, but not of a chunk that it has finished and not yet handed on."""
        if self._sampler is not None and self._stands is not None:
            (before, finished), now = self._stands, self._sampler.state
            if max(now.clean, default=-1) == max(before.clean, default=-1):
                self._stands = (now, finished)

    def _save(self) -> None:
        if self._stands is not None:
            self._store.save(*self._stands, self._how)
        self._due = time.monotonic() + self._seconds

"""What a run that ran out of memory teaches the plans of later ones."""

from collections.abc import Callable
from dataclasses import dataclass

from ..config import MagiConfig
from ..transformer.inputs import CacheDevice
from ..transformer.model import Transformer
from .footprint import WeightSizes
from .limit import Limit
from .placement import MemoryOptions, Placement, place


@dataclass(frozen=True)
class Shortage:
    """A run that ran out of memory and what it then made do with.

    Attributes:
        limit: the layout that it was left with.
        took: bytes that this takes on the device, by calculation.
        free: bytes that were free when the run was planned; None: unknown.
    """

    limit: Limit
    took: int
    free: int | None

    def trusts(self, placement: Placement, free: int | None) -> bool:
        """Whether a placement may be tried while so much is free.

        What the run was left with is known to fit, and every byte that has become free since adds to it. What takes as much as
        both together or more may be what ran out already, whatever the forecast says: it was wrong then, too.
        """
        grown = 0 if free is None or self.free is None else free - self.free
        return placement.device_bytes < self.took + grown


def shortage_of(
    model: Transformer,
    wanted: Placement,
    window: int | None,
    run: MagiConfig,
    weights: WeightSizes,
    free: int | None,
    options: MemoryOptions,
    given: int,
) -> Shortage | None:
    """What is to be learned from a transformer after a run; None: it is laid out as it was meant to be.

    Args:
        model: as the run has left it.
        wanted: how it was laid out before.
        window: chunks that were denoised at a time in the end; None: as many as planned.
        run: the settings it was planned for.
        weights: of the model.
        free: bytes that were free then.
        options: what is fixed by hand.
        given: latent frames that came before what was made.
    """
    caches: dict[bool, CacheDevice] = {True: "host", False: wanted.cache}
    limit = Limit(
        min(len(model.blocks.on_device), len(wanted.on_device)),
        min(model.token_block, wanted.token_block),
        caches[model.cache_device == "host"],
        min(window or wanted.window, wanted.window),
    )
    if limit == Limit(len(wanted.on_device), wanted.token_block, wanted.cache, wanted.window):
        return None
    # With the wider window it ran out: it had room for less, even where the forecast takes a narrower one for larger.
    took = min(
        place(run.with_runtime(window_size=window), weights, None, options, given, limit=limit).device_bytes
        for window in (limit.window, wanted.window)
    )
    return Shortage(limit, took, free)


def within_shortage(placed: Callable[[Limit | None], Placement], short: Shortage | None, free: int | None) -> Placement:
    """Returns the placement that `placed` finds without a limit, or within that of an earlier shortage where it is not to be trusted."""
    found = placed(None)
    return found if short is None or short.trusts(found, free) else placed(short.limit)

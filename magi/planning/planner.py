"""Plans for the runs of one transformer, which heed what earlier ones that ran out of memory were left with."""

from dataclasses import dataclass, replace

from ..config import MagiConfig
from ..transformer.inputs import CacheDevice
from ..transformer.model import Transformer
from .footprint import WeightSizes
from .placement import Limit, MemoryOptions, Placement, place


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

    def trusts(self, placement: Placement, reserved: int) -> bool:
        """Returns whether a placement may be tried with the memory that is free now, less what is reserved of it.

        What the run was left with is known to fit, and every byte that has become free since adds to it. What takes as much as
        both together or more may be what ran out already, whatever the forecast says: it was wrong then, too.
        """
        free = placement.run.free
        grown = 0 if free is None or self.free is None else free - reserved - self.free
        return placement.device_bytes < self.took + grown


class Planner:
    """Finds room for the runs of one transformer, and learns from those that ran out of memory.

    The order of a run: `place`, then `begin` when the transformer is laid out so, `left_with` if its window had to become
    smaller. Before the next `place`, `learn` looks at what the run has left.
    """

    def __init__(self, options: MemoryOptions) -> None:
        """Takes what is fixed by hand."""
        self.options = options
        self._shortage: Shortage | None = None
        self._begun: Placement | None = None  # as the transformer was laid out for the run that began last
        self._window: int | None = None  # that this run was left with, where that is known

    def place(
        self,
        run: MagiConfig,
        weights: WeightSizes,
        free: int | None,
        prefix_frames: int,
        *,
        free_host: int | None,
        allow_smaller_window: bool = False,
        other_model_bytes: int = 0,
        reserved: int = 0,
    ) -> Placement:
        """Returns what goes where in a run; arguments and errors are those of `placement.place`."""

        def within(limit: Limit | None) -> Placement:
            return place(
                run,
                weights,
                free,
                self.options,
                prefix_frames,
                free_host=free_host,
                allow_smaller_window=allow_smaller_window,
                other_model_bytes=other_model_bytes,
                reserved=reserved,
                limit=limit,
            )

        found, short = within(None), self._shortage
        return found if short is None or short.trusts(found, reserved) else within(short.limit)

    def begin(self, placement: Placement) -> None:
        """Notes that the transformer is laid out so, for the placement's run."""
        self._begun, self._window = placement, None

    def left_with(self, window: int) -> None:
        """Notes that the run had to denoise fewer chunks at a time, so many in the end."""
        self._window = window

    def learn(self, model: Transformer, weights: WeightSizes) -> None:
        """Notes a shortage if the run has left the transformer, which gives way where memory runs out, with less than planned."""
        if self._begun is not None:
            self._shortage = _shortage_of(model, self._begun, self._window, weights, self.options) or self._shortage

    def end(self) -> None:
        """Notes that the transformer is gone; what was learned stays."""
        self._begun = None


def _shortage_of(
    model: Transformer, begun: Placement, window: int | None, weights: WeightSizes, options: MemoryOptions
) -> Shortage | None:
    """Returns what a transformer teaches after a run; None: it is laid out as it was when that began.

    Args:
        model: as the run has left it.
        begun: how it was laid out before.
        window: chunks that were denoised at a time in the end; None: as many as planned.
        weights: of the model.
        options: what is fixed by hand.
    """
    caches: dict[bool, CacheDevice] = {True: "host", False: begun.cache}
    limit = Limit(
        min(len(model.blocks.on_device), len(begun.on_device)),
        min(model.token_block, begun.token_block),
        caches[model.cache_device == "host"],
        min(window or begun.window, begun.window),
    )
    if limit == Limit(len(begun.on_device), begun.token_block, begun.cache, begun.window):
        return None
    # With the wider window it ran out: it had room for less, even where the forecast takes a narrower one for larger.
    run, options = begun.run, replace(options, token_block=limit.token_block)
    took = min(
        place(
            run.config.with_runtime(window_size=window), weights, None, options, run.prefix_frames, limit=limit
        ).device_bytes
        for window in (limit.window, begun.window)
    )
    return Shortage(limit, took, run.free)

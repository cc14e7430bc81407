"""How far the pipeline's work is: the phases that it reports."""

from collections.abc import Callable
from dataclasses import dataclass

from ..sampling.state import ProgressEvent
from ..system.progress import OnProgress


@dataclass(frozen=True)
class Phase:
    """How far one phase of the work is.

    Attributes:
        name: "text", "prefix", "load", "sample" or "decode".
        done: encoder blocks, tiles, tensors, layers or forward iterations, the running iteration by its fraction.
        total: of these, as far as they are known: it may grow.
        sampled: after each forward iteration, its latents and velocity, for previews.
    """

    name: str
    done: float
    total: float
    sampled: ProgressEvent | None = None


OnPhase = Callable[[Phase], None]
"""Called with each step of progress. What it raises ends the work."""


def phase_callback(on_phase: OnPhase | None, name: str) -> OnProgress | None:
    """Returns a callback (done, total) that passes a phase's progress to `on_phase`; None where that is None."""
    if on_phase is None:
        return None
    return lambda done, total: on_phase(Phase(name, done, total))

"""What the pipeline reports of its work."""

from collections.abc import Callable
from dataclasses import dataclass

from ..sampling.state import ProgressEvent
from ..system.progress import OnProgress


@dataclass(frozen=True)
class Stage:
    """How far a part of the work is. `sampled` is there after each forward iteration, for previews."""

    name: str  # "text", "prefix", "load", "sample" or "decode"
    done: float
    total: float
    sampled: ProgressEvent | None = None


StageProgress = Callable[[Stage], None]


def counted(progress: StageProgress | None, name: str) -> OnProgress | None:
    """A callback (done, total) that reports a stage; None where nobody listens."""
    if progress is None:
        return None
    return lambda done, total: progress(Stage(name, done, total))

"""What a user sees of a remote video while it is made."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

# Parts of the bar at which phases begin. Nobody can tell how long a task takes: its part fills ever more slowly.
_STARTS = {"check": 0.0, "upload": 0.01, "submit": 0.04, "wait": 0.05, "download": 0.9, "read": 0.95, "done": 1.0}
_TYPICAL_SECONDS = 150.0


@dataclass(frozen=True)
class Progress:
    """Where a video stands: `part` of the whole, 0 to 1, and a line of text."""

    part: float
    text: str


@dataclass
class Watch:
    """Reports where the work stands; what the caller's function raises ends the work."""

    report: Callable[[Progress], None]
    _phase: str = "check"
    _doing: str = "waiting for another run of the same request"
    _began: float = field(default_factory=time.monotonic)
    _done: float | None = None
    _part: float = 0.0

    def phase(self, name: str, doing: str) -> None:
        """Another phase, or another thing done in it: its clock begins anew."""
        self._phase, self._doing, self._began, self._done = name, doing, time.monotonic(), None
        self.alive()

    def alive(self, done: float | None = None) -> None:
        """Still at it, with `done` (0 to 1) of the phase where that is known."""
        self._done = self._done if done is None else min(done, 1.0)  # a header may promise less than there is
        seconds = time.monotonic() - self._began
        names = list(_STARTS)
        start, end = _STARTS[self._phase], _STARTS[names[min(names.index(self._phase) + 1, len(names) - 1)]]
        within = 1 - math.exp(-seconds / _TYPICAL_SECONDS) if self._done is None else self._done
        known = f"{seconds:.0f} s" if self._done is None else f"{self._done:.0%}"
        self._part = max(self._part, start + (end - start) * within)  # what is tried again does not go back
        self.report(Progress(self._part, f"{self._doing}, {known}"))

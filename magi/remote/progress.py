"""Progress of a remote video, for the user."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

# Parts of the bar at which phases begin. How long a task takes is unknown: its part of the bar fills ever more slowly.
_STARTS = {"check": 0.0, "upload": 0.01, "submit": 0.04, "wait": 0.05, "download": 0.9, "read": 0.95, "done": 1.0}
_TYPICAL_SECONDS = 150.0


@dataclass(frozen=True)
class RemoteProgress:
    """Progress of a video: `part` of the whole, 0 to 1, and a line of text."""

    part: float
    text: str


@dataclass
class Watch:
    """Calls `on_progress` with the phase and how far it is. What `on_progress` raises ends the work."""

    on_progress: Callable[[RemoteProgress], None]
    _phase: str = "check"
    _doing: str = "waiting for another run of the same request"
    _began: float = field(default_factory=time.monotonic)
    _done: float | None = None
    _part: float = 0.0

    def phase(self, name: str, doing: str) -> None:
        """Enters a phase, or another activity within it, and restarts its clock."""
        self._phase, self._doing, self._began, self._done = name, doing, time.monotonic(), None
        self.update()

    def update(self, done: float | None = None) -> None:
        """Calls `on_progress`, with `done` (0 to 1) of the phase where that is known."""
        self._done = self._done if done is None else min(done, 1.0)  # a header may promise less than there is
        seconds = time.monotonic() - self._began
        names = list(_STARTS)
        start, end = _STARTS[self._phase], _STARTS[names[min(names.index(self._phase) + 1, len(names) - 1)]]
        within = 1 - math.exp(-seconds / _TYPICAL_SECONDS) if self._done is None else self._done
        known = f"{seconds:.0f} s" if self._done is None else f"{self._done:.0%}"
        self._part = max(self._part, start + (end - start) * within)  # a retry does not move the bar back
        self.on_progress(RemoteProgress(self._part, f"{self._doing}, {known}"))

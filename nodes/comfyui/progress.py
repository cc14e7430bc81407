"""A node's bar, line of text and preview over the phases of its work; every report asks for a cancel."""

import time
from collections.abc import Callable, Mapping

import torch

from . import host

_STEPS = 1000
_SECONDS = 0.2  # between two lines of text


class NodeProgress:
    """Reports of one run of a node."""

    def __init__(self, node_id: str | None, **shares: float) -> None:
        """`shares`: the phases in the order of the work, each with its part of the bar."""
        total = sum(shares.values())
        self._node_id = node_id
        self._shares: Mapping[str, float] = {name: share / total for name, share in shares.items()}
        self._at = 0
        self._said = -_SECONDS

    def phase(self, name: str, text: str = "") -> Callable[[float, float], None]:
        """A callback (done, total) for a phase; `text` is shown with the part that is done."""

        def report(done: float, total: float) -> None:
            self.at(name, done / max(total, 1e-9))
            if text:
                self.say(f"{text}: {done / max(total, 1e-9):.0%}")

        return report

    def at(self, name: str, part: float, picture: torch.Tensor | None = None) -> None:
        """Moves the bar to `part` (0 .. 1) of a phase, never back; raises if the user has cancelled."""
        host.check_interrupt()
        names = list(self._shares)
        before = sum(self._shares[other] for other in names[: names.index(name)])
        at = int(_STEPS * (before + self._shares[name] * min(part, 1)) + 1e-6)
        if at > self._at or picture is not None:
            self._at = max(at, self._at)
            host.show_progress(self._node_id, self._at, _STEPS, picture)

    def say(self, text: str, at_once: bool = False) -> None:
        """Writes a line under the node; those that come too fast are left out."""
        now = time.monotonic()
        if at_once or now - self._said >= _SECONDS:
            self._said = now
            host.show_text(self._node_id, text)


class Clock:
    """How long a phase that can be measured will still take."""

    def __init__(self) -> None:
        self._start: tuple[float, float] | None = None

    def left(self, part: float) -> str:
        """ ", 01:23 left" once there is something to judge by, else ""."""
        now = time.monotonic()
        if self._start is None:
            self._start = (now, part)
        began, first = self._start
        if part - first < 0.005 or now - began < 1:
            return ""
        seconds = round((now - began) / (part - first) * (1 - part))
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f", {f'{hours}:' if hours else ''}{minutes:02}:{seconds:02} left"

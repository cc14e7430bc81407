"""A node's bar, line of text and preview over the phases of its work; every move of the bar checks for a cancel."""

import time
from collections.abc import Callable, Mapping

import torch

from . import host

_STEPS = 1000
_TEXT_SECONDS = 0.2  # between two lines of text


class NodeProgress:
    """What a user sees of one run of a node."""

    def __init__(self, node_id: str | None, **shares: float) -> None:
        """Takes the phases in the order of the work, each with its share of the bar."""
        total = sum(shares.values())
        self._node_id = node_id
        self._shares: Mapping[str, float] = {name: share / total for name, share in shares.items()}
        self._position = 0  # of the bar, up to _STEPS
        self._text_shown = -_TEXT_SECONDS  # time.monotonic()

    def phase(self, name: str, text: str = "") -> Callable[[float, float], None]:
        """Returns a callback (done, total) that moves the bar in a phase, and shows `text` with the percentage."""

        def on_progress(done: float, total: float) -> None:
            self.move(name, done / max(total, 1e-9))
            if text:
                self.show_text(f"{text}: {done / max(total, 1e-9):.0%}")

        return on_progress

    def move(self, name: str, part: float, picture: torch.Tensor | None = None) -> None:
        """Moves the bar to `part`, 0 to 1, of a phase, never back; shows `picture`, uint8 (H, W, 3), as the preview.

        Raises:
            Interrupted: the user has cancelled.
        """
        host.check_interrupt()
        names = list(self._shares)
        before = sum(self._shares[other] for other in names[: names.index(name)])
        position = int(_STEPS * (before + self._shares[name] * min(part, 1)) + 1e-6)
        if position > self._position or picture is not None:
            self._position = max(position, self._position)
            host.show_progress(self._node_id, self._position, _STEPS, picture)

    def show_text(self, text: str) -> None:
        """Shows a line under the node; at most five per second, the others are left out."""
        now = time.monotonic()
        if now - self._text_shown >= _TEXT_SECONDS:
            self.show_now(text)

    def show_now(self, text: str) -> dict[str, list[str]]:
        """Shows a line under the node at once, and returns it as the UI output of a node that ends with it."""
        self._text_shown = time.monotonic()
        return host.show_text(self._node_id, text)


class Clock:
    """Estimates the time that a phase will still take."""

    def __init__(self) -> None:
        self._start: tuple[float, float] | None = None  # time and part at the first call

    def left(self, part: float) -> str:
        """Returns ", 01:23 left" for a phase of which `part`, 0 to 1, is done; "" while it is too early to tell."""
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

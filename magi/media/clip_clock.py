"""The times of a clip's frames: files lie about them, and readers need times that go on."""

from fractions import Fraction

# Seconds that one frame may stay. A recording of a still screen has such pauses; beyond it a clock has jumped.
LONGEST = Fraction(600)

# Seconds that a time may step back: frames out of order. Beyond it a clock was set anew, as where clips were joined.
_STEP_BACK = Fraction(1)

# Frames of one time that a coarse clock may give; a clock that gives more has stopped.
_SAME = 8

_USUAL = Fraction(1, 24)


class ClipClock:
    """Turns the times in a file into times that never go back and never stand still for longer than `LONGEST`.

    Attributes:
        gap: seconds from a frame to the next where the file does not say.
        left_out: seconds in all by which the file's clock has jumped ahead, which no frame is shown for.
    """

    def __init__(self, fps: Fraction | None) -> None:
        self._steady = fps is not None and 1 / fps <= LONGEST
        self.gap: Fraction = 1 / fps if fps is not None and self._steady else _USUAL
        self.left_out = Fraction(0)
        self._offset = Fraction(0)  # from the file's clock to ours
        self._newest: Fraction | None = None  # on the file's clock, since it was last set
        self._moved = False  # whether it goes at all
        self._still = 0  # frames since it did
        self._last: Fraction | None = None  # on ours

    def time(self, stamp: Fraction | None) -> Fraction:
        """Returns when the next frame begins, in seconds, by its time in the file, which may have none.

        A frame whose time stands still or steps back follows the one before. As soon as the file's clock goes on it is
        believed again, and frames that it has no time for take none: so the clip does not become longer. A clock that
        never moves is none.
        """
        time = self._next(stamp)
        if self._last is not None and not self._steady and time > self._last:
            self.gap = time - self._last
        self._last = max(Fraction(0), time)
        return self._last

    def _next(self, stamp: Fraction | None) -> Fraction:
        last, newest = self._last, self._newest
        if stamp is None:
            return Fraction(0) if last is None else last + self.gap
        if last is None or newest is None:
            self._newest = stamp
            return stamp if last is None else max(last + self.gap, stamp)
        if not -_STEP_BACK <= stamp - newest <= LONGEST:
            time = last + self.gap
            self.left_out += max(Fraction(0), stamp + self._offset - time)
            self._offset, self._newest = time - stamp, stamp
            return time
        time = max(newest, stamp) + self._offset
        if stamp > newest:
            self._newest, self._moved, self._still = stamp, True, 0
            return max(last, time)
        self._still += 1
        waits = self._moved and last > time and self._still <= _SAME
        return last if waits else last + self.gap

    def duration(self, seconds: Fraction) -> Fraction:
        """Returns how long a frame stays by the file, or `gap` where that cannot be."""
        return seconds if 0 < seconds <= LONGEST else self.gap

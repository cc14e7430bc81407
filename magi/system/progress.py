"""The callback by which long work reports its progress, and by which its caller can end it."""

from collections.abc import Callable

OnProgress = Callable[[int, int], None]
"""Called with (done, total), both in the unit that the function names; total is 0 where nobody knows it. What it raises
ends the work."""

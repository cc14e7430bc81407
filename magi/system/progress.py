"""The callback by which long work tells how far it is, and is ended by its caller."""

from collections.abc import Callable

OnProgress = Callable[[int, int], None]
"""Called with (done, total), both in the unit that the function names; total is 0 where nobody knows it. What it raises
ends the work."""

"""Interlaced frames made progressive, by FFmpeg's own filters."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from fractions import Fraction
from typing import Any

# In the order of preference; builds of FFmpeg may lack them.
_FILTERS = ("bwdif", "yadif")


def can_deinterlace() -> bool:
    """Returns whether this PyAV has a filter for it."""
    import av

    return any(name in av.filter.filters_available for name in _FILTERS)


def progressive(frames: Iterable[Any], on_interlaced: Callable[[], None]) -> Generator[Any, None, None]:
    """Yields PyAV's frames as they come, from the first interlaced one on through a filter, one for one.

    `on_interlaced` is called when that one comes, also where there is no filter and frames stay as they are. Frames
    that are not marked as interlaced are the same behind it, and all keep their times and colours.
    """
    graph: _Graph | None = None
    for frame in frames:
        if graph is not None and not graph.fits(frame):  # sizes may change within a stream
            yield from graph.rest()
            graph = None
        if graph is None and frame.interlaced_frame:
            on_interlaced()
            graph = _Graph(frame) if can_deinterlace() else None
        if graph is None:
            yield frame
        else:
            yield from graph.frames(frame)
    if graph is not None:
        yield from graph.rest()


class _Graph:
    """A filter that gives back a frame for each, one later: it looks at both neighbours."""

    def __init__(self, frame: Any) -> None:
        import av

        self._kind = _kind(frame)
        self._waiting: deque[Any] = deque()
        self._graph: Any = av.filter.Graph()
        name = next(name for name in _FILTERS if name in av.filter.filters_available)
        # A frame's time passes by the filter, whose clock can be any.
        source = self._graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format.name, time_base=Fraction(1, 1000)
        )
        deinterlace, sink = self._graph.add(name, "mode=send_frame:deint=interlaced"), self._graph.add("buffersink")
        source.link_to(deinterlace)
        deinterlace.link_to(sink)
        self._graph.configure()

    def fits(self, frame: Any) -> bool:
        """Returns whether a frame is of the kind that the filter was made for."""
        return _kind(frame) == self._kind

    def frames(self, frame: Any) -> Generator[Any, None, None]:
        """Takes a frame and yields those that are ready."""
        self._waiting.append(frame)
        self._graph.push(frame)
        yield from self._ready()

    def rest(self) -> Generator[Any, None, None]:
        """Yields what is still in the filter."""
        self._graph.push(None)
        yield from self._ready()

    def _ready(self) -> Generator[Any, None, None]:
        while self._waiting:
            try:
                made = self._graph.pull()
            except (BlockingIOError, EOFError):
                return
            given = self._waiting.popleft()
            made.pts, made.time_base = given.dts if given.pts is None else given.pts, given.time_base
            made.colorspace, made.color_range = given.colorspace, given.color_range
            if hasattr(given, "duration"):  # PyAV 14
                made.duration = given.duration
            yield made


def _kind(frame: Any) -> tuple[Any, ...]:
    return frame.width, frame.height, frame.format.name

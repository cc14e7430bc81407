"""Device memory through which runs of host bytes pass, each there before it is needed and gone when it has been used."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .copy_engine import Bus, Mark
from .packing import aligned
from .prefetch import Ahead, Session


@dataclass(frozen=True)
class Load:
    """What is to lie in one run of device memory.

    Attributes:
        parts: (bytes,) uint8 on the host each, put one behind the other.
        sent: told the mark from which on the parts may be written to.
    """

    parts: tuple[torch.Tensor, ...]
    sent: Callable[[Mark], None] | None = None


@dataclass(eq=False)
class _Run:
    """A part of the ring that was taken; once it is `free`, `done` marks its last use."""

    start: int
    end: int
    free: bool = False
    done: Mark = None


class _Ring:
    """Which bytes are taken. Runs are contiguous, taken and freed in the same order."""

    def __init__(self, nbytes: int, slots: int, after: Mark) -> None:
        """`slots` is the most runs taken at a time, `after` marks the last use of what is not taken."""
        self._nbytes = nbytes
        self._slots = slots
        self._after = after
        self._runs: deque[_Run] = deque()  # oldest first
        self._head = 0

    def take(self, size: int) -> tuple[_Run, Mark] | None:
        """A run, and when it may be written to; None as long as there is no room."""
        if sum(not run.free for run in self._runs) >= self._slots:
            return None
        start = self._head if self._head + size <= self._nbytes else 0
        while any(run.start < start + size and start < run.end for run in self._runs):
            if not self._runs[0].free:
                return None
            self._after = self._runs.popleft().done
        self._head = start + size
        self._runs.append(_Run(start, self._head))
        return self._runs[-1], self._after

    def free(self, run: _Run, done: Mark) -> None:
        """Gives a run back."""
        run.free, run.done = True, done

    def free_all(self, mark: Callable[[], Mark]) -> None:
        """Gives back what an iteration that was given up has left."""
        left = [run for run in self._runs if not run.free]
        done = mark() if left else None
        for run in left:
            self.free(run, done)


class Feed:
    """A ring of device memory, allocated once. One `Delivery` at a time goes through it."""

    def __init__(self, bus: Bus, nbytes: int, slots: int) -> None:
        """Allocates the ring.

        Args:
            bus: leads to the device.
            nbytes: of the ring; the largest load must fit.
            slots: loads on the device at a time at most, the one in use included.
        """
        self.bus = bus
        with torch.inference_mode(False):  # else threads could not write to it
            self.data = torch.empty(nbytes, dtype=torch.uint8, device=bus.device)
        # The memory may have been another's, whose work is still going on.
        self.ring = _Ring(nbytes, slots, bus.mark())
        self._session = Session()

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return self.data.nbytes

    def send(self, loads: Callable[[Session], Iterator[Load]]) -> "Delivery":
        """Begins to bring what `loads` gives, in that order, and ends what was sent before. The result must be closed."""
        self.close()
        self.ring.free_all(self.bus.mark)
        self._session = Session()
        return Delivery(self, loads(self._session), self._session)

    def close(self) -> None:
        """Ends the current delivery, if there is one: its threads are gone after that."""
        self._session.close()


class Delivery(Iterator[torch.Tensor]):
    """What arrives on the device, in order. To be used, and closed, in one thread."""

    def __init__(self, feed: Feed, loads: Iterator[Load], session: Session) -> None:
        self._feed, self._session = feed, session
        self._in_use: _Run | None = None
        moves = self._moves(loads)
        self._arriving = Ahead(moves, session, "magi-copy") if feed.bus.overlaps else moves

    def __next__(self) -> torch.Tensor:
        """The next load's bytes, (bytes,) uint8, for compute work that is given until `release`."""
        self._session.check()
        self._in_use, arrived = next(self._arriving)
        self._feed.bus.require(arrived)
        return self._feed.data[self._in_use.start : self._in_use.end]

    def release(self) -> None:
        """No work that is given from now on uses what came last."""
        assert self._in_use is not None  # noqa: S101 (called after `next`)
        with self._session.changing():
            self._feed.ring.free(self._in_use, self._feed.bus.mark())

    def close(self) -> None:
        """Ends it, whatever is still on its way."""
        self._session.close()

    def _moves(self, loads: Iterator[Load]) -> Iterator[tuple[_Run, Mark]]:
        bus, ring = self._feed.bus, self._feed.ring
        for load in loads:
            size = aligned(sum(part.nbytes for part in load.parts))
            run, after = self._session.wait(lambda size=size: ring.take(size))  # type: ignore[misc]
            start, arrived = run.start, None
            for part in load.parts:
                arrived = bus.upload(part, self._feed.data[start : start + part.nbytes], after)
                start += part.nbytes
            if load.sent:
                load.sent(arrived)
            yield run, arrived

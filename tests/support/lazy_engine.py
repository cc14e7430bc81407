"""Stands in for a device that works beside the host: copies and computing in two queues, each carried out late."""

import random
import threading
from collections import deque
from typing import Any, NamedTuple

import torch

from magi.offload.kv_cache import KVCache

POISON = 0xAB


class Upload(NamedTuple):
    storage: int
    start: int
    nbytes: int
    source_storage: int


class LazyBus:
    """A `Bus` to host memory. What it is given is carried out at random moments, in the order that marks and queues demand.

    `eager` is for code that computes at once instead of through `compute`: what is required has then arrived, and until then
    the memory it goes to holds nonsense.
    """

    device = torch.device("cpu")

    def __init__(self, seed: int = 0, eager: bool = False, overlaps: bool = True):
        self.overlaps = overlaps
        self.eager = eager
        self.uploads: list[Upload] = []
        self.fail_at: int | None = None  # the upload that raises
        self._random = random.Random(seed)
        self._lock = threading.RLock()
        self._queues: dict[str, deque] = {"copies": deque(), "compute": deque()}
        self._given = dict.fromkeys(self._queues, 0)
        self._done = dict.fromkeys(self._queues, 0)

    def upload(self, source, target, after=None):
        assert source.dtype == target.dtype == torch.uint8
        assert source.dim() == target.dim() == 1
        assert not target.is_inference(), "threads could not write there"
        with self._lock:
            if len(self.uploads) == self.fail_at:
                raise RuntimeError("the bus is broken")
            start = target.storage_offset()
            places = (x.untyped_storage().data_ptr() for x in (target, source))
            storage, origin = places
            self.uploads.append(Upload(storage, start, target.nbytes, origin))
            if self.eager:
                assert self._is_reached(after), "everything that was given has been computed"
                target.fill_(POISON)
            return self._give("copies", after, lambda: target.copy_(source))

    def mark(self):
        with self._lock:
            self._step()
            return "compute", self._given["compute"]

    def require(self, mark):
        with self._lock:
            self._give("compute", mark, lambda: None)
            while self.eager and self._queues["compute"]:
                self._step(must=True)

    def reached(self, mark):
        with self._lock:
            self._step(most=4)
            return self._is_reached(mark)

    def compute(self, work):
        """Gives the device something to do, now or later."""
        with self._lock:
            self._give("compute", None, work)

    def drain(self):
        """Waits for everything."""
        with self._lock:
            while any(self._queues.values()):
                self._step(must=True)

    def _give(self, queue, needs, work):
        self._queues[queue].append((needs, work))
        self._given[queue] += 1
        mark = queue, self._given[queue]
        self._step()
        return mark

    def _is_reached(self, mark):
        return mark is None or self._done[mark[0]] >= mark[1]

    def _step(self, most=1, must=False):
        """Carries out at most so many of the things that may be next, mostly none so that work piles up; or just one."""
        for _ in range(1 if must else self._random.choice((0, 0, 0, most))):
            ready = [name for name, queue in self._queues.items() if queue and self._is_reached(queue[0][0])]
            if not ready:
                assert not must, "what is waited for does not come"
                return
            name = self._random.choice(ready)
            self._queues[name].popleft()[1]()
            self._done[name] += 1


def cache_with(**options: Any) -> type[KVCache]:
    """`KVCache` whose caches are all made with these options, for instance a bus to a pretended device."""

    class Cache(KVCache):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named | options)

    return Cache

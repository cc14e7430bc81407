"""Simulates a device that works asynchronously: a copy queue and a compute queue, whose work is executed late."""

import random
import sys
import threading
from collections import deque
from typing import Any, NamedTuple

import torch

from magi.offload.kv_cache import KVCache

POISON = 0xAB


class RecordedUpload(NamedTuple):
    storage: int  # address
    start: int
    nbytes: int
    source_storage: int  # address


class LazyCopyEngine:
    """A `CopyEngine` to host memory. Executes submitted work at random moments, in an order allowed by its events.

    `eager` is for code that computes directly instead of through `compute`: `wait_event` then executes the compute
    queue, and `upload` poisons the target until the copy has been executed.
    """

    device = torch.device("cpu")

    def __init__(self, seed: int = 0, eager: bool = False, overlaps: bool = True):
        self.overlaps = overlaps
        self.eager = eager
        self.uploads: list[RecordedUpload] = []
        self.fail_at: int | None = None  # index of the upload that raises
        self._random = random.Random(seed)
        self._lock = threading.RLock()
        self._queues: dict[str, deque] = {"copy": deque(), "compute": deque()}
        self._submitted = dict.fromkeys(self._queues, 0)
        self._completed = dict.fromkeys(self._queues, 0)

    def upload(self, source, target, after=None):
        assert source.dtype == target.dtype == torch.uint8
        assert source.dim() == target.dim() == 1
        assert not target.is_inference(), "threads cannot write to inference tensors"
        with self._lock:
            if len(self.uploads) == self.fail_at:
                raise RuntimeError("the copy engine is broken")
            storage, source_storage = (x.untyped_storage().data_ptr() for x in (target, source))
            self.uploads.append(RecordedUpload(storage, target.storage_offset(), target.nbytes, source_storage))
            if self.eager:
                assert self._has_completed(after), "all submitted compute work has been executed"
                target.fill_(POISON)
            return self._submit("copy", after, lambda: target.copy_(source))

    def record_event(self):
        with self._lock:
            self._step()
            return "compute", self._submitted["compute"]

    def wait_event(self, event):
        with self._lock:
            self._submit("compute", event, lambda: None)
            while self.eager and self._queues["compute"]:
                self._step(must=True)

    def query(self, event):
        with self._lock:
            self._step(most=4)
            return self._has_completed(event)

    def compute(self, work):
        """Submits compute work, which is executed now or later."""
        with self._lock:
            self._submit("compute", None, work)

    def synchronize(self):
        """Executes all submitted work."""
        with self._lock:
            while any(self._queues.values()):
                self._step(must=True)

    def _submit(self, queue, after, work):
        self._queues[queue].append((after, work))
        self._submitted[queue] += 1
        event = queue, self._submitted[queue]
        self._step()
        return event

    def _has_completed(self, event):
        return event is None or self._completed[event[0]] >= event[1]

    def _step(self, most=1, must=False):
        """Executes up to `most` operations that are ready: often none, so that work queues up; one if `must`."""
        for _ in range(1 if must else self._random.choice((0, 0, 0, most))):
            ready = [name for name, queue in self._queues.items() if queue and self._has_completed(queue[0][0])]
            if not ready:
                assert not must, "deadlock: an event is waited for that never completes"
                return
            name = self._random.choice(ready)
            self._queues[name].popleft()[1]()
            self._completed[name] += 1


class Pins:
    """Stands in for `pin_memory`, which needs a GPU. Refuses all calls after the first `refuse_at`."""

    def __init__(self, refuse_at: int = sys.maxsize):
        self.refuse_at = refuse_at
        self.asked = 0
        self.pinned: dict[int, int] = {}  # address -> bytes

    def __call__(self, data):
        self.asked += 1
        if self.asked > self.refuse_at:
            raise RuntimeError("no more")
        address = data.data_ptr()
        self.pinned[address] = data.nbytes
        return lambda: self.pinned.pop(address)


def cache_with(**options: Any) -> type[KVCache]:
    """Returns a `KVCache` class that always uses these options, for instance the copy engine of a simulated device."""

    class Cache(KVCache):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named | options)

    return Cache

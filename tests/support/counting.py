"""Counting what tensors take."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made under it take at once."""

    def __init__(self):
        super().__init__()
        self.peak = self._now = 0
        self._sizes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._note((args, kwargs), counted=False)  # made before, like weights: their views are nothing new
        result = function(*args, **(kwargs or {}))
        self._note(result, counted=True)
        return result

    def _note(self, tensors, counted):
        for storage in {t.untyped_storage() for t in tree_leaves(tensors) if isinstance(t, torch.Tensor)}:
            if storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes() * counted
                self._now += storage.nbytes() * counted
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, key):
        self._now -= self._sizes.pop(key)

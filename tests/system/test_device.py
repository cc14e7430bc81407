import weakref
from contextlib import contextmanager

import pytest
import torch

from magi.errors import MagiError
from magi.system import device
from magi.system.device import empty_cache, free_memory, pick_device, retry_with_less, synchronize


@pytest.fixture
def have(monkeypatch):
    """(*kinds) -> only these accelerators are there."""
    return lambda *kinds: monkeypatch.setattr(device, "_is_available", lambda kind: kind in kinds)


@pytest.mark.parametrize(
    ("there", "picked"), [(("cuda", "xpu", "mps"), "cuda"), (("xpu", "mps"), "xpu"), (("mps",), "mps"), ((), "cpu")]
)
def test_the_best_there_is(there, picked, have):
    have(*there)
    assert pick_device() == torch.device(picked)


def test_a_named_device(have, monkeypatch):
    have("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device(torch.device("cuda:1")) == torch.device("cuda:1")
    with pytest.raises(MagiError, match="no device 'cuda:2': torch sees 2"):
        pick_device("cuda:2")


def test_devices_that_are_not_there(have):
    have()
    for name in ("cuda", "cuda:1", "mps", "xpu"):
        with pytest.raises(MagiError, match=f"'{name}' is not available.*Use cpu"):
            pick_device(name)
    with pytest.raises(MagiError, match=r"no device 'gpu'\. Use cuda"):
        pick_device("gpu")


def test_free_memory_is_the_accelerators_and_the_host_has_none_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda where: (1000 + where.index, 5000))
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 900)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 300)
    assert free_memory(torch.device("cuda:1")) == 1001
    assert free_memory(torch.device("mps")) == 600
    assert free_memory(torch.device("cpu")) is None


class Cards:
    """A module of torch's for cards of a kind, of which the first is the current one; it writes down which one calls are for."""

    def __init__(self):
        self.current, self.waited, self.emptied = 0, [], []

    @contextmanager
    def device(self, device):
        before, self.current = self.current, device.index
        yield
        self.current = before

    def synchronize(self, device=None):
        self.waited.append(self.current if device is None else device.index)

    def empty_cache(self):
        self.emptied.append(self.current)


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_given_card_is_meant_and_not_the_current_one(kind, index, monkeypatch):
    cards = Cards()
    monkeypatch.setattr(torch, kind, cards)
    synchronize(torch.device(kind, index))
    empty_cache(torch.device(kind, index))
    assert (cards.waited, cards.emptied, cards.current) == ([index], [index], 0)


def test_metal_has_one_device_and_takes_none(monkeypatch):
    done = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: done.append("waited"))
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: done.append("emptied"))
    synchronize(torch.device("mps"))
    empty_cache(torch.device("mps"))
    assert done == ["waited", "emptied"]


def test_a_cpu_has_nothing_to_wait_for_or_to_give_back():
    synchronize(torch.device("cpu"))
    empty_cache(torch.device("cpu"))


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("MPS backend out of memory"),
    RuntimeError("DefaultCPUAllocator: not enough memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_work_runs_again_with_less_when_memory_runs_out(error):
    """Nothing of an attempt that failed is alive when the next one starts, or less could not help."""
    attempts: list[weakref.ref] = []
    calls = []

    def work():
        held = torch.zeros(3)
        attempts.append(weakref.ref(held))
        if len(calls) < 3:
            raise error
        return "done"

    def shrink(failed):
        assert failed is error
        assert [ref() for ref in attempts] == [None] * len(attempts)
        calls.append(len(attempts))
        if len(calls) == 1:
            raise error  # it may run out itself

    assert retry_with_less(work, shrink) == "done"
    assert calls == [1, 1, 2]


def test_other_errors_and_the_end_of_all_remedies_are_raised():
    def fails(error):
        def work(*_):
            raise error

        return work

    for error in (RuntimeError("shapes do not match"), ValueError("out of memory"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught:
            retry_with_less(fails(error), lambda _: pytest.fail("memory did not run out"))
        assert caught.value is error
    full, nothing_left = MemoryError(), MagiError("It ran out of memory. Try a smaller size.")
    with pytest.raises(MagiError) as caught:
        retry_with_less(fails(full), fails(nothing_left))
    assert caught.value is nothing_left

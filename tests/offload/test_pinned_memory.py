from contextlib import contextmanager

import pytest
import torch

from magi.offload.pinned_memory import LockedMemory, PinningError, page_lock


class Driver:
    @contextmanager
    def device(self, device):
        before, self.current = self.current, device
        yield
        self.current = before

    def __init__(self, code):
        self.code, self.registered, self.waited_for = code, [], []
        self.current, self.calls = None, []  # the current card, and those that calls were made for

    def cudaHostRegister(self, address, nbytes, flags):
        self.calls.append(self.current)
        self.registered.append((address, nbytes))
        return self.code

    def cudaHostUnregister(self, address):
        self.calls.append(self.current)
        self.registered = [entry for entry in self.registered if entry[0] != address]


@pytest.fixture
def driver(monkeypatch):
    """(code) -> a driver that answers so."""

    def make(code):
        made = Driver(code)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device", made.device)
        monkeypatch.setattr(torch.cuda, "synchronize", made.waited_for.append)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
        return made

    return make


def test_locking_registers_the_memory_until_it_is_undone(driver):
    made, data = driver(0), torch.empty(1000, dtype=torch.uint8)
    unlock = page_lock(data, torch.device("cuda:1"))
    assert made.registered == [(data.data_ptr(), 1000)]
    assert made.waited_for == []
    unlock()
    assert made.registered == []
    assert made.waited_for == [torch.device("cuda:1")], "it may still be copying"
    assert made.calls == [torch.device("cuda:1")] * 2, "another card's copies would not be the fast ones"


def test_memory_is_locked_for_cuda_and_rocm_as_long_as_it_is_needed(driver):
    made = driver(0)
    memory = LockedMemory(torch.device("cuda"))
    data = [memory.take(100), memory.take_or_else(200)]
    assert made.registered == [(data[0].data_ptr(), 100), (data[1].data_ptr(), 200)]
    del memory
    assert made.registered == []


@pytest.mark.parametrize("device", ["xpu", "mps", "cpu"])
def test_other_devices_lock_none(device, driver):
    made = driver(0)
    memory = LockedMemory(torch.device(device))
    assert not memory.possible
    with pytest.raises(PinningError, match="locks no host memory"):
        memory.take(100)
    assert memory.take_or_else(100).shape == (100,)
    assert made.registered == []


def test_locked_memory_that_is_not_to_be_had(driver, monkeypatch):
    driver(2)
    monkeypatch.setattr(torch, "ones", lambda *a, **k: torch.empty(1))
    memory = LockedMemory(torch.device("cuda"))
    assert memory.possible
    with pytest.raises(PinningError, match="error 2"):
        memory.take(100)
    assert memory.take_or_else(100).shape == (100,)


def test_a_driver_that_refuses(driver, monkeypatch):
    driver(2)
    monkeypatch.setattr(torch, "ones", lambda *a, **k: torch.empty(1))
    with pytest.raises(RuntimeError, match=r"the driver refused 0\.0 GB more, error 2"):
        page_lock(torch.empty(1000, dtype=torch.uint8))


def test_no_device_to_lock_memory_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="only CUDA and ROCm"):
        page_lock(torch.empty(8, dtype=torch.uint8))

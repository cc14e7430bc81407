from contextlib import contextmanager

import pytest
import torch

from magi.offload.pinned_memory import PinnedMemory, PinningError, pin_memory


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
    """Returns (code) -> a driver whose registration returns that code."""

    def make(code):
        made = Driver(code)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device", made.device)
        monkeypatch.setattr(torch.cuda, "synchronize", made.waited_for.append)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
        return made

    return make


def test_pin_memory_registers_the_memory_until_it_is_unpinned(driver):
    made, data = driver(0), torch.empty(1000, dtype=torch.uint8)
    unpin = pin_memory(data, torch.device("cuda:1"))
    assert made.registered == [(data.data_ptr(), 1000)]
    assert made.waited_for == []
    unpin()
    assert made.registered == []
    assert made.waited_for == [torch.device("cuda:1")], "a copy may still be running"
    assert made.calls == [torch.device("cuda:1")] * 2, "another card's copies would not be the fast ones"


def test_pinned_memory_is_registered_for_its_lifetime_on_cuda_and_rocm(driver):
    made = driver(0)
    memory = PinnedMemory(torch.device("cuda"))
    data = [memory.allocate(100), memory.allocate_or_pageable(200)]
    assert made.registered == [(data[0].data_ptr(), 100), (data[1].data_ptr(), 200)]
    del memory
    assert made.registered == []


@pytest.mark.parametrize("device", ["xpu", "mps", "cpu"])
def test_other_devices_support_no_pinned_memory(device, driver):
    made = driver(0)
    memory = PinnedMemory(torch.device(device))
    assert not memory.supported
    with pytest.raises(PinningError, match="cannot be page-locked for this device"):
        memory.allocate(100)
    assert memory.allocate_or_pageable(100).shape == (100,)
    assert made.registered == []


def test_pinned_memory_falls_back_to_pageable_memory(driver, monkeypatch):
    driver(2)
    monkeypatch.setattr(torch, "ones", lambda *a, **k: torch.empty(1))
    memory = PinnedMemory(torch.device("cuda"))
    assert memory.supported
    with pytest.raises(PinningError, match="error 2"):
        memory.allocate(100)
    assert memory.allocate_or_pageable(100).shape == (100,)


def test_pin_memory_raises_if_the_driver_refuses(driver, monkeypatch):
    driver(2)
    monkeypatch.setattr(torch, "ones", lambda *a, **k: torch.empty(1))
    with pytest.raises(RuntimeError, match=r"the driver refused to page-lock 0\.0 GB more, error 2"):
        pin_memory(torch.empty(1000, dtype=torch.uint8))


def test_pin_memory_raises_without_a_cuda_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="only CUDA and ROCm"):
        pin_memory(torch.empty(8, dtype=torch.uint8))

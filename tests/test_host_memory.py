import sys
import types

import pytest
import torch

from magi.streaming import host_memory
from magi.streaming.host_memory import LockedMemory, PinningError, free_host_memory, page_lock


class Driver:
    def __init__(self, code):
        self.code, self.registered, self.waited_for = code, [], []

    def cudaHostRegister(self, address, nbytes, flags):
        self.registered.append((address, nbytes))
        return self.code

    def cudaHostUnregister(self, address):
        self.registered = [entry for entry in self.registered if entry[0] != address]


@pytest.fixture
def driver(monkeypatch):
    """(code) -> a driver that answers so."""

    def make(code):
        made = Driver(code)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
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


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not tell")
def test_free_host_memory_is_part_of_the_machines():
    psutil = pytest.importorskip("psutil")
    free = free_host_memory()
    assert free is not None
    assert 2**26 < free <= psutil.virtual_memory().total


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_counts(version, tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(host_memory, "_available", lambda: 10**12)
    assert free_host_memory() == 10**12
    folder, limit, used = tmp_path, "memory.max", "anon"
    if version == 1:
        folder, limit, used = tmp_path / "memory", "memory.limit_in_bytes", "total_rss"
    folder.mkdir(exist_ok=True)
    (folder / "memory.stat").write_text(f"{used} 3000000\nfile 99999999999\n")
    (folder / limit).write_text("10000000\n")
    assert free_host_memory() == 7_000_000
    (folder / limit).write_text("1000000\n")
    assert free_host_memory() == 0
    (folder / limit).write_text("max\n")
    assert free_host_memory() == 10**12


def test_windows_is_asked_its_own_way(monkeypatch):
    def status(pointer):
        pointer._obj.free = 12345
        return 1

    kernel = types.SimpleNamespace(GlobalMemoryStatusEx=status)
    monkeypatch.setattr(host_memory.ctypes, "windll", types.SimpleNamespace(kernel32=kernel), raising=False)
    monkeypatch.setattr(host_memory.sys, "platform", "win32")
    assert host_memory._available() == 12345
    assert host_memory.ctypes.sizeof(host_memory._MemoryStatus) == 64

import psutil
import pytest

from magi.system import host_memory
from magi.system.host_memory import free_host_memory


def test_free_host_memory_is_part_of_the_machines():
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


def test_a_system_that_does_not_tell(monkeypatch):
    def refused():
        raise PermissionError("/proc/meminfo")

    monkeypatch.setattr(psutil, "virtual_memory", refused)
    assert free_host_memory() is None

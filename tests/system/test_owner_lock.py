import subprocess
import sys
import threading

import pytest

from magi.system import owner_lock
from magi.system.owner_lock import OwnerLock


@pytest.fixture
def path(tmp_path):
    return tmp_path / "clip.lock"


def test_one_owner_at_a_time_in_one_process_too(path):
    one, other = OwnerLock(path), OwnerLock(path)
    assert one.acquire()
    assert one.acquire(), "again"
    assert not other.acquire()
    assert path.exists()
    one.release()
    assert not path.exists()
    assert other.acquire()
    one.release()  # does nothing: it owns nothing
    assert not OwnerLock(path).acquire()


def test_what_is_forgotten_is_given_back(path):
    lock = OwnerLock(path)
    assert lock.acquire()
    del lock
    assert OwnerLock(path).acquire()


def test_the_system_takes_it_back_from_a_killed_process(path):
    code = f"from magi.system.owner_lock import OwnerLock; from pathlib import Path; import time; lock = OwnerLock(Path({str(path)!r})); print(lock.acquire(), flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "True\n"
        assert not OwnerLock(path).acquire()
        process.kill()
    assert OwnerLock(path).acquire()


def test_many_at_once(path):
    """Each takes it as soon as it is free: never two at a time."""
    owners, most, mutex = [0], [0], threading.Lock()

    def work():
        taken = 0
        while taken < 20:
            lock = OwnerLock(path)
            if lock.acquire():
                with mutex:
                    owners[0] += 1
                    most[0] = max(most[0], owners[0])
                taken += 1
                with mutex:
                    owners[0] -= 1
                lock.release()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_without_a_folder_or_locks_everybody_gets_it(tmp_path, path, monkeypatch):
    nowhere = tmp_path / "nowhere"
    assert OwnerLock(nowhere / "a.lock").acquire()
    assert not nowhere.exists(), "nothing is made for it"

    def refuses(*_, **__):
        raise NotImplementedError

    def times_out(self, **_):
        raise owner_lock.Timeout(str(path))

    monkeypatch.setattr(owner_lock.FileLock, "acquire", times_out)  # as where the file cannot be made
    assert OwnerLock(path).acquire()
    monkeypatch.setattr(owner_lock.FileLock, "acquire", refuses)
    one, other = OwnerLock(path), OwnerLock(path)
    assert one.acquire()
    assert other.acquire()

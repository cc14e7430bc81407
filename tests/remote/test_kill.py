"""The process is killed at any line of the client: what was paid for is found again, and nothing is paid for twice."""

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from magi import remote
from magi.remote.errors import UnclearError
from magi.remote.fake_server import FakeServer
from tests.support.remote_service import KEY, Service

TRACED = {
    str(Path(remote.__file__).parent / f"{name}.py") for name in ("client", "records", "api", "polling", "download")
}
TRIALS = 24
LINES = 450  # about as many as a run has


def die_at_line(number: int) -> None:
    left = [number]

    def trace(frame, event, _):
        if frame.f_code.co_filename not in TRACED:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    threading.settrace(trace)
    sys.settrace(trace)


def killed(service: Service, line: int) -> bool:
    """Runs a request in a process that ends itself; whether it came to that."""
    child = os.fork()
    if child == 0:
        try:
            die_at_line(line)
            service.make()
        finally:
            os._exit(0)
    end = time.monotonic() + 30
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            pytest.fail("it hangs")
        time.sleep(0.01)
    return os.WIFSIGNALED(found[1])


@pytest.mark.skipif(sys.platform != "linux", reason="needs a fork that keeps the server apart")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_at_any_line(tmp_path, remote_videos):
    numbers = random.Random(5)
    deaths = unclear = 0
    for trial in range(TRIALS):
        server = FakeServer(key=KEY, statuses=("processing",))
        server.videos = remote_videos
        with server:
            service = Service(server, tmp_path / str(trial))
            for _ in range(numbers.randrange(1, 3)):
                deaths += killed(service, numbers.randrange(1, LINES))
            try:
                made = service.make()
            except UnclearError:
                unclear += 1
                if server.tasks:  # the user has found it on the service's page
                    made = service.make(resume_id=service.task)
                else:
                    made = service.make(resume_id=f"new-{service.records[0]['code']}")
            assert made.facts.frames == 96
            assert made.task_id in server.tasks
            assert len(server.tasks) == service.submits == 1
            for left in (tmp_path / str(trial) / "videos").glob("*.part"):
                left.unlink()
            service.check()
    assert deaths > TRIALS / 2
    assert unclear < TRIALS / 3

"""Polls a task until it ends."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from ..system.threads import Worker, pause
from .answers import TASKS_PAGE, Task, failure
from .api import Api
from .errors import GoneError, RemoteError, TemporaryError
from .progress import Watch


@dataclass(frozen=True)
class Limits:
    """Seconds, bytes and numbers of retries. Tests make them smaller.

    Attributes:
        poll_first: seconds between the first two polls of a task.
        poll_most: seconds between any two.
        answer: seconds that a whole answer may take, however slowly it arrives; pictures and videos have more, by their size.
        retries: of what may be retried.
        unknown: retries where the service does not know a task, which may have been created just now.
        retry_first: seconds before the first retry; each later one waits twice as long.
        retry_most: seconds before any retry that the service does not set.
        running: seconds that a task may run, not counting those in the queue.
        queued: seconds that a task may wait in the queue.
        video: bytes of the largest video.
    """

    poll_first: float = 2.0
    poll_most: float = 10.0
    answer: float = 120.0
    retries: int = 6
    unknown: int = 3
    retry_first: float = 1.0
    retry_most: float = 30.0
    running: float = 45 * 60.0
    queued: float = 24 * 3600.0
    video: int = 1 << 30

    def before_retry(self, failures: int, asked: float | None) -> float:
        """Returns the seconds to wait after so many failures in a row; `asked`: those that the service asks for."""
        return max(min(self.retry_first * 2 ** (failures - 1), self.retry_most), asked or 0.0)

    def next_poll(self, interval: float) -> float:
        """Returns the interval that follows `interval`."""
        return min(interval * 1.3, self.poll_most)


def poll(api: Api, task_id: str, limits: Limits, watch: Watch) -> Task:
    """Asks for a task's state, with retries.

    Raises:
        RefusedError: the key is not accepted.
        GoneError: the service does not know the task.
        TemporaryError: every retry failed.
    """
    failures = 0
    while True:
        try:
            task = Worker(lambda: api.result(task_id, limits.answer)).result(watch.update)
            # A completed task without a video: the service may not list it yet.
            if not task.completed or task.outputs or task.ended:
                return task
            what = "an address from which nothing may be fetched" if task.refused_outputs else "no video"
            error = TemporaryError(f"it says that the task is completed, and gives {what}")
        except TemporaryError as temporary:
            error = temporary
        failures += 1
        if failures > (limits.unknown if isinstance(error, GoneError) else limits.retries):
            raise error
        pause(limits.before_retry(failures, error.wait), watch.update)


def follow(api: Api, task_id: str, limits: Limits, watch: Watch, on_running: Callable[[str], None]) -> Task:
    """Polls a task until it is completed, and returns it.

    `on_running` is called with its id at every poll that finds it unfinished.

    Raises:
        EndedError: it ended without a video.
        GoneError: the service does not know it.
        RemoteError: it takes far too long, or the service is out of reach; it may still be completed.
    """
    kept = f"Task {task_id} is not lost: run it again and it is resumed, without a new one (or look at {TASKS_PAGE})."
    spent = {True: 0.0, False: 0.0}  # seconds in the queue; running
    interval, last, status = limits.poll_first, time.monotonic(), None
    while True:
        try:
            task = poll(api, task_id, limits, watch)
        except GoneError as error:
            raise GoneError(
                f"The service does not know task {task_id}, or no longer: {error}. Check the id and the account."
            ) from None
        except TemporaryError as error:
            raise RemoteError(f"The service could not be asked how the task stands: {error}. {kept}") from None
        except RemoteError as error:
            raise RemoteError(f"{error} {kept}") from None
        if task.ended:
            raise failure(task)
        if task.completed:
            return task
        on_running(task_id)
        now = time.monotonic()
        spent[task.queued] += now - last
        last = now
        for queued, most in ((True, limits.queued), (False, limits.running)):
            if spent[queued] > most:
                raise RemoteError(
                    f"The task has {'waited in the queue' if queued else 'run'} for {most / 60:.0f} minutes. {kept}"
                )
        if task.status != status:
            status, interval = task.status, limits.poll_first
            name = (
                "waiting in the service's queue" if task.queued else f"the service is at work ({status or 'no status'})"
            )
            watch.phase("wait", f"{name}, task {task_id}")
        pause(interval, watch.update)
        interval = limits.next_poll(interval)

"""From a request to a video on this disk: submitted once, followed through crashes and cancels, given up only if nobody wants it."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Thread

import torch

from ..errors import MagiError
from ..system.threads import Worker, pause
from . import polling
from .answers import TASKS_PAGE, Task
from .api import Api, NotSentError, is_id
from .download import Facts, check_folder, fetch
from .errors import Cancelled, EndedError, GoneError, RefusedError, RemoteError, TemporaryError, UnclearError
from .polling import Limits
from .progress import Progress, Watch
from .records import WORD, Entry, Records
from .request import RemoteRequest, encode_image

_CONNECTS = 3  # tries to reach the service with a request
_CANCEL_SECONDS = 1.5  # that a cancel waits for the service's answer


@dataclass(frozen=True)
class RemoteVideo:
    """A video that has arrived.

    Attributes:
        path: the file.
        task_id: its task at the service.
        url: where it lies there, for about 7 days.
        facts: what is in it.
        notes: what a user should know of it, in sentences.
    """

    path: Path
    task_id: str
    url: str
    facts: Facts
    notes: tuple[str, ...]


class Client:
    """Makes videos by the service. Every call blocks: run it in a thread where that matters."""

    def __init__(self, api: Api, records: Path, say: Callable[[str], None], limits: Limits | None = None) -> None:
        """Nothing is sent or written yet.

        Args:
            api: the account.
            records: folder in which tasks are noted, so that none is paid for twice.
            say: is told, in a sentence, what belongs into a log: first of all the task's id.
            limits: how patient to be.
        """
        self.api, self.records, self._say = api, Records(records), say
        self.limits = limits or Limits()

    def say(self, sentence: str) -> None:
        """Into the log. A log that is gone, such as a pipe that was closed, costs nobody a task."""
        with suppress(Exception):
            self._say(sentence)

    def make(
        self,
        request: RemoteRequest,
        folder: Path,
        progress: Callable[[Progress], None],
        resume_id: str = "",
        take: Callable[[Path, Facts], None] = lambda path, facts: None,
    ) -> RemoteVideo:
        """The video of a request: of its own task if it has one already, else of a new one.

        Args:
            request: what to make.
            folder: where the file goes.
            progress: called in this thread about ten times per second. If it raises `Cancelled`, an unfinished task is deleted, as far
                as the service does that. If it raises anything else, the task goes on, and the same request finds it again.
            resume_id: a task's id: its video is fetched and nothing is submitted. Or the word that an error has named: the request is
                submitted although it is not known what became of an earlier try.
            take: called with the file before it counts as delivered. If it raises, the same request fetches the video again.

        Raises:
            MagiError: there is no video. The message says whether there may be one later, and how to get it.
        """
        resume_id = resume_id.strip()
        if resume_id:
            _check_id(resume_id)
        check_folder(folder)
        watch = Watch(progress)
        entry = self.records.open(request.digest(str(self.api.base), self.api.version), watch.alive)
        run = _Run(self, entry, request, watch)
        try:
            return run.video(folder, resume_id, take)
        except (Cancelled, KeyboardInterrupt):
            run.cancel()
            raise
        finally:
            entry.release()

    def fetch(self, task_id: str, folder: Path, progress: Callable[[Progress], None]) -> RemoteVideo:
        """The video of a task of which only the id is known. Whatever `progress` raises, the task is left alone.

        Raises:
            MagiError: there is no video, or not yet.
        """
        _check_id(task_id)
        check_folder(folder)
        watch = Watch(progress)
        watch.phase("wait", f"asking for task {task_id}")
        task = polling.follow(self.api, task_id, self.limits, watch, lambda _: None)
        path, url, facts = fetch(self.api, task_id, task.outputs, folder, self.limits, watch)
        return RemoteVideo(path, task_id, url, facts, _marks(task))


def _check_id(text: str) -> None:
    if not is_id(text):
        raise MagiError(
            "The resume id is not the id of a task: letters, digits, - and _ only. It stands in the log, in the node's output "
            "task_id, and on the service's page of your tasks."
        )


def _marks(task: Task) -> tuple[str, ...]:
    return ("The service's safety checker has flagged this video.",) if task.flagged else ()


class _Run:
    """One call of `make`."""

    def __init__(self, client: Client, entry: Entry, request: RemoteRequest, watch: Watch) -> None:
        self._api, self._limits, self._say = client.api, client.limits, client.say
        self._entry, self._request, self._watch = entry, request, watch
        self._unfinished: str | None = None  # the task that a cancel gives up: none that is completed, and paid for

    def video(self, folder: Path, resume_id: str, take: Callable[[Path, Facts], None]) -> RemoteVideo:
        is_word = resume_id.startswith(WORD)
        task_id = resume_id if resume_id and not is_word else self._known(resume_id)
        if task_id is None:
            task_id = self._unfinished = self._new()
        record = self._entry.record
        own = record is not None and record.task_id == task_id
        self._watch.phase("wait", f"asking for task {task_id}")
        try:
            task = polling.follow(self._api, task_id, self._limits, self._watch, self._still_running)
        except EndedError:
            if own:
                self._entry.clear()
            raise
        except GoneError as error:
            raise self._advised(str(error), GoneError) if own else error from None
        self._unfinished = None
        path, url, facts = fetch(self._api, task_id, task.outputs, folder, self._limits, self._watch)
        take(path, facts)
        if own or (record is not None and record.task_id is None):  # the user has found out what became of that try
            self._entry.update(task_id=task_id, delivered=True)
        notes = (*facts.differences(self._request), *_marks(task))
        for note in notes:
            self._say(f"{note} (Task {task_id})")
        return RemoteVideo(path, task_id, url, facts, (*self._request.notes(), *notes))

    def _still_running(self, task_id: str) -> None:
        self._unfinished = task_id

    # -- tasks that there are already ----------------------------------------------------------------------------------

    def _known(self, word: str) -> str | None:
        """The task that this request became before, if it is to be resumed. `word`: what the user wrote to have it sent again."""
        record = self._entry.record
        if record is None:
            return None
        if record.delivered and (record.expired or self._request.seed is None):  # gone, or another video is wanted
            return None
        if record.task_id is None:
            if word != record.word:
                raise self._unclear(f"what came of it, on {record.when}, is not known")
            self._entry.clear()
            return None
        insists = word == record.word
        if (record.cancelled or record.expired or insists) and not self._lives(record.task_id, insists):
            self._entry.clear()
            return None
        self._say(f"Resuming task {record.task_id} of {record.when}: nothing is submitted again.")
        self._entry.update(cancelled=False)
        return record.task_id

    def _lives(self, task_id: str, insists: bool) -> bool:
        """Whether a task that nobody waits for any more goes on, or has ended well, all the same: then it is paid for.

        Where the service refuses to say, the user may have insisted on a new one.
        """
        self._watch.phase("check", f"asking what became of task {task_id}")
        try:
            return not polling.look(self._api, task_id, replace(self._limits, unknown=0), self._watch).ended
        except GoneError:
            return False
        except RemoteError as error:
            if insists and isinstance(error, RefusedError):
                return False
            text = f"The service could not be asked about task {task_id}, which nobody waits for any more: {error}"
            raise self._advised(text.rstrip(".") + ".", RemoteError) from None

    # -- a new task ----------------------------------------------------------------------------------------------------

    def _new(self) -> str:
        """Submits: the only place that spends money."""
        request, entry = self._request, self._entry
        for note in request.notes():
            self._say(note)
        image = self._upload(request.image) if isinstance(request.image, torch.Tensor) else request.image
        self._watch.phase("submit", "submitting")
        entry.begin(str(self._api.base), self._api.version, request.settings())
        stop = Event()
        worker = Worker(lambda: self._submit(request.body(image), stop))
        try:
            return worker.result(self._watch.alive)
        except (RefusedError, NotSentError):
            entry.clear()
            raise
        except UnclearError as error:
            raise self._unclear(str(error)) from None
        except BaseException as error:  # a cancel, while nobody knows whether the request has arrived
            stop.set()
            self._leave(worker.outcome, delete=isinstance(error, Cancelled | KeyboardInterrupt))
            raise

    def _upload(self, image: torch.Tensor) -> str:
        self._watch.phase("upload", "uploading the picture")
        data, kind = Worker(lambda: encode_image(image)).result(self._watch.alive)
        failures = 0
        while True:
            try:
                return Worker(lambda: self._api.upload(data, kind)).result(self._watch.alive)
            except TemporaryError as error:
                failures += 1
                if failures > self._limits.retries or isinstance(error, GoneError):
                    remedy = (
                        "Check the base URL and the API version." if isinstance(error, GoneError) else "Run it again."
                    )
                    raise RemoteError(
                        f"The picture could not be uploaded: {error}. Nothing was submitted. {remedy}"
                    ) from None
                pause(self._limits.before_retry(failures, error.wait), self._watch.alive)

    def _submit(self, body: dict, stop: Event) -> str:
        """In a thread of its own: sends the request and notes the task, also when nobody waits for it any more."""
        failures = 0
        while True:
            try:
                task_id = self._api.submit(body, stop.is_set)
                break
            except NotSentError:
                failures += 1
                if failures == _CONNECTS or stop.wait(self._limits.before_retry(failures, None)):
                    raise
        self._entry.update(task_id=task_id)
        self._say(f"Task {task_id} was submitted to {self._api.base}.")
        return task_id

    def _unclear(self, reason: str) -> RemoteError:
        return self._advised(
            f"The request was sent, but {reason}. So a task may have been made, and billed; it is not sent again by itself. Look at "
            f"{TASKS_PAGE}: if the task is there, put its id into resume_id, and its video is fetched.",
            UnclearError,
        )

    def _advised(self, text: str, kind: type[RemoteError]) -> RemoteError:
        """An error that tells how to have the request sent again all the same."""
        record = self._entry.record
        word = record.word if record is not None else WORD
        return kind(f"{text} To have the request sent again, and billed again, put {word} into resume_id.")

    # -- the end of it -------------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Gives up the task that is followed, if it runs."""
        if task_id := self._unfinished:
            self._leave(lambda: task_id, delete=True)

    def _leave(self, task: Callable[[], str], delete: bool) -> None:
        """Keeps the request to itself until its task is known, and has that deleted. The caller waits a moment only."""
        entry = self._entry

        def work() -> None:
            try:
                task_id = task()
                if delete and self._is_completed(task_id):
                    self._say(f"Task {task_id} was completed before the cancel, and is kept: the same run fetches it.")
                elif delete:
                    if entry.record is not None and entry.record.task_id == task_id:
                        entry.update(cancelled=True)
                    self._say(
                        f"Task {task_id} is cancelled. The service may finish and bill it all the same: the same request looks for it first."
                    )
                    Worker(lambda: self._api.delete(task_id)).result(_nobody, self._limits.answer)
            except (RefusedError, NotSentError):
                entry.clear()
            finally:
                entry.release()

        def quiet() -> None:
            with suppress(Exception):  # it was worth a try; the record says the rest
                work()

        entry.hold()
        thread = Thread(target=quiet, name="magi-remote-cancel", daemon=True)
        thread.start()
        thread.join(_CANCEL_SECONDS)

    def _is_completed(self, task_id: str) -> bool:
        """Whether a task has become a video since the last look: then it is paid for."""
        with suppress(RemoteError, TimeoutError):
            return Worker(lambda: self._api.result(task_id)).result(_nobody, self._limits.answer).completed
        return False


def _nobody() -> None:
    """Waits, too, but cannot cancel."""

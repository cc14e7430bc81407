"""From a request to a video on disk: submitted once, resumed after crashes and errors, deleted only after a cancel."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import torch

from ..errors import MagiError
from ..system.threads import Worker, pause
from . import polling
from .answers import TASKS_PAGE, Task, is_id
from .api import Api, NotSentError
from .download import Facts, check_folder, fetch
from .errors import Cancelled, EndedError, GoneError, RefusedError, RemoteError, TemporaryError, UnclearError
from .polling import Limits
from .progress import RemoteProgress, Watch
from .records import CONFIRM_PREFIX, Entry, Records
from .request import RemoteRequest, encode_image

_CONNECTS = 3  # attempts to reach the service with a request
_CANCEL_SECONDS = 1.5  # that a cancel waits for the service's answer
_CHECK_SECONDS = 0.8  # of these, for asking whether the task is completed; the rest is for sending the deletion


@dataclass(frozen=True)
class RemoteVideo:
    """A downloaded video.

    Attributes:
        path: the file.
        task_id: its task at the service.
        url: of the video there, for about 7 days.
        facts: what is in it.
        notes: for the user, in sentences.
    """

    path: Path
    task_id: str
    url: str
    facts: Facts
    notes: tuple[str, ...]


class Client:
    """Has the service make videos. Every call blocks: run it in a thread where that matters."""

    def __init__(self, api: Api, records: Path, log: Callable[[str], None], limits: Limits | None = None) -> None:
        """Sends and writes nothing yet.

        Args:
            api: the account.
            records: folder of the tasks' records, so that none is paid for twice.
            log: called with sentences for a log, such as the task's id.
            limits: intervals, timeouts and numbers of retries.
        """
        self.api, self.records, self._log = api, Records(records), log
        self.limits = limits or Limits()

    def log(self, sentence: str) -> None:
        """Logs a sentence. A log that fails, such as a closed pipe, does not end a task."""
        with suppress(Exception):
            self._log(sentence)

    def make(
        self,
        request: RemoteRequest,
        folder: Path,
        on_progress: Callable[[RemoteProgress], None],
        resume_id: str = "",
        take: Callable[[Path, Facts], None] = lambda path, facts: None,
    ) -> RemoteVideo:
        """Returns the video of a request: of the task that it already has, else of a new one.

        Args:
            request: what to make.
            folder: where the file goes.
            on_progress: called in this thread about ten times per second. If it raises `Cancelled`, an unfinished task is deleted, as
                far as the service does that. If it raises anything else, the task continues, and the same request resumes it.
            resume_id: a task's id: its video is downloaded and nothing is submitted. Or the confirm code that an error has named: the
                request is submitted although the outcome of an earlier attempt is unknown.
            take: called with the file before it counts as delivered. If it raises, the same request downloads the video again.

        Raises:
            MagiError: there is no video. The message tells whether there may be one later, and how to get it.
        """
        resume_id = resume_id.strip()
        if resume_id:
            _check_id(resume_id)
        check_folder(folder)
        watch = Watch(on_progress)
        entry = self.records.open(request.digest(str(self.api.base), self.api.version), watch.update)
        run = _Run(self, entry, request, watch)
        try:
            return run.video(folder, resume_id, take)
        except (Cancelled, KeyboardInterrupt):
            run.cancel()
            raise
        finally:
            entry.release()

    def fetch(self, task_id: str, folder: Path, on_progress: Callable[[RemoteProgress], None]) -> RemoteVideo:
        """Downloads the video of a task of which only the id is known. Whatever ends the call, the task is left alone.

        Raises:
            MagiError: there is no video, or not yet.
        """
        _check_id(task_id)
        check_folder(folder)
        watch = Watch(on_progress)
        watch.phase("wait", f"asking for task {task_id}")
        task = polling.follow(self.api, task_id, self.limits, watch, lambda _: None)
        path, url, facts = fetch(self.api, task_id, task.outputs, folder, self.limits, watch)
        return RemoteVideo(path, task_id, url, facts, _flag_notes(task))


def _check_id(text: str) -> None:
    if not is_id(text):
        raise MagiError(
            "The resume id is not the id of a task: letters, digits, - and _ only. It stands in the log, in the node's output "
            "task_id, and on the service's page of your tasks."
        )


def _flag_notes(task: Task) -> tuple[str, ...]:
    return ("The service's safety checker has flagged this video.",) if task.flagged else ()


class _Run:
    """One call of `make`."""

    def __init__(self, client: Client, entry: Entry, request: RemoteRequest, watch: Watch) -> None:
        self._api, self._limits, self._log = client.api, client.limits, client.log
        self._entry, self._request, self._watch = entry, request, watch
        self._followed: str | None = None  # the task that is asked about or downloaded
        self._unfinished: str | None = None  # the task that a cancel deletes: never a completed one, which is paid for

    def video(self, folder: Path, resume_id: str, take: Callable[[Path, Facts], None]) -> RemoteVideo:
        is_code = resume_id.startswith(CONFIRM_PREFIX)
        task_id = resume_id if resume_id and not is_code else self._recorded_task(resume_id)
        if task_id is None:
            task_id = self._unfinished = self._new_task()
        record = self._entry.record
        own = record is not None and record.task_id == task_id
        self._followed = task_id
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
        if own or (record is not None and record.task_id is None):  # the user has looked up the outcome of that attempt
            self._entry.update(task_id=task_id, delivered=True)
        notes = (*facts.differences(self._request), *_flag_notes(task))
        for note in notes:
            self._log(f"{note} (Task {task_id})")
        return RemoteVideo(path, task_id, url, facts, (*self._request.notes(), *notes))

    def _still_running(self, task_id: str) -> None:
        self._unfinished = task_id

    # -- tasks that exist already --------------------------------------------------------------------------------------

    def _recorded_task(self, confirm_code: str) -> str | None:
        """Returns the task of an earlier submission, None where the request is to be submitted.

        `confirm_code` is the user's, to have it submitted again; "" without one.
        """
        record = self._entry.record
        if record is None:
            return None
        if record.delivered and self._request.seed is None:  # another video is wanted
            return None
        if record.task_id is None:
            if confirm_code != record.confirm_code:
                raise self._unclear(f"its outcome, on {record.when}, is not known")
            self._entry.clear()
            return None
        confirmed = confirm_code == record.confirm_code
        if (record.cancelled or record.expired or confirmed) and not self._is_live(record.task_id, confirmed):
            self._entry.clear()
            return None
        self._log(f"Resuming task {record.task_id} of {record.when}: nothing is submitted again.")
        self._entry.update(cancelled=False)
        return record.task_id

    def _is_live(self, task_id: str, confirmed: bool) -> bool:
        """Returns whether an abandoned task still runs, or is completed: then it is paid for.

        Where the service refuses to answer, a confirm code of the user's decides that it is not.
        """
        self._watch.phase("check", f"asking how task {task_id} stands")
        try:
            return not polling.poll(self._api, task_id, self._limits, self._watch).ended
        except GoneError:
            return False
        except RemoteError as error:
            if confirmed and isinstance(error, RefusedError):
                return False
            text = f"The service could not be asked about task {task_id}, which nobody waits for any more: {error}"
            raise self._advised(text.rstrip(".") + ".", RemoteError) from None

    # -- a new task ----------------------------------------------------------------------------------------------------

    def _new_task(self) -> str:
        """Submits the request and returns the task's id: the only place that spends money."""
        request, entry = self._request, self._entry
        for note in request.notes():
            self._log(note)
        image = self._upload(request.image) if isinstance(request.image, torch.Tensor) else request.image
        self._watch.phase("submit", "submitting")
        entry.begin(str(self._api.base), self._api.version, request.settings())
        stop = Event()
        worker = Worker(lambda: self._submit(request.body(image), stop))
        try:
            return worker.result(self._watch.update)
        except (RefusedError, NotSentError):
            entry.clear()
            raise
        except UnclearError as error:
            raise self._unclear(str(error)) from None
        except BaseException as error:  # a cancel, while it is unknown whether the request has arrived
            stop.set()
            self._detach(worker.outcome, delete=isinstance(error, Cancelled | KeyboardInterrupt))
            raise

    def _upload(self, image: torch.Tensor) -> str:
        self._watch.phase("upload", "uploading the picture")
        data, kind = Worker(lambda: encode_image(image)).result(self._watch.update)
        failures = 0
        while True:
            try:
                return Worker(lambda: self._api.upload(data, kind, self._limits.answer)).result(self._watch.update)
            except TemporaryError as error:
                failures += 1
                if failures > self._limits.retries or isinstance(error, GoneError):
                    remedy = (
                        "Check the base URL and the API version." if isinstance(error, GoneError) else "Run it again."
                    )
                    raise RemoteError(
                        f"The picture could not be uploaded: {error}. Nothing was submitted. {remedy}"
                    ) from None
                pause(self._limits.before_retry(failures, error.wait), self._watch.update)

    def _submit(self, body: dict, stop: Event) -> str:
        """Sends the request and records the task, in a thread of its own: also after the caller has stopped waiting."""
        failures = 0
        while True:
            try:
                task_id = self._api.submit(body, stop.is_set, self._limits.answer)
                break
            except NotSentError:
                failures += 1
                if failures == _CONNECTS or stop.wait(self._limits.before_retry(failures, None)):
                    raise
        self._entry.update(task_id=task_id)
        self._log(f"Task {task_id} was submitted to {self._api.base}.")
        return task_id

    def _unclear(self, reason: str) -> RemoteError:
        return self._advised(
            f"The request was sent, but {reason}. So a task may have been made, and billed; it is not sent again by itself. Look at "
            f"{TASKS_PAGE}: if the task is there, put its id into resume_id, and its video is fetched.",
            UnclearError,
        )

    def _advised(self, text: str, kind: type[RemoteError]) -> RemoteError:
        """Makes an error that tells how to have the request submitted again."""
        record = self._entry.record
        code = record.confirm_code if record is not None else CONFIRM_PREFIX
        return kind(f"{text} To have the request sent again, and billed again, put {code} into resume_id.")

    # -- cancelling ----------------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Deletes the task that is being polled, if it is unfinished."""
        if task_id := self._unfinished:
            self._detach(lambda: task_id, delete=True)
        elif self._followed:
            self._log(
                f"Task {self._followed} is left as it is, as it may be completed: the same run continues with it."
            )

    def _detach(self, task: Callable[[], str], delete: bool) -> None:
        """Waits for the task's id in a thread and has the task deleted if `delete`; the record stays locked meanwhile.

        The caller waits for `_CANCEL_SECONDS` at most.
        """
        entry = self._entry

        def work() -> None:
            try:
                task_id = task()
                if delete and self._is_completed(task_id):
                    self._log(f"Task {task_id} was completed before the cancel, and is kept: the same run fetches it.")
                elif delete:
                    if entry.record is not None and entry.record.task_id == task_id:
                        entry.update(cancelled=True)
                    self._log(
                        f"Task {task_id} is cancelled. The service may finish and bill it all the same: the same request checks for it first."
                    )
                    self._api.delete(task_id, self._limits.answer)
            except (RefusedError, NotSentError):
                entry.clear()
            finally:
                entry.release()

        def quiet() -> None:
            with suppress(Exception):  # nobody is left to tell; the record keeps what is known
                work()

        entry.hold()
        thread = Thread(target=quiet, name="magi-remote-cancel", daemon=True)
        thread.start()
        thread.join(_CANCEL_SECONDS)
        if thread.is_alive():  # this process may end before the answer comes
            self._log(f"The service has not answered yet. Look at {TASKS_PAGE} whether it still has a task.")

    def _is_completed(self, task_id: str) -> bool:
        """Returns whether a task was completed since the last poll: then it is paid for. A silent service is not waited for."""
        with suppress(RemoteError, TimeoutError):
            return Worker(lambda: self._api.result(task_id)).result(_ignore_tick, _CHECK_SECONDS).completed
        return False


def _ignore_tick() -> None:
    """Does nothing: this wait cannot be cancelled."""

"""Interprets the service's answers and words the errors that follow from them."""

from dataclasses import dataclass
from typing import Any

from .address import is_allowed
from .errors import EndedError
from .key import PAGE

TASKS_PAGE = "https://wavespeed.ai/predictions"

_ENDED = {"failed", "error", "cancelled", "canceled", "timeout", "deleted"}
_QUEUED = {"created", "queued", "pending"}
_REFUSALS = {
    401: f"The service does not accept the API key. Check it at {PAGE}; a key works only after the account's first top-up.",
    402: "The account's credit does not suffice. Top it up at https://wavespeed.ai, then run it again.",
    403: f"The API key is not allowed to do this. Check the account and the key at {PAGE}.",
    404: "The service knows no such address. Check the base URL and the API version.",
    413: "The service finds the picture or the prompt too large. Give a smaller one.",
    429: "The service takes no more requests or tasks of this account for the moment. Run it again{wait}.",
}
_FAILURES = {
    1200: "The service's moderation refused the prompt or the picture. Change them.",
    1400: "The service does not accept the settings. Change what it names, or the API version.",
    1401: "The service does not accept the settings. Change what it names, or the API version.",
    1402: "The service could not open the picture. Give another one, or an address that everybody can open.",
    1403: "The service failed to make the video. Run it again for a new task, or change the settings.",
    1405: "The service failed to make the video. Run it again for a new task, or change the settings.",
    5000: "The service is in trouble. Run it again later for a new task.",
    5003: "The service is in trouble. Run it again later for a new task.",
    5004: "The service took too long. Run it again later for a new task.",
}
_REFUND = "Failed tasks are refunded by the service, usually within hours."


@dataclass(frozen=True)
class Task:
    """A task's state as the service reports it.

    Attributes:
        id: of the task.
        status: in lower case; "" where there is none.
        outputs: those of its URLs that may be requested.
        refused_outputs: whether there are others.
        flagged: whether the safety checker found something.
        code: of its failure, None where it has none.
        error: the service's error text, not redacted yet.
    """

    id: str
    status: str
    outputs: tuple[str, ...]
    refused_outputs: bool
    flagged: bool
    code: int | None
    error: str

    @classmethod
    def of(cls, id: str, data: dict[str, Any]) -> "Task":
        """Reads an answer's `data`; a value of a wrong type counts as missing."""
        status, outputs, flags = data.get("status"), data.get("outputs"), data.get("has_nsfw_contents")
        given = outputs if isinstance(outputs, list) else [outputs] if isinstance(outputs, str) else []
        fit = tuple(url for url in given if isinstance(url, str) and is_allowed(url))
        return cls(
            id=id,
            status=status.strip().lower() if isinstance(status, str) else "",
            outputs=fit,
            refused_outputs=len(fit) < len(given),
            flagged=flags is True or (isinstance(flags, list) and True in flags),
            code=_number(data.get("code")),
            error=text_of(data.get("error")),
        )

    @property
    def queued(self) -> bool:
        """Returns whether it waits in the queue; a task of unknown status counts as running."""
        return self.status in _QUEUED

    @property
    def completed(self) -> bool:
        """Returns whether the service has finished it."""
        return self.status == "completed"

    @property
    def ended(self) -> bool:
        """Returns whether it ended without a video."""
        return self.status in _ENDED or (self.completed and self.flagged and not self.outputs)


def failure(task: Task, detail: str) -> EndedError:
    """Makes the error of a task that ended without a video; `detail` is the service's redacted error text."""
    if task.completed or (task.flagged and task.status == "failed"):
        reason = "The service's safety checker withheld the video. Change the prompt or the picture; the checker can be switched off in the node."
    elif task.status in ("cancelled", "canceled", "deleted"):
        reason = "The task was cancelled or deleted at the service. Run it again for a new task."
    elif task.status == "timeout":
        reason = f"{_FAILURES[5004]} {_REFUND}"
    else:
        reason = f"{_FAILURES.get(task.code or 0, _FAILURES[1403])} {_REFUND}"
    return EndedError(f"{reason} (Task {task.id}, {task.status}{_details(task.code, detail)})")


def refusal(status: int, detail: str, wait: float | None = None, code: int | None = None) -> str:
    """Makes the message of a request refused with an HTTP status; `detail` is the service's redacted error text."""
    later = f" in {wait:.0f} s" if wait else " in a minute"
    default = (
        "The service does not accept the request. Change what it names; API version v3 takes fewer settings than v2."
    )
    reason = _FAILURES.get(code or 0) or _REFUSALS.get(status, default).format(wait=later)
    return f"{reason} (HTTP {status}{_details(code, detail)})"


def text_of(value: object) -> str:
    """Extracts the text of an answer's field, whatever its type."""
    while isinstance(value, dict):
        value = value.get("message") or value.get("detail") or next(iter(value.values()), "")
    return "" if value is None else str(value)


def error_of(answer: dict[str, Any] | None) -> tuple[str, int | None]:
    """Returns (an answer's error text, not redacted yet; its detailed code, None where it has none)."""
    if answer is None:
        return "", None
    data = answer.get("data")
    inner = data if isinstance(data, dict) else {}
    fields = (inner.get("error"), answer.get("error"), answer.get("message"), answer.get("detail"))
    return next(filter(None, map(text_of, fields)), ""), _number(inner.get("code"))


def _details(code: int | None, text: str) -> str:
    return f"{f', code {code}' if code else ''}{f': {text}' if text else ''}"


def _number(value: object) -> int | None:
    if isinstance(value, str) and value.isdecimal() and len(value) < 10:
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None

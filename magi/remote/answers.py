"""What the service's answers mean, and what is said of them."""

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
    """What the service says of a task.

    Attributes:
        id: of the task.
        status: in lower case; "" where there is none.
        outputs: the addresses among its outputs from which something may be fetched.
        refused_outputs: whether there are others.
        flagged: whether the safety checker found something.
        code: of its failure, None where it has none.
        error: its own words, not yet fit to be shown.
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
        """From the answer's `data`; whatever is of a wrong type counts as not said."""
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
        """Whether it waits for its turn; an unknown status is taken for work."""
        return self.status in _QUEUED

    @property
    def completed(self) -> bool:
        """Whether the service is done with it."""
        return self.status == "completed"

    @property
    def ended(self) -> bool:
        """Whether it ended without a video."""
        return self.status in _ENDED or (self.completed and self.flagged and not self.outputs)


def failure(task: Task, said: str) -> EndedError:
    """The error of a task that ended without a video; `said` is its own words, fit to be shown."""
    if task.completed or (task.flagged and task.status == "failed"):
        reason = "The service's safety checker withheld the video. Change the prompt or the picture; the checker can be switched off in the node."
    elif task.status in ("cancelled", "canceled", "deleted"):
        reason = "The task was cancelled or deleted at the service. Run it again for a new task."
    elif task.status == "timeout":
        reason = f"{_FAILURES[5004]} {_REFUND}"
    else:
        reason = f"{_FAILURES.get(task.code or 0, _FAILURES[1403])} {_REFUND}"
    return EndedError(f"{reason} (Task {task.id}, {task.status}{_told(task.code, said)})")


def refusal(status: int, said: str, wait: float | None = None, code: int | None = None) -> str:
    """What it means that a request was answered so."""
    later = f" in {wait:.0f} s" if wait else " in a minute"
    default = (
        "The service does not accept the request. Change what it names; API version v3 takes fewer settings than v2."
    )
    reason = _FAILURES.get(code or 0) or _REFUSALS.get(status, default).format(wait=later)
    return f"{reason} (HTTP {status}{_told(code, said)})"


def text_of(value: object) -> str:
    """The words in an answer's field, whatever it is."""
    while isinstance(value, dict):
        value = value.get("message") or value.get("detail") or next(iter(value.values()), "")
    return "" if value is None else str(value)


def words(answer: dict[str, Any] | None) -> tuple[str, int | None]:
    """(what an answer says went wrong, not yet fit to be shown; its detailed code)"""
    if answer is None:
        return "", None
    data = answer.get("data")
    inner = data if isinstance(data, dict) else {}
    said = next(
        (
            t
            for t in map(
                text_of, (inner.get("error"), answer.get("error"), answer.get("message"), answer.get("detail"))
            )
            if t
        ),
        "",
    )
    return said, _number(inner.get("code"))


def _told(code: int | None, said: str) -> str:
    return f"{f', code {code}' if code else ''}{f': {said}' if said else ''}"


def _number(value: object) -> int | None:
    if isinstance(value, str) and value.isdecimal() and len(value) < 10:
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None

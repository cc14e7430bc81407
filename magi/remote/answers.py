"""Interprets the service's answers and words the errors that follow from them."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import EndedError
from .key import PAGE, how_to_allow
from .shown import MOST_TEXT

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
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{3,127}")
_MOST_STATUS = 40  # characters
_MOST_OUTPUTS = 16
_MOST_NESTED = 8  # an error text within an error within ...
_REFUND = "Failed tasks are refunded by the service, usually within hours."


@dataclass(frozen=True)
class Task:
    """A task's state as the service reports it. Its texts may be shown.

    Attributes:
        id: of the task.
        status: in lower case; "" where there is none.
        outputs: those of its URLs that may be requested.
        refused_outputs: whether there are others.
        flagged: whether the safety checker found something.
        code: of its failure, None where it has none.
        error: the service's error text.
    """

    id: str
    status: str
    outputs: tuple[str, ...]
    refused_outputs: bool
    flagged: bool
    code: int | None
    error: str

    @classmethod
    def of(
        cls, id: str, data: dict[str, Any], may_fetch: Callable[[str], bool], redact: Callable[[str, int], str]
    ) -> "Task":
        """Reads an answer's `data`; a value of a wrong type counts as missing.

        Args:
            id: of the task.
            data: of the answer.
            may_fetch: tells which URLs may be requested.
            redact: makes a text fit to be shown, so many characters at most.
        """
        status, outputs, flags = data.get("status"), data.get("outputs"), data.get("has_nsfw_contents")
        given = outputs if isinstance(outputs, list) else [outputs] if isinstance(outputs, str) else []
        given = given[:_MOST_OUTPUTS]
        fit = tuple(url for url in given if isinstance(url, str) and may_fetch(url))
        return cls(
            id=id,
            status=redact(status, _MOST_STATUS).lower() if isinstance(status, str) else "",
            outputs=fit,
            refused_outputs=len(fit) < len(given),
            flagged=flags is True or (isinstance(flags, list) and True in flags),
            code=_number(data.get("code")),
            error=redact(text_of(data.get("error")), MOST_TEXT),
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


def is_id(value: object) -> bool:
    """Returns whether a value has the form of a task's id."""
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def failure(task: Task) -> EndedError:
    """Makes the error of a task that ended without a video."""
    if task.completed or (task.flagged and task.status == "failed"):
        reason = "The service's safety checker withheld the video. Change the prompt or the picture; the checker can be switched off in the node."
    elif task.status in ("cancelled", "canceled", "deleted"):
        reason = "The task was cancelled or deleted at the service. Run it again for a new task."
    elif task.status == "timeout":
        reason = f"{_FAILURES[5004]} {_REFUND}"
    else:
        reason = f"{_FAILURES.get(task.code or 0, _FAILURES[1403])} {_REFUND}"
    return EndedError(f"{reason} (Task {task.id}, {task.status}{_details(task.code, task.error)})")


def refusal(
    status: int, detail: str, wait: float | None = None, code: int | None = None, without_key: str | None = None
) -> str:
    """Makes the message of a request refused with an HTTP status.

    Args:
        status: HTTP's.
        detail: the service's redacted error text.
        wait: seconds that the service asks to wait.
        code: the detailed one of its answer.
        without_key: the base URL, where no key was sent to it.
    """
    later = f" in {wait:.0f} s" if wait else " in a minute"
    default = (
        "The service does not accept the request. Change what it names; API version v3 takes fewer settings than v2."
    )
    reason = _FAILURES.get(code or 0) or _REFUSALS.get(status, default).format(wait=later)
    if status in (401, 403) and without_key:
        reason = f"{without_key} wants an API key, and none was sent. {how_to_allow(without_key)}"
    return f"{reason} (HTTP {status}{_details(code, detail)})"


def text_of(value: object) -> str:
    """Extracts the text of an answer's field, whatever its type and however deep; "" where there is none. It is not redacted."""
    for _ in range(_MOST_NESTED):
        if isinstance(value, dict):
            named = (value.get(name) for name in ("message", "detail", "msg"))
            value = next(filter(None, named), None) or next(iter(value.values()), "")
        elif isinstance(value, list):
            value = next(iter(value), "")
    return value if isinstance(value, str) else str(value) if isinstance(value, int | float) else ""


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
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9 else None

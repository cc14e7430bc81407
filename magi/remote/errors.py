"""What can go wrong between here and the service, told apart by what may have been paid for."""

from ..errors import MagiError


class RemoteError(MagiError):
    """The service was asked and there is no video (yet)."""


class RefusedError(RemoteError):
    """The service refused: no task was made, nothing is billed."""


class UnclearError(RemoteError):
    """The request was sent and what came of it is not known: a task may have been made."""


class EndedError(RemoteError):
    """The task has ended at the service without a video."""


class TemporaryError(RemoteError):
    """What failed may be tried again; `wait` is how many seconds the service asks to wait before that."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class GoneError(TemporaryError):
    """The service does not know what was asked for, or no longer."""


class Cancelled(Exception):  # noqa: N818 (not an error)
    """Raised by a caller's progress callback: the user wants no video any more, so the task is to be deleted."""

"""Errors of the service and the way to it, told apart by what may have been billed."""

from ..errors import MagiError


class RemoteError(MagiError):
    """There is no video, or not yet."""


class RefusedError(RemoteError):
    """The service refused: no task was created, nothing is billed."""


class UnclearError(RemoteError):
    """The request was sent with unknown outcome: a task may have been created."""


class EndedError(RemoteError):
    """The task has ended at the service without a video."""


class TemporaryError(RemoteError):
    """What failed may be retried; `wait` is how many seconds the service asks to wait before that."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class GoneError(TemporaryError):
    """The service does not know the task or file, or no longer."""


class Cancelled(Exception):  # noqa: N818 (not an error)
    """Raised by a caller's progress callback when the user cancels: the task is to be deleted."""

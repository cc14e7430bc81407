"""The one error a user is meant to read."""


class MagiError(Exception):
    """A mistake that the user can mend: the message names the value at fault and the remedy.

    Raised before expensive work wherever that is possible. The command line prints it without a traceback.
    """

"""Processes of the tests' own."""

import os
import signal
from typing import Any

# A shell that starts the tests in the background has them, and all that they start, ignore Ctrl-C.
INTERRUPTIBLE: dict[str, Any] = {}
if os.name != "nt":
    INTERRUPTIBLE["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)

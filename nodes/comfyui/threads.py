"""Work that waits for the network, in a thread beside ComfyUI's event loop: other nodes run meanwhile."""

import asyncio
import contextvars
import threading
from collections.abc import Callable
from typing import TypeVar

from ...magi.system.threads import start

T = TypeVar("T")


async def in_thread(work: Callable[[Callable[[], bool]], T]) -> T:
    """Runs `work(abandoned)` in a thread of its own, and returns or raises what it does.

    `abandoned()` returns whether the result is no longer awaited: ComfyUI has ended the graph, as it does when another
    node fails. The thread is not one of the event loop's own, which ComfyUI would then wait for.
    """
    abandoned = threading.Event()
    context = contextvars.copy_context()  # of this node, by which ComfyUI knows whose progress is shown
    try:
        return await asyncio.wrap_future(start(lambda: context.run(work, abandoned.is_set), "magi-node"))
    finally:
        abandoned.set()

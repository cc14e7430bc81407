"""Work that waits for others, in a thread beside ComfyUI's loop: other nodes run meanwhile."""

import asyncio
import contextvars
import threading
from collections.abc import Callable
from typing import TypeVar

from ...magi.system.threads import start

T = TypeVar("T")


async def in_thread(work: Callable[[Callable[[], bool]], T]) -> T:
    """Returns or raises what `work(left)` does.

    `left()` tells it whether nobody waits any more: ComfyUI has ended the graph, as it does when another node fails. The
    thread is not one of the loop's own, for which ComfyUI would wait then.
    """
    left = threading.Event()
    context = contextvars.copy_context()  # this node's, by which ComfyUI knows whose progress it is
    try:
        return await asyncio.wrap_future(start(lambda: context.run(work, left.is_set), "magi-node"))
    finally:
        left.set()

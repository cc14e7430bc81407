"""Work that waits for others, in a thread beside ComfyUI's loop: other nodes run meanwhile."""

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


async def in_thread(work: Callable[[Callable[[], bool]], T]) -> T:
    """What `work(left)` returns or raises.

    `left()` tells it whether nobody waits any more: ComfyUI has ended the graph, as it does when another node fails. The thread is not one of the loop's
    own, for which ComfyUI would wait then.
    """
    done: Future[T] = Future()
    left = threading.Event()

    def run() -> None:
        try:
            outcome = work(left.is_set)
        except BaseException as error:
            if done.set_running_or_notify_cancel():
                done.set_exception(error)
        else:
            if done.set_running_or_notify_cancel():
                done.set_result(outcome)

    # In this node's context, by which ComfyUI knows whose progress it is.
    threading.Thread(target=contextvars.copy_context().run, args=(run,), name="magi-node", daemon=True).start()
    try:
        return await asyncio.wrap_future(done)
    finally:
        left.set()
